"""The weight decay that each batch is trained with, and that nothing else of a run knows of it."""

from pathlib import Path

import pytest
import torch
from composer import Callback
from composer.optim import DecoupledAdamW, DecoupledSGDW
from hypothesis import given
from hypothesis import strategies as st

from composer_kd import EarlyStopDistillation, KnowledgeDistillation, RegularizationSchedule
from composer_kd.algorithms.regularization_schedule import decay_at, decay_beside
from composer_kd.recipes import RecipeError, check, load, run
from composer_kd.recipes.metrics_logger import read_metrics
from settings import BATCHES, classifier, logged, teachers, train, trainer, weights

OPTIMIZERS = {
    'sgd': lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
    'adamw': lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    'decoupled_sgdw': lambda parameters: DecoupledSGDW(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
    'decoupled_adamw': lambda parameters: DecoupledAdamW(parameters, lr=0.01, weight_decay=0.1),
}
decays = st.floats(0, 1)


class Watch(Callback):
    """Remembers with which weight decay each group was trained, batch by batch."""

    def __init__(self):
        self.groups = []

    def after_train_batch(self, state, logger):
        self.groups.append([group['weight_decay'] for group in state.optimizers[0].param_groups])

    @property
    def first(self):
        return [decays[0] for decays in self.groups]


class ByHand(Callback):
    """Sets the weight decay of each batch."""

    def __init__(self, decays):
        self.decays = decays

    def before_train_batch(self, state, logger):
        state.optimizers[0].param_groups[0]['weight_decay'] = self.decays[state.timestamp.batch.value]


def trained(algorithms, optimizer='sgd', seed=1, callbacks=(), **kwargs):
    """A run, and what it was trained with."""
    model, watch = classifier(seed, dropout=0.3), Watch()
    optimizers = OPTIMIZERS[optimizer](model.parameters())
    return train(algorithms, model=model, optimizers=optimizers, callbacks=[*callbacks, watch], **kwargs), watch


def same(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@given(share=st.floats(0, 1), initial=decays, while_distilling=decays)
def test_the_decay_beside_distillation_lies_between_both(share, initial, while_distilling):
    decay = decay_beside(share, while_distilling=while_distilling, initial=initial)
    low, high = sorted((initial, while_distilling))
    assert low * (1 - 1e-12) - 1e-300 <= decay <= high * (1 + 1e-12) + 1e-300
    assert decay_beside(0.0, while_distilling=while_distilling, initial=initial) == initial
    assert decay_beside(1.0, while_distilling=while_distilling, initial=initial) == while_distilling


@given(times=st.lists(st.integers(0, 20), unique=True), elapsed=st.integers(0, 25))
def test_a_milestone_holds_until_the_next(times, elapsed):
    milestones = [(time, float(time)) for time in sorted(times)]
    reached = [time for time in times if time <= elapsed]
    assert decay_at(elapsed, milestones, initial=-1.0) == max(reached, default=-1)


@pytest.mark.parametrize(
    'milestones, expected',
    [
        ({'2ba': 0.01, '6ba': 0.0}, [0.1] * 2 + [0.01] * 4 + [0.0] * 2),
        ({'0ep': 0.3, '1ep': 0}, [0.3] * 4 + [0.0] * 4),
        ({'0.25dur': 0.02, '0.625dur': 0.03}, [0.1] * 2 + [0.02] * 3 + [0.03] * 3),
        ({'96sp': 0.02}, [0.1] * 3 + [0.02] * 5),
        ({'1000sec': 0.02}, [0.1] * 8),
    ],
)
def test_milestones_in_every_unit(milestones, expected):
    run, watch = trained([RegularizationSchedule(milestones)])
    assert watch.first == expected
    assert logged(run, 'regularization/weight_decay') == dict(enumerate(expected))


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_the_weights_are_those_of_a_run_whose_decay_is_set_by_hand(optimizer):
    by_schedule, _ = trained([RegularizationSchedule({'4ba': 0.5, '6ba': 0.0})], optimizer)
    by_hand, _ = trained([], optimizer, callbacks=[ByHand([0.1] * 4 + [0.5] * 2 + [0.0] * 2)])
    assert same(by_schedule, by_hand)
    assert not same(by_schedule, trained([], optimizer)[0])


@pytest.mark.parametrize(
    'algorithms',
    [
        lambda: [RegularizationSchedule({'1ep': 0.1})],
        lambda: [KnowledgeDistillation(teachers(1)), RegularizationSchedule(while_distilling=0.1)],
    ],
    ids=['milestones', 'while_distilling'],
)
def test_a_schedule_that_changes_nothing_is_the_run_without_it(algorithms):
    with_it, _ = trained(algorithms())
    without, _ = trained(algorithms()[:-1])
    assert same(with_it, without)
    states = [run.state.optimizers[0].state_dict() for run in (with_it, without)]
    assert states[0]['param_groups'] == states[1]['param_groups']


SCHEDULES = {
    'milestones': lambda: [RegularizationSchedule({'2ba': 0.0, '6ba': 0.05})],
    'while_distilling': lambda: [
        RegularizationSchedule(while_distilling=0.0),
        KnowledgeDistillation(teachers(1)),
        EarlyStopDistillation('7ba', start='1ba', ramp='3ba'),
    ],
}


# Composer says so when a run is resumed at the very end of an epoch.
@pytest.mark.filterwarnings('ignore:No batches were trained', 'ignore:The ..compute.. method of metric')
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_resume_at_any_batch_is_bitwise_the_unbroken_run(schedule, tmp_path):
    """Also where the groups of the checkpoint have no weight decay, by which they could be told."""
    unbroken, watch = trained(
        SCHEDULES[schedule](), save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt'
    )
    assert 0.0 in watch.first and watch.first[-1] > 0
    for batch in range(1, BATCHES):
        resumed, rest = trained(SCHEDULES[schedule](), seed=2, load_path=str(tmp_path / f'ba{batch}.pt'))
        assert rest.first == watch.first[batch:]
        assert same(resumed, unbroken)


@pytest.mark.parametrize('place', [0, 1, 2])
def test_it_follows_the_ramp_wherever_it_stands(place):
    algorithms = [KnowledgeDistillation(teachers(1)), EarlyStopDistillation('6ba', start='1ba', ramp='4ba')]
    algorithms.insert(place, RegularizationSchedule(while_distilling=0.02))
    _, watch = trained(algorithms)
    assert watch.first == pytest.approx([0.1, 0.02, 0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


def test_distillation_that_has_stopped_for_good_is_not_followed_any_more():
    model, watch = classifier(1), Watch()
    algorithms = [
        KnowledgeDistillation(teachers(1)),
        EarlyStopDistillation('0.5dur'),
        RegularizationSchedule(while_distilling=0.0),
    ]
    optimizers = OPTIMIZERS['sgd'](model.parameters())
    run = trainer(algorithms, model, optimizers=optimizers, callbacks=[watch], max_duration='1ep')
    run.fit()
    run.fit(duration='3ep')  # a quarter of which is over
    run.close()
    assert watch.first == [0.0] * 2 + [0.1] * 14


@pytest.mark.parametrize(
    'groups, expected',
    [(None, [0.01, 0.0, 0.01]), ([1], [0.1, 0.01, 0.3]), ([0, 2], [0.01, 0.0, 0.01])],
)
def test_several_groups(groups, expected):
    model, watch = classifier(1), Watch()
    first, second, *rest = model.parameters()
    optimizers = torch.optim.SGD(
        [
            {'params': [first], 'weight_decay': 0.1},
            {'params': [second], 'weight_decay': 0.0},
            {'params': rest, 'weight_decay': 0.3},
        ],
        lr=0.05,
    )
    schedule = RegularizationSchedule({'3ba': 0.01}, groups=groups)
    run = train([schedule], model=model, optimizers=optimizers, callbacks=[watch])
    assert watch.groups == [[0.1, 0.0, 0.3]] * 3 + [expected] * 5
    if groups == [1]:
        assert logged(run, 'regularization/weight_decay')[3] == 0.01
    else:
        logs = [logged(run, f'regularization/weight_decay/group{index}') for index in (0, 2)]
        assert [(log[2], log[3]) for log in logs] == [(0.1, 0.01), (0.3, 0.01)]


def test_an_optimizer_that_composer_made():
    watch = Watch()
    with pytest.warns(UserWarning, match='No optimizer was specified'):
        train([RegularizationSchedule({'2ba': 0.01}, groups=[0])], optimizers=None, callbacks=[watch])
    assert watch.first == [0.0] * 2 + [0.01] * 6


ONE_OF_THE_TWO = 'give one of the two, milestones'


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({}, ONE_OF_THE_TWO),
        ({'milestones': {}}, ONE_OF_THE_TWO),
        ({'milestones': {'1ep': 0.0}, 'while_distilling': 0.0}, ONE_OF_THE_TWO),
        ({'milestones': {'18': 0.0}}, "a milestone must be a time string, such as '0.3dur', .* not '18'"),
        ({'milestones': {'2dur': 0.0}}, "a milestone is 2.0dur, but a run ends at '1dur'"),
        ({'milestones': {'2ep': 0.1, '1ep': 0.0}}, 'must come one after another: 1ep does not come after 2ep'),
        ({'milestones': {'1ep': 0.1, '01ep': 0.0}}, 'milestones must come one after another'),
        ({'milestones': {'1ep': 0.1, '200ba': 0.0}}, 'milestones must be in one unit, .*: 1ep, 200ba'),
        ({'milestones': {'1ep': -0.1}}, 'weight decay at 1ep must be 0 or more, not -0.1'),
        ({'while_distilling': float('nan')}, 'while_distilling must be 0 or more, not nan'),
        ({'while_distilling': 0.0, 'groups': []}, r'groups must be numbers of parameter groups, from 0 on, not \[\]'),
        ({'while_distilling': 0.0, 'groups': [0, -1]}, r'from 0 on, not \[0, -1\]'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RegularizationSchedule(**arguments)


@pytest.mark.parametrize(
    'schedule, optimizer, message',
    [
        ({'milestones': {'1ep': 0.0}}, {}, 'the optimizer has no weight decay .*, or name the parameter groups'),
        (
            {'milestones': {'1ep': 0.0}, 'groups': [0, 2]},
            {},
            'there is no parameter group 2: the optimizer has one parameter group, 0',
        ),
        (
            {'milestones': {'1ep': 0.0}},
            {'name': torch.optim.Rprop},
            'Rprop knows no weight_decay, which RegularizationSchedule is to change: take another',
        ),
        ({'while_distilling': 0.0, 'groups': [0]}, {}, 'add KnowledgeDistillation or Codistillation to its algorithms'),
    ],
)
def test_what_is_not_there_is_said_before_the_run_begins(schedule, optimizer, message):
    model = classifier(1)
    optimizers = optimizer.get('name', torch.optim.SGD)(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        trainer([RegularizationSchedule(**schedule)], model, optimizers=optimizers)


RECIPE = """\
model: {name: small_convnet, num_classes: 10, width: 2}
train_data: {name: digits, split: train, batch_size: 256}
max_duration: 2ep
optimizer: {name: decoupled_sgdw, lr: 0.1, weight_decay: 5.0e-4}
algorithms: {regularization_schedule: {milestones: {0.25dur: 1.0e-5, 0.5dur: 0}}}
device: cpu
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('x.yaml').write_text(RECIPE)
    return 'x.yaml'


def test_a_recipe(recipe):
    check(load(recipe))
    run(recipe)
    rows = read_metrics(Path('runs/x/metrics.jsonl'))
    assert [row['regularization/weight_decay'] for row in rows] == [5e-4] * 3 + [1e-5] * 2 + [0.0] * 5


@pytest.mark.parametrize(
    'override, message',
    [
        ('{milestones: {18: 0.0}}', "a milestone must be a time string, such as '0.3dur'"),
        ('{milestones: [18ep]}', 'milestones: must be Mapping'),
        ('{milestones: {18ep: small}}', 'milestones: must be Mapping'),
        ('{while_distilling: 0.0}', 'RegularizationSchedule changes how a run distills: add KnowledgeDistillation'),
    ],
)
def test_mistakes_that_the_checker_finds(recipe, override, message):
    with pytest.raises(RecipeError, match=message) as error:
        check(load(recipe, [f'algorithms.regularization_schedule={override}']))
    assert str(error.value).startswith('command line: algorithms.regularization_schedule')


def test_a_mistake_is_found_before_a_teacher_is_trained(recipe):
    Path('teacher.yaml').write_text(RECIPE)
    distilled = ['algorithms.knowledge_distillation={}', 'teachers=[{name: network, recipe: teacher.yaml}]']
    for override, message in (
        ('optimizer.weight_decay=0.0', 'the optimizer has no weight decay'),
        ('algorithms.regularization_schedule.groups=[3]', 'there is no parameter group 3'),
    ):
        for more in ([], distilled):
            with pytest.raises(RecipeError, match=message):
                run(recipe, [override, *more])
            assert not Path('runs').exists() or not any(Path('runs').iterdir())
