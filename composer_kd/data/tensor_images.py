"""Images held in memory as one tensor, and fetched a batch at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from composer_kd.data.views import BatchRandom, Key, as_keys, check_seed, plain

_PADDING = 4
_POOL = 512


class TensorImages(Dataset):
    """A data set of images that are all in memory, whose batches are made whole.

    Indexing, augmentation and normalization are each one operation on the batch, so that a single process feeds a small
    network. Use it with `collate_fn=whole_batch`. Asked for (index, view) it gives the images in that view.

    Args:
        images: pixels, uint8 (number, channels, height, width).
        labels: int64 (number,).
        augment: applied to a batch of pixels, with random numbers for them. Default: None.
        normalize: applied last. Default: None, batches are pixels.
        length: samples in the data set: when there are more than images, these return in turn. Default: None, one each.
        seed: chooses the views, from 0 up to 2^64. Default: 0.

    Raises:
        ValueError: `seed` is out of range.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        augment: Callable[[torch.Tensor, BatchRandom], torch.Tensor] | None = None,
        normalize: Callable[[torch.Tensor], torch.Tensor] | None = None,
        length: int | None = None,
        seed: int = 0,
    ):
        check_seed('view_seed', seed)
        self.images = images
        self.labels = labels
        self.augment = augment
        self.normalize = normalize
        self.length = len(images) if length is None else length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    @property
    def has_views(self) -> bool:
        """See `GivesViews`."""
        return self.augment is not None

    def identity(self) -> dict[str, Any]:
        """See `GivesViews`."""
        steps = ', '.join(plain(step) for step in (self.augment, self.normalize) if step is not None)
        return {'transform': steps, **({'view_seed': self.seed} if self.has_views else {})}

    def __getitem__(self, index: int | Key) -> tuple[torch.Tensor, torch.Tensor]:
        """One image (channels, height, width) and its label, in view 0 unless another is asked for."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int | Key]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch: images (len(indices), channels, height, width) and labels (len(indices),)."""
        keys = as_keys(indices)
        rows = torch.from_numpy(keys[:, 0]) % len(self.images)
        images = self.images[rows]
        if self.augment is not None:
            images = self.augment(images, BatchRandom(self.seed, keys))
        if self.normalize is not None:
            images = self.normalize(images)
        return images, self.labels[rows]


def whole_batch(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Collate what is a batch already."""
    return batch


def crop_and_flip(images: torch.Tensor, random: BatchRandom) -> torch.Tensor:
    """Shift every image by up to four pixels each way, black coming in from the border, and mirror every second one.

    The augmentation of He et al. 2015 (arXiv 1512.03385), section 4.2: pad by four pixels on each side, crop at random,
    flip at random.

    Args:
        images: pixels (batch, channels, height, width).
        random: numbers for as many samples; three are used of each.
    """
    batch, channels, height, width = images.shape
    rows, columns = (random.integers(draw, 2 * _PADDING + 1)[:, None] for draw in range(2))
    flip = random.integers(2, 2)[:, None] == 1
    rows = rows + torch.arange(height)
    columns = columns + torch.where(flip, torch.arange(width - 1, -1, -1), torch.arange(width))
    pixels = rows[:, :, None] * (width + 2 * _PADDING) + columns[:, None, :]
    padded = F.pad(images, [_PADDING] * 4).flatten(start_dim=2)
    return padded.gather(2, pixels.view(batch, 1, -1).expand(-1, channels, -1)).view_as(images)


def random_images(shape: tuple[int, int, int], num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool of images of noise with random labels, the same in every process, for runs that need no data.

    Args:
        shape: (channels, height, width).
        num_classes: number of classes.

    Returns:
        Pixels, uint8 (512, *shape), and labels, int64 (512,).
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (_POOL, *shape), dtype=torch.uint8, generator=generator)
    return images, torch.randint(num_classes, (_POOL,), generator=generator)
