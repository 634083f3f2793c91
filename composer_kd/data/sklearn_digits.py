"""The 1,797 handwritten digits that come with scikit-learn: a data set that is always there."""

from typing import Literal

import torch
from composer.core import DataSpec
from typing_extensions import Unpack

from composer_kd.data.loader import LoaderOptions, check_split, data_spec, shows_loader_options
from composer_kd.data.normalization import Normalize
from composer_kd.data.subset import subset_size
from composer_kd.data.tensor_images import TensorImages, whole_batch

_TEST_SAMPLES = 500
_SPLIT_SEED = 0
_PEAK = 16.0


@shows_loader_options
def digits(
    split: Literal['train', 'test'],
    batch_size: int,
    *,
    subset: int | float | None = None,
    num_workers: int = 0,
    **loader: Unpack[LoaderOptions],
) -> DataSpec:
    """Handwritten digits: 1x8x8 images with labels from 0 to 9, held in memory.

    The split into 1,297 training and 500 test images keeps the classes' shares, and is the same in every run.

    Args:
        split: `train` or `test`.
        batch_size: images in a batch over all ranks.
        subset: take the first so many images alone, or with a number up to 1.0 the first so large a share; they are in
            no order. Default: None, all.
        num_workers: processes that fetch batches on each rank; the rank itself is fast enough. Default: 0.
        **loader: options of `composer_kd.data.loader.data_spec`.

    Raises:
        ValueError: `subset` is out of range.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    check_split(split, 'train', 'test')
    train = split == 'train'
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=_TEST_SAMPLES, stratify=labels, random_state=_SPLIT_SEED)
    pixels, labels = (parts[0], parts[2]) if train else (parts[1], parts[3])
    dataset = TensorImages(
        torch.as_tensor(pixels, dtype=torch.uint8).view(-1, 1, 8, 8),
        torch.as_tensor(labels, dtype=torch.int64),
        normalize=Normalize('digits', peak=_PEAK),
        length=subset_size(subset, len(labels)),
    )
    return data_spec(
        dataset, batch_size=batch_size, train=train, num_workers=num_workers, collate_fn=whole_batch, **loader
    )
