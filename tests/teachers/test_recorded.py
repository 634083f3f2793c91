"""Teachers that speak from a record, and those whose words go into one, in real runs."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composer import Trainer
from composer.algorithms import SAM
from composer.core import Callback, Precision
from composer.devices import DeviceCPU

from composer_kd import (
    EarlyStopDistillation,
    KnowledgeDistillation,
    NetworkTeacher,
    RecordedTeacher,
    TeacherError,
    TeacherSampling,
)
from composer_kd import data as builders
from composer_kd.data import data_spec
from composer_kd.losses import kl, topk_bias
from composer_kd.models import masked_lm, small_convnet
from composer_kd.recording import Record
from composer_kd.teachers import RecordingTeacher
from composer_kd.topk import TopKLogits, topk_loss
from helpers import another_writer, make_vocabulary, on_two_ranks

SAMPLES, BATCH = 70, 16

pytestmark = pytest.mark.filterwarnings('ignore:Cannot split tensor of length 6', 'ignore:SAM has known issues')


def loader(batch_size=BATCH, subset=SAMPLES, **options):
    """Random images that are shifted and mirrored, and come in two views."""
    options = {'augment': True, 'views': 2, 'drop_last': False, **options}
    return builders.fashion_mnist('train', batch_size, synthetic=True, subset=subset, **options)


def convnet(seed, width=2):
    torch.manual_seed(seed)
    return small_convnet(10, width=width)


def network_teacher():
    return NetworkTeacher(convnet(7, width=3), name='big')


def distillation(teachers=None, **options):
    return KnowledgeDistillation(teachers or network_teacher(), temperature=2.0, **options)


def train(*algorithms, max_duration='3ep', data=None, model=None, close=True, **options):
    """A run of a small student, with BatchNorm, which remembers every batch."""
    model = model or convnet(1)
    trainer = Trainer(
        model=model,
        train_dataloader=data or loader(),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        max_duration=max_duration,
        algorithms=list(algorithms),
        progress_bar=False,
        device='cpu',
        seed=3,
        **options,
    )
    try:
        trainer.fit()
    finally:
        trainer.engine.close()
    return model.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope='module')
def online():
    """The weights of a run that hears the network itself."""
    return train(distillation())


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A record of two whole views, whole vectors in float32."""
    path = tmp_path_factory.mktemp('whole') / 'record'
    train(distillation(record=path))
    return path


def test_a_run_that_records_is_the_run_without_a_record(online, tmp_path):
    first, second = distillation(record=tmp_path / 'r'), distillation(record=tmp_path / 'r')
    assert same(train(first), online)
    assert same(train(second), online)
    assert (first.pool.forwards, second.pool.forwards) == (10, 0)  # five batches in each of two views
    assert (first.pool.heard, second.pool.heard) == (15, 15)
    assert sorted(path.name[:9] for path in (tmp_path / 'r').iterdir()) == sorted(
        ['manifest.', *['view00000'] * 14, *['view00001'] * 14]
    ), 'no journal, no lock'
    record = Record.open(tmp_path / 'r')
    assert not record.missing(2) and record.manifest['teacher']['name'] == 'big'
    assert (record.manifest['k'], record.manifest['dtype'], record.manifest['precision']) == (None, 'float32', 'fp32')


@pytest.mark.parametrize('options', [{}, {'data': loader(num_workers=2)}])
def test_training_from_a_record_is_training_online(options, folder, online):
    teacher = RecordedTeacher(folder)
    assert same(train(distillation(teacher), **options), online)
    assert teacher.forwards == 0


def test_microbatches(tmp_path):
    options = {'device_train_microbatch_size': 4}
    expected = train(distillation(), **options)
    assert same(train(distillation(record=tmp_path), **options), expected)
    assert same(train(distillation(RecordedTeacher(tmp_path)), **options), expected)


def test_resumed_in_the_middle_of_an_epoch(folder, online, tmp_path):
    options = {'save_folder': str(tmp_path), 'save_interval': '1ba', 'save_num_checkpoints_to_keep': -1}
    train(distillation(RecordedTeacher(folder)), max_duration='8ba', **options)
    model = convnet(5)
    resumed = {'model': model, 'load_path': str(tmp_path / 'ep1-ba7-rank0.pt')}
    assert same(train(distillation(RecordedTeacher(folder)), **resumed), online)


