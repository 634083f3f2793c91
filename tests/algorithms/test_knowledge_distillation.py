"""KnowledgeDistillation against a plain loop, beside its sisters' absence, and with bad input."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from composer import Algorithm, Callback
from composer import algorithms as ca
from composer.core import Event
from composer.models import ComposerClassifier
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from composer_kd import EarlyStopDistillation, KnowledgeDistillation, NetworkTeacher, TeacherError, TeacherSampling
from composer_kd.algorithms.knowledge_distillation import blend, distills
from composer_kd.data import data_spec
from composer_kd.losses import kl, topk, topk_kl
from composer_kd.recording import RowFormat
from composer_kd.teachers.pool import convex_weights
from composer_kd.topk import TopKLogits
from settings import CLASSES, classifier, data, logged, network, teachers, train, trainer, weights


def same(some, others):
    return all(torch.equal(some[name], others[name]) for name in others)


def test_equals_a_plain_loop_bit_for_bit():
    run = train([KnowledgeDistillation(teachers(1), temperature=4.0, kd_weight=0.9, label_weight=0.1)])

    student, teacher = network(1), network(100, width=8, dropout=0.5).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    loader = data()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            logits = student(images)
            with torch.no_grad():
                targets = F.softmax(teacher(images) / 4, dim=-1)
            kd = F.kl_div(F.log_softmax(logits / 4, dim=-1), targets, reduction='batchmean') * 16
            loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * kd
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert same(weights(run), {f'module.{name}': value for name, value in student.state_dict().items()})


SILENT = {
    'kd_weight_0': lambda: [KnowledgeDistillation(teachers(2), kd_weight=0, label_weight=1), TeacherSampling()],
    'before_the_window': lambda: [KnowledgeDistillation(teachers(1)), EarlyStopDistillation('90ep', start='50ep')],
    'after_the_window': lambda: [KnowledgeDistillation(teachers(1)), EarlyStopDistillation('1ba', start='0ba')],
    'between_intervals': lambda: [KnowledgeDistillation(teachers(1), interval=100)],
}


@pytest.mark.parametrize('setting', SILENT)
def test_a_run_that_does_not_distill_is_the_plain_run(setting, tmp_path):
    # The last two hear a teacher in batch 0: what follows is compared with a plain run from there.
    first = train(SILENT[setting](), model=classifier(1, dropout=0.3), max_duration='1ba', save_folder=str(tmp_path))
    start = {'load_path': str(tmp_path / 'latest-rank0.pt'), 'model': classifier(2, dropout=0.3)}
    plain = train([], **copy.deepcopy(start))
    silent = train(SILENT[setting](), **copy.deepcopy(start))
    assert same(weights(silent), weights(plain))
    heard = 0 if setting in ('kd_weight_0', 'before_the_window') else 1
    assert next(a for a in silent.state.algorithms if isinstance(a, KnowledgeDistillation)).pool.forwards == heard
    if not heard:
        assert same(weights(first), weights(train([], model=classifier(1, dropout=0.3), max_duration='1ba')))


def test_hearing_a_teacher_without_weight_on_it_changes_no_bit():
    deaf = train(
        [KnowledgeDistillation(teachers(1), kd_weight=1e-30, label_weight=1)], model=classifier(1, dropout=0.3)
    )
    assert deaf.state.algorithms[0].pool.forwards == 8
    assert same(weights(deaf), weights(train([], model=classifier(1, dropout=0.3))))


def test_no_distillation_but_half_the_label_loss():
    half = train([KnowledgeDistillation(teachers(1), kd_weight=0, label_weight=0.5)])
    optimizer_free = logged(half, 'loss/train/total')[0]
    assert optimizer_free == pytest.approx(logged(train([]), 'loss/train/total')[0] / 2)


@pytest.mark.parametrize(
    'label_loss, label',
    [
        (torch.tensor(3.0), 3.0),
        (torch.tensor([2.0, 4.0]), 3.0),
        ((torch.tensor(1.0), torch.tensor(2.0)), 3.0),
        ({'ce': torch.tensor(1.0), 'aux': torch.tensor(2.0)}, 3.0),
        ({'ce': torch.tensor(1.0), 'aux': torch.tensor(2.0), 'total': torch.tensor(1.5)}, 1.5),
    ],
)
def test_blend_of_whatever_a_model_calls_its_loss(label_loss, label):
    parts = blend(label_loss, torch.tensor(10.0), kd_weight=0.5, label_weight=0.25)
    assert parts['label'] == label and parts['kd'] == 10 and parts['total'] == 0.25 * label + 5
    assert not isinstance(label_loss, dict) or (parts['ce'] == 1 and parts['aux'] == 2)


class DictLoss(ComposerClassifier):
    """Its loss is a dict, as in detection and other multi-task models."""

    def loss(self, outputs, batch):
        loss = super().loss(outputs, batch)
        return {'half': loss / 2, 'rest': loss / 2}


def test_blend_names_the_parts_of_a_tuple_as_composer_does():
    parts = blend((torch.tensor(1.0), torch.tensor(2.0)), torch.tensor(0.0), kd_weight=0, label_weight=1)
    assert parts['loss0'] == 1 and parts['loss1'] == 2
    with pytest.raises(ValueError, match="has a part 'kd', a name that distillation logs under"):
        blend({'kd': torch.tensor(1.0)}, torch.tensor(0.0), kd_weight=0, label_weight=1)


def test_a_model_whose_loss_is_a_dict():
    run = train([KnowledgeDistillation(teachers(1))], model=DictLoss(network(1), num_classes=CLASSES))
    plain = train([KnowledgeDistillation(teachers(1))])
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(run)[name], value)
    assert logged(run, 'loss/train/half').keys() == logged(run, 'loss/train/kd').keys()


def test_a_loss_of_ones_own():
    def distance(*, student_logits, teacher_logits, where=None):
        return (student_logits - teacher_logits).abs().mean()

    run = train([KnowledgeDistillation(teachers(1), loss=distance)])
    assert logged(run, 'loss/train/kd')[7] < logged(run, 'loss/train/kd')[0]


def test_fp64_student():
    teacher = NetworkTeacher(classifier(100), dtype='float64')
    dataset = data()
    dataset.dataset.tensors = (dataset.dataset.tensors[0].double(), dataset.dataset.tensors[1])
    run = train([KnowledgeDistillation(teacher)], model=classifier(1).double(), train_dataloader=dataset)
    assert all(value.dtype == torch.float64 for value in weights(run).values())


class Says(torch.nn.Module):
    """A teacher that says the same to everything."""

    def __init__(self, value, classes=CLASSES):
        super().__init__()
        self.value, self.classes = value, classes

    def forward(self, images):
        return torch.full((len(images), self.classes), self.value)


def test_nan_from_a_teacher_is_named_with_its_batch():
    pool = [*teachers(2), NetworkTeacher(Says(float('nan')), name='broken')]
    run = trainer([KnowledgeDistillation(pool, interval=3), EarlyStopDistillation('1dur', start='2ba')])
    with pytest.raises(TeacherError, match=r'teacher broken \(number 2\) gave NaN or infinity at batch 3'):
        run.fit()
    run.close()


def test_nan_is_caught_before_a_checkpoint_is_written(tmp_path):
    algorithms = [KnowledgeDistillation(NetworkTeacher(Says(float('nan'))))]
    run = trainer(algorithms, save_folder=str(tmp_path), save_interval='1ba')
    with pytest.raises(TeacherError):
        run.fit()
    run.close()
    assert not list(tmp_path.glob('*.pt'))


def test_other_classes_are_refused_before_training():
    other = ComposerClassifier(torch.nn.Linear(4, 7), num_classes=7)
    with pytest.raises(TeacherError, match='teacher Linear has 7 classes, the student 5'):
        trainer([KnowledgeDistillation(NetworkTeacher(other))])


def test_other_classes_of_a_bare_network_are_refused_at_the_first_forward():
    run = trainer([KnowledgeDistillation(NetworkTeacher(Says(0.0, classes=7)))])
    with pytest.raises(TeacherError, match=r'shape \[32, 7\], the student \[32, 5\]'):
        run.fit()
    run.close()


def test_a_teacher_that_is_the_student_is_refused():
    model = classifier(1)
    with pytest.raises(TeacherError, match='shares parameters with the student'):
        trainer([KnowledgeDistillation(NetworkTeacher(model.module))], model=model)
    assert all(parameter.requires_grad for parameter in model.parameters())


class Dense(torch.nn.Module):
    """Logits for every pixel, as in segmentation."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, CLASSES, 1)

    def forward(self, images):
        return self.conv(images)


