import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets

from composer_kd import data
from composer_kd.data.tensor_images import crop_and_flip
from helpers import unpack_fashion_mnist

KINDS = {'cifar10': ((3, 32, 32), 50_000), 'cifar100': ((3, 32, 32), 50_000), 'fashion_mnist': ((1, 28, 28), 60_000)}


def write_cifar(path, monkeypatch, reader, label_key, names_key):
    """Write CIFAR's files with five images of noise, and let torchvision know their checksums."""
    folder = path / reader.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3 * 32 * 32), dtype=np.uint8)
    labels = [3, 1, 4, 1, 5]

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    checksum = write('some_batch', {'data': pixels, label_key: labels})
    monkeypatch.setattr(reader, 'train_list', [['some_batch', checksum]])
    monkeypatch.setattr(reader, 'test_list', [['some_batch', checksum]])
    names = write('names', {names_key: [str(number) for number in range(10)]})
    monkeypatch.setattr(reader, 'meta', {'filename': 'names', 'key': names_key, 'md5': names})
    return torch.as_tensor(pixels).view(5, 3, 32, 32), torch.tensor(labels)


@pytest.mark.parametrize(
    ('name', 'reader', 'label_key', 'names_key'),
    [
        ('cifar10', datasets.CIFAR10, 'labels', 'label_names'),
        ('cifar100', datasets.CIFAR100, 'fine_labels', 'fine_label_names'),
    ],
)
def test_reads_and_checks_cifar(tmp_path, monkeypatch, name, reader, label_key, names_key):
    pixels, labels = write_cifar(tmp_path, monkeypatch, reader, label_key, names_key)
    build = getattr(data, name)
    for options in ({'split': 'train'}, {'split': 'test'}, {'split': 'train', 'download': True}):
        dataset = build(batch_size=5, data_dir=tmp_path, **options).dataloader.dataset
        assert torch.equal(dataset.images, pixels)
        assert torch.equal(dataset.labels, labels)

    with (tmp_path / reader.base_folder / 'some_batch').open('ab') as file:
        file.write(b'!')
    with pytest.raises(FileNotFoundError, match='or damaged: set download=true'):
        build('train', 5, data_dir=tmp_path)


@pytest.mark.parametrize('name', KINDS)
def test_missing_files_say_what_to_do(tmp_path, name):
    with pytest.raises(FileNotFoundError, match='set download=true to fetch it, or data_dir to the folder') as caught:
        getattr(data, name)('train', 8, data_dir=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', KINDS)
def test_synthetic_has_the_shape_of_the_real(name):
    shape, samples = KINDS[name]
    spec = getattr(data, name)('train', 8, synthetic=True)
    images, labels = next(iter(spec.dataloader))
    assert spec.num_samples == samples
    assert images.shape == (8, *shape)
    assert images.dtype == torch.float32
    assert labels.shape == (8,)
    assert labels.dtype == torch.int64
    assert getattr(data, name)('test', 8, synthetic=True).num_samples == 10_000
    assert getattr(data, name)('train', 8, synthetic=True, subset=40).num_samples == 40
    assert getattr(data, name)('train', 8, synthetic=True, subset=0.5).num_samples == samples / 2


@pytest.mark.parametrize('name', KINDS)
def test_padding_is_black(name):
    build = getattr(data, name)
    plain = build('test', 8, synthetic=True).dataloader.dataset.images
    padded = build('test', 8, synthetic=True, pad=2).dataloader.dataset.images
    assert padded.shape[-1] == plain.shape[-1] + 4
    assert torch.equal(padded[..., 2:-2, 2:-2], plain) and int(padded.sum()) == int(plain.sum())
    with pytest.raises(ValueError, match=f'{name}: pad must be 0 pixels or more, not -1'):
        build('test', 8, synthetic=True, pad=-1)


@pytest.mark.parametrize('name', KINDS)
def test_augments_training_images_alone(name):
    build = getattr(data, name)
    by_default = crop_and_flip if name.startswith('cifar') else None
    assert build('train', 8, synthetic=True).dataloader.dataset.augment is by_default
    assert build('train', 8, synthetic=True, augment=True).dataloader.dataset.augment is crop_and_flip
    assert build('train', 8, synthetic=True, augment=False).dataloader.dataset.augment is None
    assert build('test', 8, synthetic=True).dataloader.dataset.augment is None
    with pytest.raises(ValueError, match=f'{name}: augment is for split=train'):
        build('test', 8, synthetic=True, augment=True)


def test_augmentation_follows_its_own_seed_alone():
    def first_batch(seed, **options):
        torch.manual_seed(seed)
        return next(iter(data.cifar10('train', 8, synthetic=True, **options).dataloader))[0]

    assert torch.equal(first_batch(1), first_batch(2))
    assert not torch.equal(first_batch(1), first_batch(1, view_seed=1))


def test_real_fashion_mnist(tmp_path):
    unpack_fashion_mnist(tmp_path)
    train = data.fashion_mnist('train', 100, data_dir=tmp_path, subset=1000)
    test = data.fashion_mnist('test', 100, data_dir=tmp_path)
    assert (train.num_samples, test.num_samples) == (1000, 10_000)
    reference = datasets.FashionMNIST(str(tmp_path), train=False)
    images, labels = next(iter(test.dataloader))
    assert torch.equal(labels, reference.targets[:100])
    torch.testing.assert_close(images[:, 0], (reference.data[:100] / 255 - 0.2860) / 0.3530)
    assert torch.cat([labels for _, labels in test.dataloader]).bincount().tolist() == [1000] * 10