def test_the_students_randomness_is_untouched(folder, tmp_path):
    deaf = {'kd_weight': 0.0, 'label_weight': 1.0}
    alone = train()
    assert same(train(distillation(RecordedTeacher(folder), **deaf)), alone)
    assert same(train(distillation(record=tmp_path / 'r', **deaf)), alone)


def test_a_batch_that_is_run_twice(tmp_path):
    """SAM runs the microbatches of a batch twice; automatic microbatches do when memory is short."""
    weights = [train(SAM(), distillation(record=tmp_path / 'r'), max_duration='2ep') for _ in range(2)]
    assert same(*weights)
    assert same(train(SAM(), distillation(), max_duration='2ep'), weights[0])


class Asked(torch.nn.Module):
    """Says what its inputs are, and remembers for how many it was asked."""

    def __init__(self):
        super().__init__()
        self.samples = []

    def forward(self, images):
        self.samples.append(len(images))
        return images.flatten(1)[:, :10]


def test_what_an_epoch_leaves_out_is_asked_for_in_a_later_one(tmp_path):
    network = Asked()
    data = loader(views=1, drop_last=True)
    train(distillation(NetworkTeacher(network), record=tmp_path), data=data, max_duration='5ep')
    assert network.samples[:4] == [BATCH] * 4
    assert all(samples < BATCH for samples in network.samples[4:])
    record = Record.open(tmp_path)
    _, stored = record.size()
    assert sum(network.samples) == stored, 'no sample is asked for twice'

    (batch, keys), *_ = loader().dataloader.batches([[(sample, 0) for sample in range(SAMPLES)]])
    rows, counts = record.lookup(keys.numpy())
    expected = batch[0].flatten(1)[:, :10][torch.from_numpy(counts > 0)]
    assert torch.equal(record.format.decode(torch.from_numpy(rows)), expected), 'each sample has its own row'


def test_the_largest_logits_lose_exactly_the_bias(tmp_path):
    """The loss from k logits is the dense one less what `topk_bias` says, up to the rounding of float16."""
    spec, teacher, student = loader(), network_teacher(), convnet(1).eval()
    recording = RecordingTeacher(teacher, tmp_path, top=3, temperatures=(3.0,))
    train(distillation(recording), max_duration='2ep', data=spec)
    assert recording.format.temperatures == (1.0, 2.0, 3.0, 4.0, 8.0)
    assert recording.format.row_bytes == 3 * (2 + 2) + 5 * 4

    reader = RecordedTeacher(tmp_path)
    ((batch, keys),) = spec.dataloader.batches([[(sample, 1) for sample in range(20)]])
    for unprepared in (reader, RecordingTeacher(teacher, tmp_path)):
        with pytest.raises(TeacherError, match='before prepare'):
            unprepared.signal(batch, keys)
    train(distillation(reader), max_duration='1ba')  # prepares it
    said, whole = reader.signal(batch, keys), teacher.signal(batch)
    assert isinstance(said, TopKLogits) and said.shape == whole.shape
    with torch.no_grad():
        logits = student(batch)
    for temperature in reader.format.temperatures:
        sparse = topk_loss(student_logits=logits, teacher=said, temperature=temperature)
        dense = kl(student_logits=logits, teacher_logits=whole, temperature=temperature)
        bias = topk_bias(student_logits=logits, teacher_logits=whole, k=3, temperature=temperature).mean()
        assert bias > 0
        torch.testing.assert_close(sparse, dense - bias, rtol=2e-3, atol=1e-4)


def test_options_of_a_record_that_is_there(tmp_path):
    """Those that are not given are the record's, and those that are given must be."""
    train(distillation(record=tmp_path, record_top=4, record_dtype='float32'), max_duration='1ba')
    again = distillation(record=tmp_path)
    train(again, max_duration='1ba')
    assert (again.pool.teachers[0].format.k, again.pool.teachers[0].format.dtype) == (4, 'float32')
    for options, part in (
        ({'record_top': 5}, 'k: 4 there, 5 here'),
        ({'record_dtype': 'float16'}, 'dtype: float32 there'),
    ):
        with pytest.raises(TeacherError, match=part):
            train(distillation(record=tmp_path, **options), max_duration='1ba')
    all_of_them = distillation(record=tmp_path / 'whole', record_top=10)
    train(all_of_them, max_duration='1ba')
    assert all_of_them.pool.teachers[0].format.k is None