def test_logits_of_many_positions_need_an_axis():
    def dense(**loss):
        student = ComposerClassifier(
            Dense(), num_classes=CLASSES, train_metrics=MeanMetric(), loss_fn=lambda logits, labels: logits.mean()
        )
        student.update_metric = lambda batch, outputs, metric: metric.update(outputs)
        algorithms = [KnowledgeDistillation(NetworkTeacher(Dense()), **loss)]
        return train(algorithms, model=student, max_duration='1ba')

    with pytest.raises(ValueError, match=r'which axis of logits of shape \[32, 5, 8, 8\] has the classes'):
        dense()
    assert logged(dense(loss=functools.partial(kl, axis=1)), 'loss/train/kd')[0] > 0


@pytest.mark.filterwarnings('ignore:KnowledgeDistillation is not in the state_dict')
def test_warm_starts(tmp_path):
    def distills(teacher_seed, **kwargs):
        return train([KnowledgeDistillation(NetworkTeacher(network(teacher_seed)))], max_duration='2ep', **kwargs)

    train([], save_folder=str(tmp_path / 'plain'), max_duration='1ep')
    run = distills(5, load_path=str(tmp_path / 'plain' / 'latest-rank0.pt'))
    assert run.state.algorithms[-1].pool.forwards == 4  # the second epoch of a run that began without teachers
    distills(5, save_folder=str(tmp_path / 'kd'))
    run = distills(6, load_path=str(tmp_path / 'kd' / 'latest-rank0.pt'), load_weights_only=True)
    assert run.state.algorithms[-1].pool.forwards == 8  # the weights alone: another teacher may go on with them


