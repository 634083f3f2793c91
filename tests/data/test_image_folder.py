import math

import pytest
import torch
from composer import Trainer
from composer.algorithms import ColOut, CutMix, CutOut, MixUp, ProgressiveResizing, RandAugment, SelectiveBackprop
from composer.algorithms.progressive_resizing import resize_batch
from composer.core import Callback
from torchvision import transforms
from torchvision.datasets import ImageFolder

from composer_kd import data, models
from composer_kd.data.normalization import NORMALIZATION, Normalize
from helpers import make_imagefolder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_imagefolder(tmp_path_factory.mktemp('imagenet'))


def test_training_batches_are_random_crops_in_bytes(folder):
    spec = data.imagenet('train', 4, data_dir=folder, crop_size=32, num_workers=0)
    images, labels = next(iter(spec.dataloader))
    whole = ImageFolder(str(folder / 'train'))
    assert all(label == whole[index][1] for label, (index, _) in zip(labels, spec.dataloader.keys, strict=True))
    ((again, _), _), ((other, _), _) = spec.dataloader.batches(
        [(index, view) for index in spec.dataloader.keys[:, 0].tolist()] for view in (0, 1)
    )
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert spec.num_samples == 8


@pytest.mark.parametrize('normalize_on', ['device', 'host'])
@pytest.mark.parametrize(('resize_size', 'resized'), [(None, 37), (48, 48)])
def test_validation_is_torchvisions_own_pipeline(folder, normalize_on, resize_size, resized):
    spec = data.imagenet(
        'val', 3, data_dir=folder, crop_size=32, resize_size=resize_size, normalize_on=normalize_on, num_workers=0
    )
    batches = [spec.microbatch_transforms(spec.batch_transforms(batch)) for batch in spec.dataloader]
    reference = ImageFolder(
        str(folder / 'val'),
        transforms.Compose(
            [
                transforms.Resize(resized),
                transforms.CenterCrop(32),
                transforms.ToTensor(),
                transforms.Normalize(*NORMALIZATION['imagenet']),
            ]
        ),
    )
    images = torch.cat([images for images, _ in batches])
    torch.testing.assert_close(images, torch.stack([image for image, _ in reference]), rtol=1e-5, atol=1e-5)
    assert torch.cat([labels for _, labels in batches]).tolist() == reference.targets


@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
def test_workers_hand_over_the_same_bytes(folder):
    here, there = (
        list(
            data.imagenet(
                'val', 3, data_dir=folder, crop_size=32, num_workers=workers, persistent_workers=False
            ).dataloader
        )
        for workers in (0, 1)
    )
    for (images, labels), (worker_images, worker_labels) in zip(here, there, strict=True):
        assert worker_images.dtype == torch.uint8
        assert torch.equal(images, worker_images)
        assert torch.equal(labels, worker_labels)


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('data_dir', [None, '', 'nowhere'])
def test_missing_data_says_what_to_do(split, data_dir):
    with pytest.raises(FileNotFoundError) as caught:
        data.imagenet(split, 8, data_dir=data_dir)
    message = str(caught.value)
    key = {'train': 'train_data', 'val': 'eval_data'}[split]
    assert message.endswith(
        f'set {key}.data_dir, or IMAGENET_DIR for our recipes, to a folder with train/ and val/ '
        "(torchvision's ImageFolder layout)"
    )
    assert '\n' not in message
    assert ('nowhere' in message) == (data_dir == 'nowhere')


def test_several_folders_are_one_data_set(folder, tmp_path):
    other = make_imagefolder(tmp_path / 'other')
    spec = data.imagenet('train', 4, data_dir=[folder, str(other)], crop_size=32, num_workers=0, shuffle=False)
    labels = [label for _, labels in spec.dataloader for label in labels.tolist()]
    assert labels == 2 * ImageFolder(str(folder / 'train')).targets
    paths = [path for path, _ in spec.dataloader.dataset.samples]
    assert {str(folder), str(other)} == {
        str(next(f for f in (folder, other) if path.startswith(str(f)))) for path in paths
    }

    (other / 'train' / 'class9').mkdir()
    (other / 'train' / 'class9' / 'x.jpeg').touch()
    with pytest.raises(ValueError, match=r'must have the same classes, and one of them alone has class9$'):
        data.imagenet('train', 4, data_dir=[folder, other])
    with pytest.raises(FileNotFoundError, match=r'no folder nowhere/train: set train_data\.data_dir'):
        data.imagenet('train', 4, data_dir=[folder, 'nowhere'])


