"""What holds for every way to distill."""

import math

import pytest
import torch

from composer_kd import KnowledgeDistillation
from helpers import on_two_ranks
from settings import BATCH, BATCHES, SETTINGS, classifier, logged, save_everything, train, trainer, weights

every_setting = pytest.mark.parametrize('setting', SETTINGS)


def assert_same(some: dict, others: dict) -> None:
    assert some.keys() == others.keys()
    for name in some:
        assert torch.equal(some[name], others[name]), name


def distiller(run):
    (found,) = (a for a in run.state.algorithms if isinstance(a, KnowledgeDistillation))
    return found


@every_setting
def test_trains_and_logs(setting):
    run = train(SETTINGS[setting](), max_duration='6ep')
    total = logged(run, 'loss/train/total')
    assert len(total) == 3 * BATCHES and all(math.isfinite(loss) for loss in total.values())
    active = [batch for batch, flag in logged(run, 'distillation/active').items() if flag]
    kd, label = logged(run, 'loss/train/kd'), logged(run, 'loss/train/label')
    assert list(kd) == list(label) == active
    assert 0 < len(active) <= 3 * BATCHES
    assert kd[active[-1]] < kd[active[0]]
    assert distiller(run).pool.forwards > 0
    assert list(logged(run, 'time/teacher').values())[-1] > 0


@every_setting
def test_teacher_says_in_eval_mode_what_it_says_alone(setting):
    run = trainer(SETTINGS[setting]())
    pool = distiller(run).pool
    before = [teacher.manifest()['sha256'] for teacher in pool.teachers]
    networks = [teacher.network for teacher in pool.teachers]
    run.fit()
    run.close()
    assert [teacher.manifest()['sha256'] for teacher in pool.teachers] == before
    for network in networks:
        assert not network.training
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())
        mine = {id(p) for p in network.parameters()}
        assert not any(id(p) in mine for group in run.state.optimizers[0].param_groups for p in group['params'])


# Composer says so when a run is resumed at the very end of an epoch.
@pytest.mark.filterwarnings('ignore:No batches were trained', 'ignore:The ..compute.. method of metric')
@every_setting
def test_resume_at_any_batch_is_bitwise_the_unbroken_run(setting, tmp_path):
    unbroken = train(
        SETTINGS[setting](),
        model=classifier(1, dropout=0.3),
        save_folder=str(tmp_path),
        save_interval='1ba',
        save_filename='ba{batch}.pt',
    )
    for batch in range(1, BATCHES):
        resumed = train(
            SETTINGS[setting](), model=classifier(2, dropout=0.3), load_path=str(tmp_path / f'ba{batch}.pt'), seed=99
        )
        assert_same(weights(resumed), weights(unbroken))
        assert distiller(resumed).pool.forwards == distiller(unbroken).pool.forwards
    saved = torch.load(tmp_path / f'ba{BATCHES}.pt', weights_only=False)
    assert not any('teacher' in key for key in saved['state']['model'])
    assert set(saved['state']['model']) == set(weights(unbroken))


@every_setting
def test_checkpoint_holds_plain_values_of_the_teachers(setting, tmp_path):
    train(SETTINGS[setting](), save_folder=str(tmp_path), save_filename='last.pt', max_duration='1ep')
    saved = torch.load(tmp_path / 'last.pt', weights_only=False)
    torch.save(dict(saved['state']['algorithms']), tmp_path / 'algorithms.pt')
    state = torch.load(tmp_path / 'algorithms.pt', weights_only=True)['KnowledgeDistillation']
    assert [sorted(manifest) for manifest in state['teachers']] == len(state['teachers']) * [
        ['architecture', 'name', 'options', 'parameters', 'sha256', 'source']
    ]


@every_setting
def test_one_batch_equals_its_microbatches(setting):
    whole = weights(train(SETTINGS[setting]()))
    parts = weights(train(SETTINGS[setting](), device_train_microbatch_size=BATCH // 4))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)


TWO_RANKS = """
from pathlib import Path

import torch
from composer.utils import dist

from composer_kd import KnowledgeDistillation, NetworkTeacher, TeacherError
from settings import CLASSES, save_everything, trainer

torch.set_num_threads(1)
save_everything(Path())

class SaysNanOnRankOne(torch.nn.Module):
    def forward(self, images):
        return torch.full((len(images), CLASSES), float('nan') if dist.get_global_rank() == 1 else 0.0)

run = trainer([KnowledgeDistillation(NetworkTeacher(SaysNanOnRankOne()))])
try:
    run.fit()
except TeacherError as error:
    Path(f'rank{dist.get_global_rank()}.txt').write_text(str(error))
run.engine.close()
"""


@pytest.mark.dist
def test_two_ranks_equal_one_and_stop_together(tmp_path):
    for ranks in ('one', 'two'):
        (tmp_path / ranks).mkdir()
    save_everything(tmp_path / 'one')
    on_two_ranks(TWO_RANKS, tmp_path / 'two')
    for name in SETTINGS:
        one, two = (torch.load(tmp_path / ranks / f'{name}.pt') for ranks in ('one', 'two'))
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f'{n}: {m}')
    for rank in range(2):  # though only one of them heard it
        message = (tmp_path / 'two' / f'rank{rank}.txt').read_text()
        assert message == 'teacher SaysNanOnRankOne (number 0) gave NaN or infinity at batch 0'


@every_setting
def test_random_streams_are_those_of_the_plain_run(setting):
    streams = []
    for algorithms in ([], SETTINGS[setting]()):
        train(algorithms, model=classifier(1, dropout=0.3))
        streams.append(torch.get_rng_state())
    assert torch.equal(*streams)