IMAGES = data().dataset.tensors[0]


class Recorded:
    """Speaks of samples by their names, as a record does; it sees to it that they are the right ones."""

    name, forwards, replays = 'stored', 0, True

    def __init__(self, top=False):
        self.top = top
        self.format = RowFormat(CLASSES, 2, 'float32', (1.0, 4.0)) if top else None
        self.views = []
        torch.manual_seed(0)
        self.logits = torch.randn(len(IMAGES), CLASSES)

    def check(self, student): ...

    prepare = release = check

    def manifest(self):
        return {'sha256': ''}

    def signal(self, batch, keys=None):
        samples, views = keys.unbind(1)
        assert keys.dtype == torch.int64 and torch.equal(IMAGES[samples], batch[0])
        self.views += views.tolist()
        logits = self.logits[samples]
        return TopKLogits.of(logits, 2, (1.0, 4.0)) if self.top else logits


def small_last_batch():
    return data_spec(data().dataset.dataset, batch_size=24, train=True, num_workers=0, drop_last=False)


OPTIONS = {
    'batches': {},
    'microbatches': {'device_train_microbatch_size': 5},
    'last_batch_is_small': {'train_dataloader': lambda: small_last_batch()},
    'sam': {'algorithms': lambda: [ca.SAM(interval=1)]},
}


@pytest.mark.filterwarnings('ignore:SAM', 'ignore:Cannot split tensor')
@pytest.mark.parametrize('sampling', [[], [TeacherSampling(per='sample')]])
@pytest.mark.parametrize('name', OPTIONS)
def test_keys_are_those_of_the_samples(name, sampling):
    options = {key: value() if callable(value) else value for key, value in OPTIONS[name].items()}
    teacher = Recorded()
    train([*options.pop('algorithms', []), KnowledgeDistillation([teacher]), *sampling], **options)
    passes = 2 if name == 'sam' else 1
    assert teacher.views == [0] * passes * len(IMAGES) + [1] * passes * len(IMAGES)


class Drops(Algorithm):
    """Changes the number of samples, in a way that nobody could know."""

    def __init__(self, event):
        self.event = event

    def match(self, event, state):
        return event == self.event

    def apply(self, event, state, logger):
        state.batch = [x[:-1] for x in state.batch]


@pytest.mark.parametrize('event', [Event.AFTER_DATALOADER, Event.BEFORE_FORWARD])
def test_a_batch_that_is_not_the_loaders_is_refused(event):
    model = classifier(1)
    model.train_metrics = MeanMetric()  # of nothing, since others would fail first
    model.update_metric = lambda batch, outputs, metric: metric.update(0.0)
    run = trainer([KnowledgeDistillation(Recorded()), Drops(event)], model=model)
    with pytest.raises(TeacherError, match='a batch has 31 samples, but came from the loader with 32: something has'):
        run.fit()
    run.close()


