import hashlib
import json
import pickle
import random
import timeit
from pathlib import Path

import numpy as np
import pytest
import torch
from composer import Callback, Trainer
from composer.algorithms import AugMix, ColOut, RandAugment
from composer.utils import dist
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, TensorDataset
from torchvision import transforms
from torchvision.datasets import VisionDataset
from torchvision.transforms import v2

from composer_kd import data, models
from composer_kd.data import data_spec
from composer_kd.data.views import BatchRandom, ReplayableViews, ViewsLoader, as_keys
from helpers import on_two_ranks
from text_runs import write_shards, write_vocabulary

pytestmark = pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')

SAMPLES = 40
WORDS = st.integers(0, 2**63 - 1)


class Pictures(VisionDataset):
    """Pictures of noise, as PIL images or as tensors; the label is the picture's number."""

    def __init__(self, transform=None, as_pil=True, samples=SAMPLES):
        super().__init__('nowhere', transform=transform)
        self.pixels = np.random.default_rng(0).integers(0, 256, (samples, 16, 16, 3), dtype=np.uint8)
        self.as_pil = as_pil

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        picture = self.pixels[index]
        picture = Image.fromarray(picture) if self.as_pil else torch.from_numpy(picture).permute(2, 0, 1)
        return picture if self.transform is None else self.transform(picture), index


class Marks(Dataset):
    """The sample's number, and one draw from each of the three generators."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.random(), torch.rand(())], dtype=torch.float64)


def noise(picture):
    """An augmentation of one's own, which draws from all three generators."""
    pixels = np.asarray(picture).astype(np.float64)
    pixels = pixels * random.random() + np.random.normal(size=pixels.shape) + float(torch.rand(()))
    return torch.from_numpy(pixels)


V1 = [transforms.RandomResizedCrop(8), transforms.RandomHorizontalFlip()]
V2 = [v2.RandomResizedCrop(8, antialias=True), v2.RandomHorizontalFlip()]
KINDS = {
    'v1_pil': lambda: Pictures(transforms.Compose([*V1, transforms.ColorJitter(0.5, 0.5), transforms.ToTensor()])),
    'v1_tensor': lambda: Pictures(transforms.Compose([*V1, transforms.RandomErasing(p=0.5)]), as_pil=False),
    'v2_pil': lambda: Pictures(v2.Compose([*V2, v2.TrivialAugmentWide(), v2.PILToTensor()])),
    'v2_tensor': lambda: Pictures(
        v2.Compose([*V2, v2.RandAugment(), v2.ToDtype(torch.float32, scale=True), v2.GaussianNoise()]), as_pil=False
    ),
    'own': lambda: Pictures(noise),
}


def streams():
    """The next numbers of the three generators."""
    return torch.rand(2).tolist(), random.random(), np.random.random(2).tolist()


def loader(dataset, batch_size=8, train=True, num_workers=0, **options):
    # Torch waits seconds for workers that live on, if they are collected with the cycle that a DataSpec is.
    options = {'persistent_workers': False, **options}
    return data_spec(dataset, batch_size=batch_size, train=train, num_workers=num_workers, **options).dataloader


def seen(batches, epoch=0):
    """What a loader gives in an epoch, by key."""
    batches.sampler.set_epoch(epoch)
    return {
        tuple(key): row for batch in batches for key, row in zip(batches.keys.tolist(), first_of(batch), strict=True)
    }


def first_of(batch):
    return batch[0] if isinstance(batch, (list, tuple)) else batch


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def chi_square(counts):
    """Of counts that should all be equal."""
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


# Random numbers for whole batches ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=9),
    st.integers(0, 5),
    st.integers(1, 2**32),
)
def test_a_number_knows_nothing_of_the_rest_of_the_batch(seed, keys, draw, below):
    whole = BatchRandom(seed, as_keys(keys)).integers(draw, below)
    assert whole.dtype == torch.int64
    assert ((whole >= 0) & (whole < below)).all()
    alone = [BatchRandom(seed, as_keys([key])).integers(draw, below) for key in keys]
    assert torch.equal(whole, torch.cat(alone))


