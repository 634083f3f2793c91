"""ImageNet: one JPEG file per image in one folder per class, as torchvision's ImageFolder reads it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from composer.core import DataSpec
from PIL.Image import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, RandomHorizontalFlip, RandomResizedCrop, Resize
from torchvision.transforms.functional import pil_to_tensor
from typing_extensions import Unpack

from composer_kd.data.loader import LoaderOptions, check_split, check_views, data_spec, shows_loader_options
from composer_kd.data.normalization import Normalize, NormalizeBatch
from composer_kd.data.tensor_images import TensorImages, random_images, whole_batch
from composer_kd.data.views import ReplayableViews

_CLASSES = 1000
_SAMPLES = {'train': 1_281_167, 'val': 50_000}


@shows_loader_options
def imagenet(
    split: Literal['train', 'val'],
    batch_size: int,
    *,
    data_dir: str | Path | Sequence[str | Path] | None = None,
    crop_size: int = 224,
    resize_size: int | None = None,
    normalize_on: Literal['device', 'host'] = 'device',
    channels_last: bool = False,
    synthetic: bool = False,
    views: int | None = None,
    view_seed: int = 0,
    num_workers: int = 8,
    **loader: Unpack[LoaderOptions],
) -> DataSpec:
    """ImageNet, or any folder laid out like it, as batches of RGB images (batch, 3, crop_size, crop_size) and labels.

    Training images are random crops (torchvision's RandomResizedCrop: 8 to 100 % of the area) mirrored at random;
    validation images are resized and cropped at the centre.

    Workers hand over bytes, and normalization to float32 happens on the device, per microbatch: a quarter of the
    traffic between processes and to the GPU, and nothing to compute on the host. Algorithms that act on the loaded
    batch therefore see pixels from 0 to 255: ProgressiveResizing and ColOut do the same with them, CutOut fills with
    black instead of the mean. MixUp and CutMix come later and see normalized images. SelectiveBackprop gives the
    loaded batch to the network, which fails on bytes: it needs `normalize_on='host'`.

    Args:
        split: `train` or `val`.
        batch_size: images in a batch over all ranks.
        data_dir: folder with `train/` and `val/`, each with one folder per class (torchvision's ImageFolder layout); or
            several such folders, with the same classes, whose images are taken together. Default: None, which goes with
            `synthetic` alone.
        crop_size: side of the images, pixels. Default: 224.
        resize_size: length to which the shorter side of a validation image is brought before the crop, pixels. Default:
            None, 256 / 224 of `crop_size`.
        normalize_on: `device`, or `host` for algorithms that give the loaded batch to the network; the host then
            normalizes between two steps, in the rank's own process. Default: `device`.
        channels_last: whether normalized images lie in memory as (batch, height, width, channels). Default: False.
        synthetic: whether to take images of noise, as many as ImageNet has, and read no file. Default: False.
        views: how many crops each image has, taken in turn from epoch to epoch; for split=train. Default: None, a new
            one in each epoch.
        view_seed: chooses the crops; for split=train. Default: 0.
        num_workers: processes that decode images on each rank. Default: 8.
        **loader: options of `composer_kd.data.loader.data_spec`.

    Raises:
        FileNotFoundError: `data_dir` does not have the split's folder.
        ValueError: an option that the split does not have, or folders of several with other classes.
    """
    check_split(split, 'train', 'val')
    train = split == 'train'
    check_views(train, views, view_seed)
    if train and resize_size is not None:
        raise ValueError('resize_size is for split=val: training images are cropped straight from the file')
    if normalize_on not in ('device', 'host'):
        raise ValueError(f'unknown normalize_on {normalize_on!r}: choose device or host')

    if synthetic:
        dataset = TensorImages(*random_images((3, crop_size, crop_size), _CLASSES), length=_SAMPLES[split])
    else:
        if train:
            steps = [RandomResizedCrop(crop_size), RandomHorizontalFlip()]
        else:
            steps = [Resize(resize_size or round(crop_size * 256 / 224)), CenterCrop(crop_size)]
        dataset = _images(data_dir, split, Compose(steps))
        dataset = ReplayableViews(dataset, view_seed) if train else dataset
    normalize = NormalizeBatch(Normalize('imagenet', channels_last=channels_last))
    return data_spec(
        dataset,
        batch_size=batch_size,
        train=train,
        num_workers=num_workers,
        collate_fn=whole_batch if synthetic else _stack,
        batch_transforms=normalize if normalize_on == 'host' else None,
        microbatch_transforms=normalize if normalize_on == 'device' else None,
        views=views,
        **loader,
    )


def _images(data_dir: str | Path | Sequence[str | Path] | None, split: str, transform: Compose) -> ImageFolder:
    """The images of all folders, as one data set."""
    several = [data_dir] if data_dir is None or isinstance(data_dir, str | Path) else data_dir or [None]
    first, *others = [ImageFolder(str(_folder(each, split)), transform=transform) for each in several]
    for other in others:
        if differing := set(other.classes) ^ set(first.classes):
            what = f'imagenet: {first.root} and {other.root} must have the same classes'
            raise ValueError(f'{what}, and one of them alone has {min(differing)}')
        first.samples += other.samples
        first.targets += other.targets
    return first


def _folder(data_dir: str | Path | None, split: str) -> Path:
    if not data_dir or not (folder := Path(data_dir) / split).is_dir():
        found = f'no folder {Path(data_dir) / split}' if data_dir else 'no data_dir'
        key = 'train_data' if split == 'train' else 'eval_data'
        raise FileNotFoundError(
            f'imagenet: {found}: set {key}.data_dir, or IMAGENET_DIR for our recipes, to a folder with train/ and val/ '
            "(torchvision's ImageFolder layout)"
        )
    return folder


def _stack(samples: Sequence[tuple[Image, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn PIL images into one batch of bytes; not earlier, as RandAugment and its like append PIL transforms."""
    images = torch.stack([pil_to_tensor(image) for image, _ in samples])
    return images, torch.tensor([label for _, label in samples])
