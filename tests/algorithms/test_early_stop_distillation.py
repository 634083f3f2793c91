"""The window of distillation, its ramp, and what is left of the teachers after it."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer_kd import EarlyStopDistillation, KnowledgeDistillation, NetworkTeacher
from composer_kd.algorithms.early_stop_distillation import window_share
from settings import classifier, logged, network, teachers, train, trainer, weights

fractions = st.floats(0, 1)


@given(elapsed=fractions, later=fractions, stop=st.floats(0.01, 1), ramp=fractions)
def test_the_share_falls_from_1_to_0(elapsed, later, stop, ramp):
    share = window_share(elapsed, stop=stop, ramp=min(ramp, stop))
    assert 0 <= share <= 1
    assert (share == 0) == (elapsed >= stop)
    if later >= elapsed:
        assert window_share(later, stop=stop, ramp=min(ramp, stop)) <= share


@pytest.mark.parametrize(
    'stop, start, active',
    [
        ('0.5dur', '0dur', [0, 1, 2, 3]),
        ('0.75dur', '0.25dur', [2, 3, 4, 5]),
        ('1ep', '0dur', [0, 1, 2, 3]),
        ('3ba', '1ba', [1, 2]),
        ('96sp', '0sp', [0, 1, 2]),
        ('0.5dur', '3ba', [3]),
        ('1dur', '1ep', [4, 5, 6, 7]),
        ('1000sec', '0sec', list(range(8))),
    ],
)
def test_the_window_in_every_unit(stop, start, active):
    run = train([KnowledgeDistillation(teachers(1)), EarlyStopDistillation(stop, start)])
    assert [batch for batch, flag in logged(run, 'distillation/active').items() if flag] == active
    assert run.state.algorithms[-1].pool.forwards == len(active)


def test_the_ramp_moves_weight_from_the_teacher_to_the_labels():
    run = train(
        [KnowledgeDistillation(teachers(1), kd_weight=0.8, label_weight=0.2), EarlyStopDistillation('6ba', ramp='4ba')]
    )
    expected = [0.8, 0.8, 0.8, 0.8 * 3 / 4, 0.8 * 2 / 4, 0.8 * 1 / 4, 0, 0]
    assert list(logged(run, 'distillation/kd_weight').values()) == pytest.approx(expected)
    total, label, kd = (logged(run, f'loss/train/{name}') for name in ('total', 'label', 'kd'))
    for batch, kd_weight in enumerate(expected[:6]):
        assert total[batch] == pytest.approx((1 - kd_weight) * label[batch] + kd_weight * kd[batch], rel=1e-5)


def test_the_network_is_gone_after_the_stop():
    teacher = NetworkTeacher(classifier(100))
    gone = weakref.ref(teacher._network)
    train([KnowledgeDistillation(teacher), EarlyStopDistillation('2ba')])
    gc.collect()
    assert gone() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_the_device_memory_is_free_after_the_stop():
    def allocated(algorithms):
        gc.collect()
        before = torch.cuda.memory_allocated()
        run = train(algorithms, device='gpu', precision='fp32')
        gc.collect()
        after = torch.cuda.memory_allocated() - before
        del run
        return after

    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1 << 20), torch.nn.Linear(1 << 20, 5))
    assert allocated([KnowledgeDistillation(NetworkTeacher(network)), EarlyStopDistillation('2ba')]) <= allocated(
        []
    ) + (1 << 20)


def test_who_else_holds_the_network_keeps_it():
    mine = network(100)
    before = mine[0].weight.clone()
    train([KnowledgeDistillation(NetworkTeacher(mine)), EarlyStopDistillation('2ba')])
    assert torch.equal(mine[0].weight, before) and mine[0].weight.device.type == 'cpu'


def test_a_run_resumed_after_the_stop_never_prepares_its_teacher(tmp_path):
    def algorithms(teacher):
        return [KnowledgeDistillation(teacher), EarlyStopDistillation('2ba')]

    unbroken = train(
        algorithms(teachers(1)[0]), save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt'
    )
    (teacher,) = teachers(1)
    teacher.prepare = lambda state: pytest.fail('the teacher was put on the device')
    resumed = train(algorithms(teacher), load_path=str(tmp_path / 'ba5.pt'))
    assert all(torch.equal(weights(resumed)[name], value) for name, value in weights(unbroken).items())


def test_a_window_that_ends_before_it_begins_is_said():
    with pytest.warns(UserWarning, match='distillation has ended at 2ba before it began'):
        train([KnowledgeDistillation(teachers(1)), EarlyStopDistillation('2ba', start='0.5dur')])


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'stop': '0.1dur', 'start': '0.5dur'}, r'stop \(0.1dur\) must come after start \(0.5dur\)'),
        ({'stop': '0ep'}, 'must come after start'),
        ({'stop': '30'}, "stop must be a time string, such as '0.3dur'"),
        ({'stop': 0.3}, "stop must be a time string, such as '0.3dur'"),
        ({'stop': '3ep', 'start': '-1ep'}, 'start must be 0 or later'),
        ({'stop': '30dur'}, "a run ends at '1dur'"),
        ({'stop': '5ep', 'ramp': '2ba'}, 'must be in the unit of stop'),
        ({'stop': '5ep', 'ramp': '6ep'}, 'is longer than the time from start'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EarlyStopDistillation(**arguments)


def test_distillation_that_has_stopped_stays_so_when_the_run_grows_longer(tmp_path):
    def algorithms():
        return [KnowledgeDistillation(teachers(1)), EarlyStopDistillation('0.5dur')]

    run = trainer(algorithms(), max_duration='1ep', save_folder=str(tmp_path))
    run.fit()
    run.fit(duration='3ep')
    run.close()
    resumed = train(algorithms(), max_duration='4ep', load_path=str(tmp_path / 'ep2-ba8-rank0.pt'))
    for grown in (run, resumed):
        assert grown.state.timestamp.epoch == 4 and grown.state.algorithms[-1].pool.forwards == 2
    assert all(torch.equal(weights(run)[name], value) for name, value in weights(resumed).items())