def test_a_loader_that_does_not_know_its_samples_is_refused():
    loader = DataLoader(data().dataset.dataset, batch_size=32)
    run = trainer([KnowledgeDistillation(Recorded())], train_dataloader=loader)
    with pytest.raises(TeacherError, match=r'make the training loader with composer_kd\.data\.data_spec'):
        run.fit()
    run.close()


def test_the_largest_logits_of_a_teacher():
    class Check(Callback):
        def before_backward(self, state, logger):
            keys = state.dataloader.keys[:, 0]
            values, indices, tail = topk(teacher_logits=teacher.logits[keys], k=2, temperature=4.0)
            expected = topk_kl(
                student_logits=state.outputs, teacher_values=values, teacher_indices=indices, teacher_tail=tail,
                temperature=4.0,
            )  # fmt: skip
            torch.testing.assert_close(state.loss['kd'], expected)
            seen.append(state.loss['kd'])

    seen, teacher = [], Recorded(top=True)
    train([KnowledgeDistillation(teacher)], callbacks=Check())
    assert len(seen) == 8


@pytest.mark.parametrize(
    'options, message',
    [
        ({'loss': 'mse'}, "only a teacher's 2 largest logits are recorded, which are enough for loss='kl'"),
        ({'loss': functools.partial(kl, axis=-1)}, "only a teacher's 2 largest logits"),
        ({'softmax_axis': 'sequence'}, "only a teacher's 2 largest logits"),
        ({'temperature': 3}, 'known in sum at temperatures 1, 4, not at 3: distill at one of these, or record anew'),
    ],
)
def test_a_loss_that_needs_all_logits_is_refused_before_training(options, message):
    with pytest.raises(TeacherError, match=message):
        trainer([KnowledgeDistillation(Recorded(top=True), **options)])


def test_largest_logits_that_would_be_averaged_are_refused_before_a_batch():
    run = trainer([KnowledgeDistillation([Recorded(top=True), Recorded(top=True)])])
    with pytest.raises(TeacherError, match='which cannot be averaged: take average='):
        run.fit()
    assert run.state.timestamp.batch == 0
    run.close()
    train([KnowledgeDistillation([Recorded(top=True), Recorded(top=True)]), TeacherSampling()])


@given(st.integers(0, 2**63), st.integers(0, 10**6), st.integers(1, 5), st.floats(0.01, 1))
def test_whether_a_batch_distills_is_a_function_of_its_arguments(seed, batch, interval, probability):
    answer = distills(seed, batch, interval=interval, probability=probability)
    assert answer == distills(seed, batch, interval=interval, probability=probability)
    assert answer <= (batch % interval == 0)
    assert distills(seed, batch * interval, interval=interval)


def test_the_share_of_batches_that_distill():
    assert sum(distills(7, batch, probability=0.3) for batch in range(20_000)) / 20_000 == pytest.approx(0.3, abs=0.01)
    run = train([KnowledgeDistillation(teachers(1), probability=0.5, interval=2)], max_duration='4ep')
    expected = {batch: float(distills(3, batch, interval=2, probability=0.5)) for batch in range(16)}
    assert logged(run, 'distillation/active') == expected and 0 < sum(expected.values()) < 8


class Hears(Callback):
    """Compares the loss with that of a mean that is made as one would by hand."""

    def __init__(self, networks, mean):
        self.networks = [copy.deepcopy(network).eval() for network in networks]
        self.mean = mean
        self.batches = 0

    def before_backward(self, state, logger):
        images, labels = state.batch
        with torch.no_grad():
            said = torch.stack([network(images) for network in self.networks])
        expected = kl(
            student_logits=state.outputs, teacher_logits=self.mean(said, labels, state.timestamp.batch.value),
            temperature=4.0,
        )  # fmt: skip
        torch.testing.assert_close(state.loss['kd'], expected)
        self.batches += 1


def those_that_are_right(said, labels, batch):
    rows = []
    for sample, label in enumerate(labels):
        right = [logits[sample] for logits in said if logits[sample].argmax() == label]
        rows.append(torch.stack(right or [logits[sample] for logits in said]).mean(0))
    return torch.stack(rows)