def test_numbers_are_those_of_earlier_versions():
    """What a teacher said was stored for views that these numbers make."""
    numbers = BatchRandom(7, as_keys([(0, 0), (1, 0), (0, 1), (2**40, 300)]))
    assert [f'{number:016x}' for number in numbers.bits(0)] == [
        '6a1a1a8ab4513d14',
        '2e132b7270a06067',
        'ba757b1a3debec67',
        'e6c19db345360fc9',
    ]
    assert numbers.integers(2, 9).tolist() == [6, 5, 8, 3]


@pytest.mark.parametrize('below', [2, 9])
@pytest.mark.parametrize('seed', [0, 1, 2**63])
def test_numbers_are_uniform_and_independent(seed, below):
    """Of samples, views, seeds and draws that are next to each other, as those of a run are."""
    samples = 40_000
    keys = np.stack([np.arange(samples), np.zeros(samples, dtype=np.int64)], axis=1)
    base = BatchRandom(seed, keys).integers(0, below)
    # Five standard deviations above the mean of chi-square.
    most = lambda cells: cells - 1 + 5 * (2 * (cells - 1)) ** 0.5  # noqa: E731
    assert chi_square(torch.bincount(base, minlength=below).double()) < most(below)
    others = {
        'draw': BatchRandom(seed, keys).integers(1, below),
        'view': BatchRandom(seed, keys + np.array([0, 1])).integers(0, below),
        'sample': BatchRandom(seed, keys + np.array([1, 0])).integers(0, below),
        'diagonal': BatchRandom(seed, keys + np.array([1, 1])).integers(0, below),
        'far': BatchRandom(seed, keys + np.array([2**32, 0])).integers(0, below),
        'swapped': BatchRandom(seed, keys[:, ::-1]).integers(0, below),
        'seed': BatchRandom(seed + 1, keys).integers(0, below),
    }
    for name, other in others.items():
        pairs = torch.bincount(base * below + other, minlength=below**2).double()
        assert chi_square(pairs) < most(below**2), name


def test_every_bit_is_even():
    bits = BatchRandom(0, as_keys([*range(40_000)])).bits(0)
    ones = np.array([(bits >> np.uint64(place) & np.uint64(1)).mean() for place in range(64)])
    assert abs(ones - 0.5).max() < 4.5 * 0.5 / 200
    assert len(set(bits.tolist())) == 40_000


# Any data set that draws at random -----------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_a_view_is_a_function_of_seed_sample_and_view(kind):
    views, before = ReplayableViews(KINDS[kind](), seed=5), streams()
    first, other_sample = (views[index, 2][0] for index in (3, 4))
    streams()
    random.seed(8)
    backwards = ReplayableViews(KINDS[kind](), seed=5).__getitems__([(4, 2), (3, 1), (3, 2)])
    assert torch.equal(backwards[0][0], other_sample)
    assert torch.equal(backwards[2][0], first)
    assert not torch.equal(backwards[1][0], first)
    assert not torch.equal(ReplayableViews(KINDS[kind](), seed=6)[3, 2][0], first)
    assert torch.equal(pickle.loads(pickle.dumps(views))[3, 2][0], first)
    assert torch.equal(views[3][0], views[3, 0][0])
    assert before != streams()


@pytest.mark.parametrize('kind', KINDS)
def test_views_from_workers_are_those_made_here(kind):
    here, there = (loader(KINDS[kind](), num_workers=number) for number in (0, 2))
    first = seen(here)
    assert same(first, seen(there))
    second = seen(there, epoch=1)
    assert same(second, seen(here, epoch=1))
    assert len(first) == SAMPLES
    assert not any(torch.equal(first[index, 0], second[index, 1]) for index in range(SAMPLES))


