"""CIFAR-10, CIFAR-100 and Fashion-MNIST, read by torchvision and held in memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from composer.core import DataSpec
from torchvision import datasets
from typing_extensions import Unpack

from composer_kd.data.loader import LoaderOptions, check_split, check_views, data_spec, shows_loader_options
from composer_kd.data.normalization import Normalize
from composer_kd.data.subset import subset_size
from composer_kd.data.tensor_images import TensorImages, crop_and_flip, random_images, whole_batch
from composer_kd.download import downloading

_DOC = """{title}: {shape} images with labels, held in memory.

    Args:
        split: `train` or `test`.
        batch_size: images in a batch over all ranks.
        data_dir: folder in which torchvision keeps its data sets; this one is in `{folder}` there. Default: `data`.
        download: whether to fetch the files that are not there; their checksums are verified. Default: False.
        augment: whether to shift every image by up to four pixels and to mirror every second one, at random; for the
            training split alone. Default: None, {augment}.
        pad: black pixels around each image, on every side. Default: 0.
        subset: take the first so many images alone, or with a number up to 1.0 the first so large a share. They are as
            mixed as all of them: the files of these sets are not sorted by class. Default: None, all.
        synthetic: whether to take images of noise, as many as there are real ones, and read no file. Default: False.
        views: how many shifts each image has, taken in turn from epoch to epoch; for split=train. Default: None, a new
            one in each epoch.
        view_seed: chooses the shifts; for split=train. Default: 0.
        num_workers: processes that fetch batches on each rank; the rank itself is fast enough. Default: 0.
        **loader: options of `composer_kd.data.loader.data_spec`.

    Raises:
        FileNotFoundError: the files are not there, or damaged.
        ValueError: `augment`, `views` or `view_seed` for the test split, or `pad` or `subset` is out of range.
    """


@dataclass(frozen=True)
class _Kind:
    title: str
    reader: type[datasets.CIFAR10] | type[datasets.FashionMNIST]
    folder: str
    shape: tuple[int, int, int]
    num_classes: int
    train_samples: int
    augment: bool


def _read(kind: _Kind, data_dir: str | Path, train: bool, download: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Read one split: pixels (number, *shape) and labels (number,)."""
    if download:
        with downloading():
            raw = kind.reader(str(data_dir), train=train, download=True)
    else:
        try:
            raw = kind.reader(str(data_dir), train=train)
        except RuntimeError:
            raise FileNotFoundError(
                f'{kind.title} is not in {Path(data_dir) / kind.folder}, or damaged: set download=true to fetch it, '
                "or data_dir to the folder that holds torchvision's data sets"
            ) from None
    images = torch.as_tensor(raw.data)
    # Grey images come without a channel, colour images with the channel last.
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(raw.targets)


def _builder(name: str, kind: _Kind):
    """Make the function that builds the data set `name`."""

    @shows_loader_options
    def build(
        split: Literal['train', 'test'],
        batch_size: int,
        *,
        data_dir: str | Path = 'data',
        download: bool = False,
        augment: bool | None = None,
        pad: int = 0,
        subset: int | float | None = None,
        synthetic: bool = False,
        views: int | None = None,
        view_seed: int = 0,
        num_workers: int = 0,
        **loader: Unpack[LoaderOptions],
    ) -> DataSpec:
        check_split(split, 'train', 'test')
        train = split == 'train'
        if augment and not train:
            raise ValueError(f'{name}: augment is for split=train')
        check_views(train, views, view_seed)
        augment = kind.augment and train if augment is None else augment
        if synthetic:
            images, labels = random_images(kind.shape, kind.num_classes)
            samples = kind.train_samples if train else 10_000
        else:
            images, labels = _read(kind, data_dir, train, download)
            samples = len(images)
        if pad < 0:
            raise ValueError(f'{name}: pad must be 0 pixels or more, not {pad}')
        if pad:
            images = F.pad(images, (pad, pad, pad, pad))
        dataset = TensorImages(
            images,
            labels,
            augment=crop_and_flip if augment else None,
            normalize=Normalize(name),
            length=subset_size(subset, samples),
            seed=view_seed,
        )
        return data_spec(
            dataset,
            batch_size=batch_size,
            train=train,
            num_workers=num_workers,
            collate_fn=whole_batch,
            views=views,
            **loader,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = _DOC.format(
        title=kind.title,
        shape='x'.join(str(side) for side in kind.shape),
        folder=kind.folder,
        augment='the training split' if kind.augment else 'no',
    )
    return build


cifar10 = _builder(
    'cifar10', _Kind('CIFAR-10', datasets.CIFAR10, 'cifar-10-batches-py', (3, 32, 32), 10, 50_000, augment=True)
)
cifar100 = _builder(
    'cifar100', _Kind('CIFAR-100', datasets.CIFAR100, 'cifar-100-python', (3, 32, 32), 100, 50_000, augment=True)
)
fashion_mnist = _builder(
    'fashion_mnist',
    _Kind('Fashion-MNIST', datasets.FashionMNIST, 'FashionMNIST/raw', (1, 28, 28), 10, 60_000, augment=False),
)