MEANS = {
    'weights': ({'weights': [1, 2, 5]}, lambda said, *_: (said[0] + 2 * said[1] + 5 * said[2]) / 8),
    'random': (
        {'weights': 'random'},
        lambda said, labels, batch: torch.einsum('t,tnc->nc', torch.tensor(convex_weights(3, batch, 3)), said),
    ),
    'probabilities': ({'average': 'probabilities'}, lambda said, *_: (said / 4).softmax(-1).mean(0).log() * 4),
    'only_correct': ({'only_correct': True}, those_that_are_right),
}


@pytest.mark.parametrize('microbatch', [None, 8])
@pytest.mark.parametrize('name', MEANS)
def test_the_mean_of_several(name, microbatch):
    options, mean = MEANS[name]
    networks = [network(seed) for seed in (5, 6, 7)]
    hears = Hears(networks, mean)
    distillation = KnowledgeDistillation([NetworkTeacher(x) for x in networks], **options)
    train([distillation], callbacks=hears, device_train_microbatch_size=microbatch)
    assert hears.batches == (8 if microbatch is None else 32)


def test_only_correct_needs_classes():
    def distillation():
        return KnowledgeDistillation(teachers(2), only_correct=True)

    for mixing in (ca.MixUp(), ca.CutMix(interpolate_loss=True)):
        with pytest.raises(ValueError, match=f'{type(mixing).__name__} makes one sample of two'):
            trainer([distillation(), mixing])
    grades = classifier(1)
    grades.num_classes = 1
    with pytest.raises(TeacherError, match='only_correct is for classes, of which one is right'):
        trainer([KnowledgeDistillation([NetworkTeacher(network(2))] * 2, only_correct=True)], model=grades)
    loader = data()
    loader.dataset.tensors = (IMAGES, torch.nn.functional.one_hot(loader.dataset.tensors[1]).float())
    run = trainer([distillation()], train_dataloader=loader)
    message = r'whole numbers of shape \[32\]; this batch has torch.float32 \[32, 5\]: leave only_correct out'
    with pytest.raises(TeacherError, match=message):
        run.fit()
    run.close()


def test_a_second_distilling_algorithm_is_refused():
    with pytest.raises(ValueError, match='a run distills by one algorithm'):
        trainer([KnowledgeDistillation(teachers(1)), KnowledgeDistillation(teachers(1))])


@pytest.mark.parametrize('sister', [TeacherSampling(), EarlyStopDistillation('0.5dur')])
def test_a_sister_without_distillation_is_refused(sister):
    with pytest.raises(ValueError, match=f'{type(sister).__name__} changes how a run distills'):
        trainer([sister])


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'loss': 'kld'}, "unknown loss 'kld'; known: kl, "),
        ({'temperature': 0}, 'temperature must be above 0'),
        ({'kd_weight': -1}, 'kd_weight must be 0 or more'),
        ({'label_weight': float('nan')}, 'label_weight must be 0 or more'),
        ({'interval': 0}, 'interval must be a whole number of batches, 1 or more'),
        ({'interval': 1.5}, 'interval must be a whole number'),
        ({'teachers': []}, 'teachers is empty'),
        ({'probability': 0}, 'probability must be above 0 and at most 1, not 0'),
        ({'weights': [1, 2]}, 'weights has 2 numbers for 1 teachers'),
        ({'record_top': 3}, 'record_top and record_dtype are for a record'),
        ({'softmax_axis': 'sequence', 'only_correct': True}, 'only_correct compares distributions over classes'),
        ({'softmax_axis': 'sequence', 'average': 'probabilities'}, "average='probabilities' compares distributions"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        KnowledgeDistillation(**{'teachers': teachers(1), **arguments})


def test_a_bare_network_must_be_wrapped():
    with pytest.raises(TypeError, match=r'wrap a network as NetworkTeacher'):
        KnowledgeDistillation(network(1))


def test_resume_refuses_another_teacher(tmp_path):
    train([KnowledgeDistillation(teachers(2))], save_folder=str(tmp_path), max_duration='1ep')
    load = {'load_path': str(tmp_path / 'latest-rank0.pt')}
    with pytest.raises(TeacherError, match='another teacher number 1: teacher1 with weights'):
        trainer([KnowledgeDistillation([*teachers(1), NetworkTeacher(network(9))])], **load)
    with pytest.raises(TeacherError, match='had 2 teachers, this one has 1'):
        trainer([KnowledgeDistillation(teachers(1))], **load)