def test_a_plain_index_means_view_0():
    views = ReplayableViews(Marks(), seed=5)
    samples = views.__getitems__([(3, 0), (1, 0)])
    assert all(torch.equal(one, other) for one, other in zip(samples, views.__getitems__([3, 1]), strict=True))
    assert torch.equal(samples[1], views[1])


def test_the_runs_own_streams_know_nothing_of_it():
    def numbers(use):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        use()
        return streams()

    views = ReplayableViews(Marks())
    training = loader(Marks())
    expected = numbers(lambda: None)
    assert numbers(lambda: views.__getitems__([(1, 2), (3, 4)])) == expected
    assert numbers(lambda: views[7]) == expected
    assert numbers(training.identity) == expected
    assert numbers(lambda: list(training.batches([[(1, 2)], [(3, 4)]]))) == expected
    # A loader of torch's draws once from torch's stream when it is started.
    assert numbers(lambda: list(training)) == numbers(lambda: torch.empty((), dtype=torch.int64).random_())

    class Broken(Marks):
        def __getitem__(self, index):
            raise OSError(f'no sample {index}')

    def fails():
        with pytest.raises(OSError, match='no sample 3'):
            ReplayableViews(Broken())[3]

    assert numbers(fails) == expected


def test_draws_of_a_data_set_that_makes_whole_batches_are_kept_apart():
    class AllAtOnce(Marks):
        def __getitems__(self, indices):
            raise AssertionError('asked for several samples at once')

    batches = loader(AllAtOnce(), batch_size=5)
    assert same(seen(batches), seen(loader(Marks())))


def test_a_data_set_that_says_it_has_no_views():
    class Plain(Marks):
        has_views = False

        def __getitem__(self, index):
            return torch.tensor([index])

    class Silent(Plain):
        has_views = True

    assert loader(Plain()).views == loader(Plain(), views=3).views == 1
    assert (loader(Silent()).views, loader(Silent(), views=3).views) == (None, 3)
    assert loader(Silent()).seems_fixed()
    assert not any(each.seems_fixed() for each in (loader(Plain()), loader(Silent(), views=3), loader(Marks())))


def test_attributes_are_those_of_the_wrapped():
    pictures = Pictures(transforms.ToTensor())
    views = ReplayableViews(pictures)
    assert isinstance(views, VisionDataset)
    assert len(views) == SAMPLES
    assert views.transform is pictures.transform
    assert views.transforms is pictures.transforms
    assert views.pixels is pictures.pixels
    flip = transforms.RandomHorizontalFlip()
    views.transform = flip
    assert pictures.transform is flip
    assert vars(views).keys() == {'dataset', 'seed'}
    for name in ('transform', '__array__', 'nothing'):
        assert not hasattr(ReplayableViews(Marks()), name)
    assert repr(ReplayableViews([1, 2], seed=3)) == 'ReplayableViews([1, 2], seed=3)'


def test_is_cheap():
    """Well under 100 microseconds a sample."""
    plain, views = Marks(), ReplayableViews(Marks())
    keys = [(index % SAMPLES, 1) for index in range(256)]
    wrapped = min(timeit.repeat(lambda: views.__getitems__(keys), number=1, repeat=7))
    bare = min(timeit.repeat(lambda: [plain[index] for index, _ in keys], number=1, repeat=7))
    assert (wrapped - bare) / len(keys) < 60e-6


# Keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize(('drop_last', 'sizes'), [(True, [7] * 5), (False, [7] * 5 + [5])])
def test_keys_are_those_of_the_batch(num_workers, drop_last, sizes):
    """Epoch after epoch, with workers that live on, and after a loop that stopped early."""
    options = {'num_workers': num_workers, 'persistent_workers': num_workers > 0, 'drop_last': drop_last}
    batches = loader(Marks(), batch_size=7, views=3, view_seed=9, **options)
    reference = ReplayableViews(Marks(), seed=9)
    assert isinstance(batches, ViewsLoader)
    assert (batches.keys, batches.views, batches.samples, len(batches)) == (None, 3, SAMPLES, len(sizes))
    orders = []
    for epoch in (0, 1, 4):
        batches.sampler.set_epoch(epoch)
        for _ in batches:
            break  # as Composer does when it resumes
        found = []
        for batch in batches:
            assert batches.keys.dtype == torch.int64
            assert batches.keys[:, 0].tolist() == batch[:, 0].tolist()
            assert set(batches.keys[:, 1].tolist()) == {epoch % 3}
            assert torch.equal(batch, torch.stack(reference.__getitems__([*map(tuple, batches.keys.tolist())])))
            found.append(batches.keys)
        assert [len(keys) for keys in found] == sizes
        orders.append(torch.cat(found)[:, 0].tolist())
    assert len({tuple(order) for order in orders}) == 3
    assert all(len(set(order)) == len(order) for order in orders)
    if num_workers:
        batches._iterator._shutdown_workers()  # as Composer does when a run ends


def test_two_loops_over_one_loader_do_not_meet():
    batches = loader(Marks(), batch_size=10)
    first, second = iter(batches), iter(batches)
    for ahead in (first, first, second, first, second):
        batch = next(ahead)
        assert batches.keys[:, 0].tolist() == batch[:, 0].tolist()


@pytest.mark.parametrize(('views', 'of_epochs'), [(None, [0, 1, 2, 3]), (1, [0, 0, 0, 0]), (3, [0, 1, 2, 0])])
def test_views_come_again(views, of_epochs):
    batches = loader(Marks(), views=views)
    assert batches.views == views
    epochs = [seen(batches, epoch) for epoch in range(4)]
    assert [{view for _, view in epoch} for epoch in epochs] == [{view} for view in of_epochs]
    reference = ReplayableViews(Marks())
    for epoch in epochs:
        assert all(torch.equal(row, reference[key]) for key, row in epoch.items())