def test_after_a_run_that_failed_the_next_one_goes_on(online, tmp_path):
    class Interrupted(Exception):
        pass

    class Interrupt(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.left = network, 7

        def forward(self, images):
            self.left -= 1
            if not self.left:
                raise Interrupted
            return self.network(images)

    network = Interrupt(convnet(7, width=3).module)
    with pytest.raises(Interrupted):
        train(distillation(NetworkTeacher(network), record=tmp_path))
    assert (tmp_path / 'journal-0.bin').exists() and (tmp_path / '.lock').exists()
    second = distillation(NetworkTeacher(network), record=tmp_path)
    assert same(train(second), online)
    assert second.pool.forwards == 10 - 6


def test_a_teacher_that_says_nan_is_not_recorded(tmp_path):
    class Nan(torch.nn.Module):
        def forward(self, images):
            return torch.full((len(images), 10), torch.nan)

    run = distillation(NetworkTeacher(Nan(), name='odd'), record=tmp_path)
    with pytest.raises(TeacherError, match='gave NaN or infinity at batch 0'):
        train(run)
    with pytest.raises(TeacherError, match='teacher odd cannot be recorded: a logit of the teacher is NaN'):
        run.pool.teachers[0].flush()
    assert [path.name for path in tmp_path.iterdir() if path.name != '.lock'] == ['manifest.json']


def test_another_process_writes_the_record(tmp_path):
    with (
        another_writer(tmp_path),
        pytest.raises(TeacherError, match=f'another process writes the record {tmp_path}; wait until it is done'),
    ):
        train(distillation(record=tmp_path))
    train(distillation(record=tmp_path), max_duration='1ba')


OTHER_DATA = {
    'transform': ({'augment': False, 'views': None}, r'other training data: .*transform: .* there, .* here'),
    'view_seed': ({'view_seed': 5}, 'other training data: view_seed: 0 there, 5 here'),
    'samples': ({'subset': SAMPLES + 1}, 'other training data: samples: 70 there, 71 here'),
    'views': ({'views': 3}, 'has 2 views, this run asks for 3: set train_data.views=2, or run composer-kd record --vi'),
    'endless': ({'views': None}, 'has 2 views, this run makes new ones each epoch: set train_data.views=2'),
}


@pytest.mark.parametrize('case', OTHER_DATA)
def test_other_training_data(case, folder):
    options, message = OTHER_DATA[case]
    with pytest.raises(TeacherError, match=message):
        train(distillation(RecordedTeacher(folder)), data=loader(**options))


def test_as_many_new_views_as_are_recorded(folder):
    """A run that would make new views in each epoch, and has no more epochs than the record has views, is one of it."""
    weights = [
        train(distillation(RecordedTeacher(folder)), max_duration=end, data=loader(views=None))
        for end in ('2ep', '10ba')
    ]
    expected = train(distillation(), max_duration='2ep')
    assert same(weights[0], expected) and same(weights[1], expected)
    with pytest.raises(TeacherError, match='has 2 views, this run makes new ones'):
        train(distillation(RecordedTeacher(folder)), max_duration='11ba', data=loader(views=None))


def test_another_content(folder, monkeypatch):
    monkeypatch.setattr(
        'composer_kd.data.torchvision_sets.random_images', lambda *_: (torch.zeros(9, 1, 28, 28), torch.arange(9))
    )
    with pytest.raises(TeacherError, match='other training data: content of the data set: '):
        train(distillation(RecordedTeacher(folder)))


@pytest.fixture
def copied(folder, tmp_path):
    """The record, to be damaged."""
    copy = tmp_path / 'copy'
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_what_is_missing_shows_at_the_start(copied):
    (copied / 'view00001-shard00002.rows').unlink()
    with pytest.raises(
        TeacherError, match=r'lacks 1 of its shards, the first of them shard 2 of view 1: run composer-kd re'
    ):
        train(distillation(RecordedTeacher(copied)))
    train(distillation(RecordedTeacher(copied)), max_duration='1ep')  # does not ask for view 1
    path = copied / 'view00000-shard00003.rows'
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(TeacherError, match=r'shard00003.rows is damaged: .* run composer-kd record again'):
        train(distillation(RecordedTeacher(copied)), max_duration='1ep')
    for path in copied.glob('view*'):
        path.unlink()
    with pytest.raises(TeacherError, match='has 0 views of the training data: run composer-kd record'):
        train(distillation(RecordedTeacher(copied)))


def test_a_sample_that_is_missing_is_named(copied):
    record = Record.open(copied)
    writer = Record.create(copied, record.manifest)
    counts, rows = (x.copy() for x in record.shard(1, 0))
    counts[2] = 0
    writer.write(1, 0, counts, np.delete(rows, 2, axis=0))
    with pytest.raises(TeacherError, match='lacks 1 of 70 samples in view 1, and this run is to ask for some of them'):
        train(distillation(RecordedTeacher(copied)))
    with (
        pytest.warns(UserWarning, match='lacks samples in 1 of its shards'),
        pytest.raises(TeacherError, match='lacks sample 2 in view 1: composer-kd record adds it'),
    ):
        train(distillation(RecordedTeacher(copied), probability=0.999))


REPLAYED = {
    'early stop': [EarlyStopDistillation('0.34dur')],
    'late start': [EarlyStopDistillation('1dur', start='1ep')],
    'interval': [],
    'sampling': [TeacherSampling(1)],
    'drop_last': [],
}


@pytest.mark.parametrize('case', REPLAYED)
def test_the_run_that_recorded_can_be_replayed(case, tmp_path, capsys):
    """Whatever it did not ask for, the very same run will not ask for either."""
    number = 3 if case == 'sampling' else 1
    options = {'interval': 4} if case == 'interval' else {}
    data = {'views': 1, 'drop_last': True} if case == 'drop_last' else {'views': None}
    end = {'max_duration': '1ep' if case == 'drop_last' else '4ep'}

    def weights(*teachers, **more):
        run = distillation(list(teachers), **more, **options)
        return train(run, *REPLAYED[case], data=loader(**data), **end)

    teachers = [NetworkTeacher(convnet(seed), name=str(seed)) for seed in range(number)]
    online = weights(*teachers, record=tmp_path)
    said = capsys.readouterr().out
    lacks = case != 'late start'
    assert (f'the record {tmp_path}' in said and 'composer-kd record adds them' in said) == lacks
    folders = sorted(path.parent for path in tmp_path.rglob('manifest.json'))
    with pytest.warns(UserWarning, match='composer-kd record adds them') if lacks else contextlib.nullcontext():
        assert same(weights(*map(RecordedTeacher, folders)), online)


def test_gaps_that_a_longer_run_is_sure_to_ask_for(tmp_path):
    data = {'views': 1, 'drop_last': True}
    train(distillation(record=tmp_path), data=loader(**data), max_duration='1ep')
    with pytest.raises(TeacherError, match='lacks 6 of 70 samples in view 0, and this run is to ask for some of them'):
        train(distillation(RecordedTeacher(tmp_path)), data=loader(**data), max_duration='2ep')


def test_a_view_that_comes_after_the_stop_is_not_asked_for(folder):
    stop = EarlyStopDistillation('2ep')
    assert same(
        train(distillation(RecordedTeacher(folder)), stop, data=loader(views=None)),
        train(distillation(), stop, data=loader(views=None)),
    )
    with pytest.raises(TeacherError, match='has 2 views, this run makes new ones'):
        train(distillation(RecordedTeacher(folder)), EarlyStopDistillation('11ba'), data=loader(views=None))


@pytest.mark.parametrize('batch', [3, 4])
def test_journals_are_sealed_at_the_stop_and_after_it(batch, tmp_path):
    """Whether the run was killed before or after the teachers were released: once it is resumed, no journal is left."""

    class Killed(Exception):
        pass

    class Kill(Callback):
        def batch_checkpoint(self, state, logger):
            if state.timestamp.batch == batch:
                raise Killed

    path, stop, end = tmp_path / 'r', EarlyStopDistillation('3ba'), {'max_duration': '8ba'}
    options = {'save_folder': str(tmp_path / 'run'), 'save_interval': '1ba', 'save_num_checkpoints_to_keep': -1}
    with pytest.raises(Killed):
        train(distillation(record=path), stop, callbacks=[Kill()], **options, **end)
    assert path.joinpath('journal-0.bin').exists() == (batch == 3), 'sealed at the stop'
    saved = str(tmp_path / 'run' / f'ep0-ba{batch}-rank0.pt')
    if not Path(saved).exists():
        saved = str(max((tmp_path / 'run').glob('ep0-ba*.pt')))
    train(distillation(record=path), stop, load_path=saved, model=convnet(5), **end)
    assert not list(path.glob('journal*')) and not (path / '.lock').exists()
    assert Record.open(path).size()[1] == 3 * BATCH


class Loud(torch.nn.Module):
    """Says more than float16 can hold, or what is not a number."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, images):
        return torch.full((len(images), 10), self.value)


@pytest.mark.parametrize('options', [{'record_top': 3}, {'record_dtype': 'float16'}])
def test_logits_that_float16_cannot_hold(options, tmp_path):
    with pytest.raises(TeacherError, match=r"at batch 0 that float16 cannot hold: record with record_dtype='float32'"):
        train(distillation(NetworkTeacher(Loud(1e5)), record=tmp_path / 'loud', **options))
    for value in (torch.nan, torch.inf):
        with pytest.raises(TeacherError, match='gave NaN or infinity at batch 0'):
            train(distillation(NetworkTeacher(Loud(value)), record=tmp_path / str(value), **options))


OTHER_OPTIONS = {
    'input_size': ({'input_size': 14}, r'teacher options: \{\} there, \{"input_size": \[14, 14\]\} here'),
    'dtype': ({'dtype': 'float64'}, r'teacher options: .*float64'),
    'precision': ({'precision': 'fp32'}, r'teacher options: .*precision'),
    'normalization': (
        {'normalization': ([0.5], [9.0]), 'student_normalization': ([0.2], [0.3])},
        'teacher options: .*normalization',
    ),
}


@pytest.mark.parametrize('case', OTHER_OPTIONS)
def test_a_teacher_with_other_options_is_another(case, folder, tmp_path):
    options, message = OTHER_OPTIONS[case]
    teacher = NetworkTeacher(convnet(7, width=3), **options)
    with pytest.raises(TeacherError, match=message):
        train(distillation(teacher, record=folder))
    train(distillation(), max_duration='1ba', save_folder=str(tmp_path), save_interval='1ba')
    with pytest.raises(TeacherError, match=f'other options for teacher number 0.*{case}'):
        train(distillation(teacher), load_path=str(tmp_path / 'latest-rank0.pt'))


def test_a_folder_that_is_no_record(tmp_path):
    (tmp_path / 'thesis.tex').touch()
    with pytest.raises(TeacherError, match='is there, but is no record; choose another path'):
        train(distillation(record=tmp_path))
    with pytest.raises(TeacherError, match='is there, but is no record; choose another path'):
        train(distillation(record=tmp_path / 'thesis.tex'))
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']


def test_each_sample_hears_one_of_two_records_of_other_temperatures(tmp_path):
    for index, temperature in enumerate((3.0, 2.0)):
        run = KnowledgeDistillation(
            network_teacher(), temperature=temperature, record=tmp_path / str(index), record_top=3
        )
        train(run, max_duration='1ep')
    weights = [
        train(
            distillation([RecordedTeacher(tmp_path / str(index)) for index in (0, 1)]),
            TeacherSampling(1, per=per),
            max_duration='1ep',
        )
        for per in ('batch', 'sample')
    ]
    assert same(*weights), 'it is one and the same teacher'


def test_who_cannot_be_taught_or_recorded(folder, tmp_path):
    with pytest.raises(TeacherError, match='there is no record; composer-kd record makes one'):
        RecordedTeacher(tmp_path)
    with pytest.raises(TeacherError, match='has 10 classes, the student 7'):
        RecordedTeacher(folder).check(small_convnet(7, width=2))
    with pytest.raises(TeacherError, match='11 logits cannot be recorded of 10 classes'):
        train(distillation(record=tmp_path, record_top=11))
    nameless = convnet(1)
    nameless.num_classes = None
    with pytest.raises(TeacherError, match='needs to know the number of classes'):
        train(distillation(record=tmp_path), model=nameless)
    with pytest.raises(ValueError, match='speaks from a record already'):
        distillation(RecordedTeacher(folder), record=tmp_path)
    teacher = RecordedTeacher(folder)
    teacher.release()
    assert teacher.manifest()['source'] == str(folder)
    with pytest.raises(TeacherError, match='was released'):
        teacher.signal(None, torch.zeros(1, 2, dtype=torch.int64))


def test_a_loader_that_does_not_know_its_samples(folder):
    plain = torch.utils.data.DataLoader([(torch.zeros(1, 28, 28), 0)] * 4, batch_size=2)
    for algorithm in (distillation(RecordedTeacher(folder)), distillation(record=folder)):
        with pytest.raises(TeacherError, match=r'set split=train, or let composer_kd\.data\.data_spec'):
            train(algorithm, data=plain)


def test_data_of_ones_own_in_which_nothing_is_random(tmp_path):
    images = torch.utils.data.TensorDataset(torch.rand(8, 1, 28, 28), torch.arange(8))
    with pytest.warns(UserWarning, match='nothing seems to be drawn at random .* views=1, if that is so'):
        train(distillation(record=tmp_path / 'r'), data=data_spec(images, batch_size=4, train=True))
    assert Record.open(tmp_path / 'r').views() == [0, 1, 2]
    once = distillation(record=tmp_path / 'once')
    train(once, data=data_spec(images, batch_size=4, train=True, views=1))
    assert Record.open(tmp_path / 'once').views() == [0] and once.pool.forwards == 2


def test_a_run_is_resumed_with_its_own_record(folder, tmp_path):
    options = {'save_folder': str(tmp_path / 'run'), 'save_interval': '1ba'}
    train(distillation(RecordedTeacher(folder)), max_duration='2ba', **options)
    train(distillation(NetworkTeacher(convnet(8)), record=tmp_path / 'other'), max_duration='1ep')
    for other in (RecordedTeacher(tmp_path / 'other'), network_teacher()):
        with pytest.raises(TeacherError, match='had another teacher number 0'):
            train(distillation(other), load_path=str(tmp_path / 'run' / 'latest-rank0.pt'))


# Text: rows are of labelled positions, whose logits are not computed before they are recorded.


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    """Builds training data of short texts; their lengths differ."""
    folder = tmp_path_factory.mktemp('text')
    words = ['cat', 'dog', 'bird', 'fish', 'cow']
    lines = [' '.join([*words[number % 5 :], *words[: number % 7]]) for number in range(40)]
    (folder / 'text.txt').write_text('\n'.join(lines))
    vocabulary = make_vocabulary(folder / 'vocab.txt')
    return lambda **options: builders.text(
        'train',
        8,
        path=folder / 'text.txt',
        tokenizer=vocabulary,
        max_length=32,
        masking_probability=0.3,
        **{'views': 1, **options},
    )


def bert(tokenizer, seed, chunk_size=4):
    torch.manual_seed(seed)
    config = {
        **{'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 32},
        **{'max_position_embeddings': 32, 'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0},
    }
    return masked_lm(config=config, tokenizer=tokenizer, chunk_size=chunk_size)


def train_on_text(text, *algorithms, chunk_size=4, **options):
    spec = text(drop_last=False)
    model = bert(spec.dataloader.dataset.tokenizer, 1, chunk_size)
    return train(*algorithms, data=spec, model=model, max_duration='2ep', **options)


def text_teacher(text, seed=2):
    return NetworkTeacher(bert(text().dataloader.dataset.tokenizer, seed))


@pytest.mark.parametrize('chunk_size', [4, None])
@pytest.mark.parametrize('microbatch', [8, 3])
def test_masked_text(text, tmp_path, chunk_size, microbatch):
    options = {'chunk_size': chunk_size, 'device_train_microbatch_size': microbatch}
    teacher = text_teacher(text)
    words = teacher.network.num_classes
    online = train_on_text(text, distillation(teacher), **options)
    recorded = train_on_text(text, distillation(teacher, record=tmp_path, record_top=words), **options)
    replayed = train_on_text(text, distillation(RecordedTeacher(tmp_path)), **options)
    assert same(recorded, replayed)
    for key in online:
        torch.testing.assert_close(recorded[key], online[key], rtol=0, atol=2e-6)
    record = Record.open(tmp_path)
    assert record.manifest['k'] is None and record.size()[1] == 40


class Words(torch.nn.Module):
    """Says something at each position that is a function of the words around it."""

    def __init__(self, words):
        super().__init__()
        self.words = words

    def forward(self, input_ids, attention_mask):
        around = input_ids + 0.1 * input_ids.roll(1, 1) + 0.01 * attention_mask.cumsum(1)
        return {'logits': around[..., None] * torch.linspace(-1, 1, self.words)}


@pytest.mark.parametrize('top', [3, None])
def test_some_samples_of_a_batch_of_text(text, tmp_path, top):
    """Rows that are recorded, and rows that are new, make one signal in the order of the positions."""
    spec = text(drop_last=False)
    student = bert(spec.dataloader.dataset.tokenizer, 1)
    teacher = NetworkTeacher(Words(student.num_classes))
    state = SimpleNamespace(
        **{'device': DeviceCPU(), 'precision': Precision.FP32, 'precision_config': None},
        **{'dataloader': spec.dataloader, 'max_duration': 2, 'timestamp': 0},
    )
    recording = RecordingTeacher(teacher, tmp_path, top=top or student.num_classes)
    recording.check(student)
    recording.prepare(state)

    def ask(samples):
        ((batch, keys),) = spec.dataloader.batches([[(sample, 0) for sample in samples]])
        (part,) = spec.split_batch(batch, len(samples))
        return recording.signal(part, keys), teacher.signal(part)

    forwards = teacher.forwards
    for samples in ([3, 20, 21], [39, 3, 17, 21, 0, 20]):
        said, whole = ask(samples)
        expected = recording.format.decode(recording.format.encode(whole))
        for name in ('values', 'indices') if top else ('T',):
            assert torch.equal(getattr(said, name), getattr(expected, name))
        assert said.shape == whole.shape
        recording.flush()
        recording.seal()
    assert teacher.forwards == forwards + 4
    assert Record.open(tmp_path).size()[1] == 6
    assert recording._said == []

    ((batch, keys),) = spec.dataloader.batches([[(sample, 0) for sample in samples]])
    with pytest.raises(TeacherError, match='those of the labelled positions: take one that scores these alone'):
        recording.signal(batch, keys)  # as the loader gave it, without positions
    (part,) = spec.split_batch(batch, len(samples))
    for positions in (part['positions'][1:], part['positions'][:0]):
        with pytest.raises(TeacherError, match=r'labelled positions the record .* it is of other masks'):
            recording.signal({**part, 'positions': positions}, keys)
    state.timestamp = 2
    recording.seal()


TWO_RANKS = """
import sys
sys.path.insert(0, {tests!r})
import hashlib, torch
torch.set_num_threads(1)
from composer.utils import dist
from teachers.test_recorded import *

def digest(weights):
    return hashlib.sha256(b''.join(weights[key].numpy().tobytes() for key in sorted(weights))).hexdigest()

spec = lambda: loader(subset=80)
online, first = distillation(), distillation(record='record')
print(digest(train(online, data=spec())))
print(digest(train(first, data=spec())))
print(digest(train(distillation(RecordedTeacher('record')), data=spec())))
folder = {{'save_folder': 'run', 'save_interval': '1ba', 'save_num_checkpoints_to_keep': -1}}
train(distillation(RecordedTeacher('record')), data=spec(), max_duration='8ba', **folder)
resumed = {{'model': convnet(5), 'load_path': 'run/ep1-ba7-rank{{rank}}.pt'}}
print(digest(train(distillation(RecordedTeacher('record')), data=spec(), **resumed)))
print(first.pool.forwards)
try:
    train(distillation(RecordedTeacher('record')), data=loader(subset=80, view_seed=dist.get_global_rank()))
except TeacherError as error:
    print(error)
"""


def test_two_ranks(tmp_path):
    said = [out.splitlines() for out in on_two_ranks(TWO_RANKS.format(tests=str(Path(__file__).parents[1])), tmp_path)]
    for online, first, recorded, resumed, forwards, error in said:
        assert online == first == recorded == resumed
        assert forwards == '10'
        assert 'other training data: view_seed: 0 there, 1 here' in error  # which rank 1 found
    assert not Record.open(tmp_path / 'record').missing(2)