def test_options_that_do_not_fit(folder):
    with pytest.raises(ValueError, match='resize_size is for split=val'):
        data.imagenet('train', 8, data_dir=folder, resize_size=256)
    with pytest.raises(ValueError, match="unknown normalize_on 'cpu': choose device or host"):
        data.imagenet('train', 8, data_dir=folder, normalize_on='cpu')


@pytest.mark.parametrize(('split', 'samples'), [('train', 1_281_167), ('val', 50_000)])
def test_synthetic_needs_no_files(split, samples):
    spec = data.imagenet(split, 8, synthetic=True, crop_size=40, num_workers=0, channels_last=True)
    batch = next(iter(spec.dataloader))
    assert batch[0].shape == (8, 3, 40, 40)
    assert batch[0].dtype == torch.uint8
    assert 0 <= batch[1].min() <= batch[1].max() < 1000
    assert spec.num_samples == samples
    images, _ = spec.microbatch_transforms(batch)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.dtype == torch.float32


@pytest.mark.parametrize('mode', ['resize', 'crop'])
def test_progressive_resizing_of_bytes_is_that_of_normalized_images(mode):
    pixels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    labels, normalize = torch.zeros(4, dtype=torch.int64), Normalize('imagenet')
    torch.manual_seed(0)
    bytes_first, _ = resize_batch(pixels, labels, 0.5, mode=mode)
    torch.manual_seed(0)
    bytes_last, _ = resize_batch(normalize(pixels), labels, 0.5, mode=mode)
    assert bytes_first.dtype == torch.uint8
    assert bytes_first.shape == (4, 3, 16, 16)
    assert torch.equal(normalize(bytes_first), bytes_last)


class Watch(Callback):
    """Keep what the loader gave, what the network got, and the losses."""

    def __init__(self):
        self.loaded, self.seen, self.losses = [], [], []

    def batch_start(self, state, logger):
        self.loaded.append(state.batch[0])

    def before_loss(self, state, logger):
        self.seen.append(state.batch[0])

    def after_backward(self, state, logger):
        self.losses.append(float(state.loss))


def fit(folder, algorithm, **options):
    torch.manual_seed(0)
    model = models.small_convnet(num_classes=2, in_channels=3, width=2)
    watch = Watch()
    trainer = Trainer(
        model=model,
        train_dataloader=data.imagenet('train', 8, data_dir=folder, crop_size=32, num_workers=0, **options),
        eval_dataloader=data.imagenet('val', 8, data_dir=folder, crop_size=32, num_workers=0, **options),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01),
        max_duration='2ep',
        algorithms=algorithm,
        callbacks=watch,
        device_train_microbatch_size=4,
        seed=0,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return watch


# Composer's, when MixUp's two shares of a label round to less than 1.
@pytest.mark.filterwarnings('ignore:Some targets have less than 1 total probability')
@pytest.mark.parametrize(
    ('algorithm', 'side'),
    [
        (MixUp(alpha=0.2), 32),
        (CutMix(alpha=1.0), 32),
        (CutOut(length=0.5), 32),
        (ColOut(p_row=0.25, p_col=0.25, batch=True), 24),
        (RandAugment(severity=5), 32),
        (ProgressiveResizing(initial_scale=0.5, delay_fraction=1.0, finetune_fraction=0.0), 16),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else '',
)
def test_composers_algorithms_train_on_it(folder, algorithm, side):
    watch = fit(folder, algorithm)
    assert all(images.dtype == torch.uint8 and images.shape[2:] == (side, side) for images in watch.loaded)
    assert all(images.dtype == torch.float32 and images.shape == (4, 3, side, side) for images in watch.seen)
    # Normalized pixels lie between -2.2 and 2.7, in whatever order the bytes were dealt with.
    assert all(images.min() > -2.2 and images.max() < 2.7 and images.std() > 0.1 for images in watch.seen)
    assert len(watch.losses) == 4
    assert all(math.isfinite(loss) for loss in watch.losses)


def test_selective_backprop_needs_images_normalized_on_the_host(folder):
    algorithm = SelectiveBackprop(start=0.0, end=1.0, keep=0.5, interrupt=0)
    watch = fit(folder, algorithm, normalize_on='host')
    assert all(images.dtype == torch.float32 and len(images) == 4 for images in watch.seen)
    with pytest.raises(RuntimeError, match=r'[Bb]yte'):
        fit(folder, SelectiveBackprop(start=0.0, end=1.0, keep=0.5, interrupt=0))