def test_ranks_have_their_own_keys(monkeypatch):
    monkeypatch.setattr(dist, 'get_world_size', lambda: 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(dist, 'get_global_rank', lambda rank=rank: rank)
        shares.append(seen(loader(Marks(), batch_size=8, drop_last=False), epoch=2))
    assert [len(share) for share in shares] == [10] * 4
    everything = {key: row for share in shares for key, row in share.items()}
    monkeypatch.setattr(dist, 'get_world_size', lambda: 1)
    monkeypatch.setattr(dist, 'get_global_rank', lambda: 0)
    assert same(everything, seen(loader(Marks()), epoch=2))


@pytest.mark.parametrize('num_workers', [0, 2])
def test_batches_of_any_samples(num_workers):
    batches = loader(Marks(), batch_size=8, num_workers=num_workers)
    trained = seen(batches, epoch=6)
    asked = [[(9, 6), (3, 6), (9, 5)], [(3, 6)], [(0, 0)] * 4]
    given = list(batches.batches(torch.tensor(keys).tolist() for keys in asked))
    assert [keys.tolist() for _, keys in given] == [[list(key) for key in keys] for keys in asked]
    assert torch.equal(given[0][0][0], trained[9, 6])
    assert torch.equal(given[0][0][1], given[1][0][0])
    assert torch.equal(given[1][0][0], trained[3, 6])
    assert not torch.equal(given[0][0][0], given[0][0][2])
    assert given[2][0][:, 0].tolist() == [0] * 4
    assert list(batches.batches([])) == []


@pytest.mark.parametrize(
    ('build', 'views'),
    [
        (lambda **options: data.cifar10('train', 8, synthetic=True, subset=24, **options), 2),
        (lambda **options: data.cifar10('train', 8, synthetic=True, subset=24, augment=False, **options), 1),
        (lambda **options: data.fashion_mnist('train', 8, synthetic=True, subset=24, **options), 1),
        (lambda **options: data.imagenet('train', 8, synthetic=True, crop_size=8, num_workers=0, **options), 1),
    ],
)
def test_images_in_memory(build, views):
    batches = build(views=2).dataloader
    assert batches.views == views
    if len(batches) > 3:
        return
    epochs = [seen(batches, epoch) for epoch in range(3)]
    bare = [{index: image for (index, _), image in epoch.items()} for epoch in epochs]
    assert same(bare[0], bare[2])
    assert same(bare[0], bare[1]) == (views == 1)
    other = seen(build(views=2, view_seed=1).dataloader)
    assert same(epochs[0], other) == (views == 1)


@pytest.fixture
def world(tmp_path):
    write_vocabulary(tmp_path)
    write_shards(tmp_path / 'text', [9, 14, 6, 11])
    return tmp_path


def text(world, split='train', batch_size=8, **options):
    options = {'path': world / 'text', 'tokenizer': str(world / 'vocab.txt'), 'max_length': 16, **options}
    return data.text(split, batch_size, **options)


def test_masks(world):
    """Samples of text have their masks in turn, and keys tell which."""
    batches = text(world, views=2).dataloader
    assert (batches.views, batches.samples) == (2, 40)
    epochs = []
    for epoch in range(3):
        batches.sampler.set_epoch(epoch)
        rows = {}
        for batch in batches:
            assert set(batches.keys[:, 1].tolist()) == {epoch % 2}
            for index, labels in zip(batches.keys[:, 0].tolist(), batch['labels'].tolist(), strict=True):
                rows[index] = [label for label in labels if label != -100], labels[: labels.index(-100) + 1]
        epochs.append(rows)
    assert epochs[0] == epochs[2] != epochs[1]
    ((again, _),) = batches.batches([[[3, 0], [4, 0]]])
    assert [[label for label in row if label != -100] for row in again['labels'].tolist()] == [
        epochs[0][index][0] for index in (3, 4)
    ]


def test_labelled_texts(world):
    (world / 'texts.jsonl').write_text(
        ''.join(json.dumps({'sentence': f'w{index} w7', 'label': index % 2}) + '\n' for index in range(20))
    )
    spec = data.text_classification('train', 4, file=world / 'texts.jsonl', tokenizer=str(world / 'vocab.txt'))
    batches = spec.dataloader
    assert (batches.views, batches.samples) == (1, 20)
    words = batches.dataset.tokenizer.convert_tokens_to_ids([f'w{index}' for index in range(20)])
    batches.sampler.set_epoch(3)
    for batch in batches:
        assert [words.index(word) for word in batch['input_ids'][:, 1].tolist()] == batches.keys[:, 0].tolist()
        assert (batches.keys[:, 1] == 0).all()
    assert batches.identity().keys() == {'samples', 'max_length', 'tokenizer', 'content'}


# Runs ----------------------------------------------------------------------------------------------------------------


class Watch(Callback):
    """Keeps what the run is given, and the state of NumPy's generator, from which the run itself does not draw."""

    def __init__(self):
        self.keys, self.batches, self.states = [], [], []

    def before_train_batch(self, state, logger):
        self.keys.append(state.dataloader.keys)
        self.batches.append(state.batch)
        self.states.append(np.random.get_state()[1].tolist())


def fit(max_duration, algorithms=None, **options):
    torch.manual_seed(0)
    watch = Watch()
    model = models.small_convnet(num_classes=SAMPLES, in_channels=3, width=2)
    steps = [transforms.RandomResizedCrop(8), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    loading = {'num_workers': 0, **options.pop('loading', {})}
    trainer = Trainer(
        model=model,
        train_dataloader=data_spec(Pictures(transforms.Compose(steps)), batch_size=8, train=True, **loading),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        max_duration=max_duration,
        algorithms=algorithms,
        callbacks=watch,
        device='cpu',
        seed=3,
        progress_bar=False,
        **options,
    )
    trainer.fit()
    trainer.close()
    return trainer, watch


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('stop', ['3ba', '1ep', '7ba'])
def test_a_resumed_run_sees_what_it_would_have_seen(tmp_path, num_workers, stop):
    loading = {'num_workers': num_workers, 'views': 2}
    straight, expected = fit('12ba', loading=loading)
    fit(stop, loading=loading, save_folder=str(tmp_path), save_filename='stop.pt', save_interval=stop)
    resumed, found = fit('12ba', loading=loading, load_path=str(tmp_path / 'stop.pt'))
    assert len(expected.keys) == 12
    stop = {'3ba': 3, '1ep': 5, '7ba': 7}[stop]
    assert all(torch.equal(*keys) for keys in zip(found.keys, expected.keys[stop:], strict=True))
    for (images, labels), (images_then, labels_then) in zip(found.batches, expected.batches[stop:], strict=True):
        assert torch.equal(images, images_then)
        assert torch.equal(labels, labels_then)
    assert all(torch.equal(keys[:, 0], labels) for keys, (_, labels) in zip(found.keys, found.batches, strict=True))
    weights = [run.state.model.state_dict() for run in (straight, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")  # ColOut's, of Pillow
@pytest.mark.parametrize(
    ('algorithm', 'name'),
    [
        (lambda: RandAugment(severity=9), 'RandAugmentTransform'),
        (lambda: AugMix(severity=3), 'AugmentAndMixTransform'),
        (lambda: ColOut(batch=False), 'ColOutTransform'),
    ],
    ids=['RandAugment', 'AugMix', 'ColOut'],
)
def test_composers_algorithms_add_their_transforms(algorithm, name):
    run, watch = fit('6ba', algorithm())
    bare, _ = fit('6ba')
    batches, plain_batches = run.state.train_dataloader, bare.state.train_dataloader
    steps = [type(step).__name__ for step in batches.dataset.dataset.transform.transforms]
    assert sorted(steps) == sorted(['RandomResizedCrop', 'RandomHorizontalFlip', 'ToTensor', name])
    for (images, _), keys in zip(watch.batches, watch.keys, strict=True):
        again = torch.stack([batches.dataset[key][0] for key in map(tuple, keys.tolist())])
        assert torch.equal(images, again)
        without = torch.stack([plain_batches.dataset[key][0] for key in map(tuple, keys.tolist())])
        assert images.shape != without.shape or not torch.equal(images, without)
    assert all(state == watch.states[0] for state in watch.states)
    one, other = batches.identity(), plain_batches.identity()
    assert name in one['transform']
    assert one['content'] != other['content']


def test_a_data_set_without_a_transform_takes_none(tmp_path):
    images = TensorDataset(torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64))
    model = models.small_convnet(in_channels=3, width=2)
    trainer = Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        train_dataloader=data_spec(images, batch_size=4, train=True, num_workers=0),
        max_duration='1ba',
        algorithms=RandAugment(),
        progress_bar=False,
    )
    with pytest.raises(AttributeError, match="'TensorDataset' object has no attribute 'transform'"):
        trainer.fit()
    trainer.close()


# What a stored output depends on -------------------------------------------------------------------------------------


def changed(one, other):
    assert one.keys() == other.keys()
    return {name for name in one if one[name] != other[name]}


def test_identity_of_pictures():
    def identity(dataset=None, **options):
        found = loader(KINDS['v1_pil']() if dataset is None else dataset, **options).identity()
        assert json.loads(json.dumps(found)) == found
        return found

    base = identity()
    assert list(base) == ['samples', 'transform', 'view_seed', 'content']
    assert base['samples'] == SAMPLES
    assert base['transform'].startswith('Compose( RandomResizedCrop(size=(8, 8), scale=(0.08, 1.0)')
    assert base == identity(views=3, batch_size=5, shuffle_seed=7, num_workers=2)
    assert changed(base, identity(view_seed=1)) == {'view_seed', 'content'}
    assert changed(base, identity(KINDS['v2_tensor']())) == {'transform', 'content'}
    larger = Pictures(KINDS['v1_pil']().transform, samples=41)
    assert changed(base, identity(larger)) == {'samples', 'content'}
    for index in (0, SAMPLES - 1):
        other = KINDS['v1_pil']()
        other.pixels[index] = 255 - other.pixels[index]
        assert changed(base, identity(other)) == {'content'}
    labels = KINDS['v1_pil']()
    labels.target_transform = len
    assert changed(base, identity(labels)) == {'transform'}
    assert identity(Pictures(noise))['transform'] == '<function noise>'
    assert identity(TensorDataset(torch.zeros(8, 2)))['transform'] == ''


def test_content_is_of_samples_all_over_the_data():
    pictures = Pictures(transforms.ToTensor(), samples=640)
    base = loader(pictures).identity()['content']
    found = []
    for index in range(0, 640, 5):
        pictures.pixels[index] ^= 1
        found.append(loader(pictures).identity()['content'] != base)
        pictures.pixels[index] ^= 1
    assert found == [True, False] * 64


def test_identity_of_images_in_memory():
    def identity(**options):
        return data.cifar10('train', 8, synthetic=True, **{'subset': 24, **options}).dataloader.identity()

    base = identity()
    assert base['transform'] == "<function crop_and_flip>, Normalize('cifar10', peak=255.0)"
    assert changed(base, identity(view_seed=1)) == {'view_seed', 'content'}
    assert changed(base, identity(subset=25)) == {'samples', 'content'}
    still = identity(augment=False)
    assert still.keys() == {'samples', 'transform', 'content'}
    assert still == identity(augment=False, view_seed=1, views=4)


def test_identity_of_masked_text(world):
    def identity(**options):
        return text(world, **options).dataloader.identity()

    base = identity()
    assert list(base)[-1] == 'content'
    assert base == {
        'samples': 40,
        'mask_seed': 0,
        'masking_probability': 0.15,
        'whole_word_masking': False,
        'max_length': 16,
        'tokenizer': base['tokenizer'],
        'content': base['content'],
    }
    assert base == identity(views=3, batch_size=5)
    assert changed(base, identity(mask_seed=1)) == {'mask_seed', 'content'}
    assert changed(base, identity(masking_probability=0.3)) == {'masking_probability', 'content'}
    assert changed(base, identity(max_length=8)) == {'max_length', 'content'}
    assert 'whole_word_masking' in changed(base, identity(whole_word_masking=True))
    (world / 'vocab.txt').write_text((world / 'vocab.txt').read_text() + 'w400\n')
    assert 'tokenizer' in changed(base, identity())
    write_shards(world / 'text', [9, 14, 6, 11], longest=11)
    assert 'content' in changed(base, identity())


RANKS = """
import json, sys
sys.path[:0] = {paths!r}
from test_views import KINDS, digests, loader
for kind in ('v1_pil', 'own'):
    batches = loader(KINDS[kind](), views=2)
    print(json.dumps([digests(batches), batches.identity()]))
"""


def digests(batches):
    return {
        f'{index} {view}': hashlib.sha256(row.numpy().tobytes()).hexdigest()
        for (index, view), row in seen(batches, epoch=3).items()
    }


@pytest.mark.dist
def test_ranks_see_shares_of_the_same_views(tmp_path):
    here = Path(__file__).parent
    said = on_two_ranks(RANKS.format(paths=[str(here), str(here.parent)]), tmp_path)
    for kind, *lines in zip(('v1_pil', 'own'), *(out.splitlines() for out in said), strict=True):
        batches = loader(KINDS[kind](), views=2)
        (first, one), (second, other) = map(json.loads, lines)
        assert len(first) == len(second) == SAMPLES // 2
        assert {**first, **second} == digests(batches)
        assert one == other == batches.identity()


# Options -------------------------------------------------------------------------------------------------------------


def test_options_out_of_range():
    with pytest.raises(ValueError, match=r'^views must be at least 1, or none for new ones in each epoch, not 0$'):
        loader(Marks(), views=0)
    with pytest.raises(ValueError, match=r'^view_seed must be from 0 up to 2\^64, not -1$'):
        loader(Marks(), view_seed=-1)
    with pytest.raises(ValueError, match=r'^view_seed must be from 0 up to 2\^64, not -1$'):
        data.cifar10('train', 8, synthetic=True, view_seed=-1)
    with pytest.raises(ValueError, match=r'^ReplayableViews gives views itself: set its own seed, not view_seed=2$'):
        loader(ReplayableViews(Marks()), view_seed=2)


@pytest.mark.parametrize('option', [{'views': 2}, {'view_seed': 1}])
def test_views_are_for_training(option, tmp_path):
    (name,) = option
    line = f'^{name} is for split=train: what is evaluated on is always the same$'
    with pytest.raises(ValueError, match=line):
        loader(Marks(), train=False, **option)
    for build in (data.cifar10, data.fashion_mnist):
        with pytest.raises(ValueError, match=line):
            build('test', 8, synthetic=True, **option)
    with pytest.raises(ValueError, match=line):
        data.imagenet('val', 8, data_dir=tmp_path, **option)


def test_masks_are_for_training(world):
    with pytest.raises(ValueError, match=r'^views is for split=train'):
        text(world, 'validation', views=2)
    with pytest.raises(ValueError, match=r'^TextInMemory gives views itself: set its own seed'):
        text(world, view_seed=2)


def test_evaluation_is_asked_for_indices():
    class Indices(Marks):
        def __getitem__(self, index):
            assert isinstance(index, int)
            return index

    batches = loader(Indices(), train=False)
    assert type(batches) is torch.utils.data.DataLoader
    assert torch.cat([*batches]).tolist() == [*range(SAMPLES)]


def test_a_builder_is_named_in_recipes_and_data_spec_is_not():
    assert data.data_spec is data_spec
    assert 'data_spec' not in data.__all__


class Shift:
    """Adds a number to the images of a batch."""

    def __init__(self, by):
        self.by = by

    def __call__(self, batch):
        return batch[0] + self.by, batch[1]


class NamedShift(Shift):
    def __repr__(self):
        return f'Shift({self.by})'


def test_what_networks_see_is_part_of_the_identity():
    """Not only what the loader gives: DataSpec changes batches, and microbatches on the device."""

    def identity(**transforms):
        images = torch.arange(80.0).view(20, 4)
        dataset = torch.utils.data.TensorDataset(images, torch.arange(20))
        spec = data_spec(dataset, batch_size=4, train=True, num_workers=0, views=1, **transforms)
        return spec.dataloader.identity()

    plain_ones = identity()
    assert [*plain_ones] == ['samples', 'transform', 'view_seed', 'content']
    seen = identity(batch_transforms=Shift(1), microbatch_transforms=NamedShift(2))
    of_batches = ['transform of batches', 'transform on the device']
    assert [*seen] == ['samples', 'transform', 'view_seed', *of_batches, 'content']
    assert ' at 0x' not in seen['transform of batches'] and seen['transform on the device'] == 'Shift(2)'
    assert seen == identity(batch_transforms=Shift(1), microbatch_transforms=NamedShift(2))
    assert identity(batch_transforms=Shift(2), microbatch_transforms=NamedShift(1))['content'] == seen['content']
    others = [identity(batch_transforms=Shift(by))['content'] for by in (0, 1, 2)]
    assert len({*others, seen['content']}) == 4 and others[0] == plain_ones['content']


def test_a_transform_of_batches_that_draws_leaves_the_run_its_numbers():
    def draw(batch):
        return batch[0] + torch.rand(()) + np.random.rand() + random.random(), batch[1]

    dataset = torch.utils.data.TensorDataset(torch.zeros(8, 1), torch.arange(8))
    spec = data_spec(dataset, batch_size=4, train=True, num_workers=0, microbatch_transforms=draw)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    spec.dataloader.identity()
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[2]
    assert np.array_equal(np.random.get_state()[1], before[1])
