"""From a data set to Composer's `DataSpec`, and the loader options that every builder has in common."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, TypeVar

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from composer_kd.data.views import GivesViews, ReplayableViews, ViewsLoader, ViewsSampler

#: What DataSpec does to batches, and what people are told that it is.
_TRANSFORMS = {'batch_transforms': 'transform of batches', 'microbatch_transforms': 'transform on the device'}

_Builder = TypeVar('_Builder', bound=Callable[..., Any])


class LoaderOptions(TypedDict, total=False):
    """The options that builders pass on to `data_spec`, which says what they mean."""

    shuffle: bool | None
    drop_last: bool | None
    shuffle_seed: int
    part: Sequence[int] | None
    pin_memory: bool | None
    persistent_workers: bool | None
    prefetch_factor: int | None


def data_spec(
    dataset: Dataset,
    *,
    batch_size: int,
    train: bool,
    num_workers: int = 0,
    shuffle: bool | None = None,
    drop_last: bool | None = None,
    shuffle_seed: int = 0,
    part: Sequence[int] | None = None,
    pin_memory: bool | None = None,
    persistent_workers: bool | None = None,
    prefetch_factor: int | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    views: int | None = None,
    view_seed: int = 0,
    **of_batches: Any,
) -> DataSpec:
    """Deal `dataset` out to the ranks in batches.

    Rank r of n gets the samples r, r + n, r + 2n ... of an order that is the same on all ranks. The order of epoch e is
    a function of `shuffle_seed` + e alone, so a resumed run goes on in the same order.

    What is drawn at random when a training sample is fetched is a function of `view_seed`, the sample's index and its
    view, which is the epoch, or with `views` the epoch modulo `views`. So it is the same whichever process fetches the
    sample, and in a resumed run. That holds for a data set that draws from the global generators of torch, NumPy and
    Python, as all transforms of torchvision do; see `composer_kd.data.views.GivesViews` for one that gives views
    itself. What `collate_fn` draws at random is no part of it.

    Args:
        dataset: a data set with a length.
        batch_size: samples in a batch over all ranks.
        train: whether this is a training split: it decides what None stands for below. The loader of a training split
            is a `composer_kd.data.views.ViewsLoader`.
        num_workers: processes that fetch samples on each rank. Default: 0, the rank's own process fetches them.
        shuffle: whether each epoch has another order. Default: None, `train`.
        drop_last: whether to leave out the last batch when it is not full, and on several ranks the samples that do not
            divide by them; otherwise ranks repeat a sample each to come out even, which Composer's metrics leave out
            again. Default: None, `train`.
        shuffle_seed: chooses the orders. Default: 0.
        part: for training: [i, n] takes every n-th sample, from the i-th on, which is one of n disjoint parts of one
            size. Default: None, all samples.
        pin_memory: whether batches are copied to page-locked memory, from where a GPU fetches them faster. Default:
            None, whether there is a GPU.
        persistent_workers: whether workers live on from epoch to epoch. Default: None, yes if there are any.
        prefetch_factor: batches that each worker keeps ready. Default: None, torch's 2.
        collate_fn: makes a batch of the samples that the data set returns, of all and in their order. Default: None,
            torch's.
        views: for training: how many views of each sample there are, taken in turn from epoch to epoch; 1 also says
            that nothing is drawn at random. Where the data set says so itself, by an attribute `has_views` that is
            False, all views are the same and count as one. Default: None, a new one each epoch, so that a record is
            made anew in each.
        view_seed: for training: chooses the views, from 0 up to 2^64. Default: 0.
        **of_batches: what else Composer's DataSpec is to know: `batch_transforms`, `microbatch_transforms`, ...
            Those of a training split are asked about a few samples on the CPU, too, by `ViewsLoader.identity`.

    Raises:
        ValueError: `batch_size` is no multiple of the number of ranks, there is not one batch in an epoch, there are no
            samples at all, or `part`, `views` or `view_seed` is out of range or not for this data set.
    """
    shuffle = train if shuffle is None else shuffle
    drop_last = train if drop_last is None else drop_last
    dealing = {
        'num_replicas': dist.get_world_size(),
        'rank': dist.get_global_rank(),
        'shuffle': shuffle,
        'drop_last': drop_last,
        'seed': shuffle_seed,
    }
    options = {
        'batch_size': rank_batch_size(batch_size),
        'drop_last': drop_last,
        'num_workers': num_workers,
        'collate_fn': collate_fn,
        'pin_memory': torch.cuda.is_available() if pin_memory is None else pin_memory,
        'persistent_workers': num_workers > 0 if persistent_workers is None else persistent_workers,
        'prefetch_factor': prefetch_factor,
    }
    check_views(train, views, view_seed)
    dealt = len(dataset)  # pyright: ignore[reportArgumentType]
    if part is not None and not train:
        raise ValueError('part is for split=train: what is evaluated on is the same for all')
    if train:
        replayable = _replayable(dataset, view_seed)
        index, parts = (0, 1) if part is None else check_part(part)
        samples = range(index, dealt - dealt % parts, parts)
        dealt = len(samples)
        sampler = ViewsSampler(samples, views=views if replayable.has_views else 1, **dealing)
        named = ((name, of_batches.get(key)) for key, name in _TRANSFORMS.items())
        transforms = {name: transform for name, transform in named if transform is not None}
        loader = ViewsLoader(replayable, sampler, transforms, **options)
    else:
        loader = DataLoader(dataset, sampler=DistributedSampler(dataset, **dealing), **options)
    if dealt == 0:
        raise ValueError('the data set has no samples')
    if len(loader) == 0:
        raise ValueError(
            f'the data set has {dealt} samples, which is not one batch of batch_size={batch_size}: '
            'take a smaller batch_size, or drop_last=false'
        )
    return DataSpec(loader, **of_batches)


def check_part(part: Sequence[int]) -> tuple[int, int]:
    """Which part of how many: raise ValueError unless there is such a part."""
    if len(part) != 2 or not 0 <= part[0] < part[1]:
        raise ValueError(f'part must be [i, n], the i-th of n parts, i from 0 to n - 1, not {[*part]}')
    return part[0], part[1]


def rank_batch_size(batch_size: int) -> int:
    """The part of a batch over all ranks that is each rank's.

    Raises:
        ValueError: `batch_size` is no multiple of the number of ranks.
    """
    ranks = dist.get_world_size()
    if batch_size < 1 or batch_size % ranks:
        near = max(batch_size // ranks, 1) * ranks
        raise ValueError(
            f'batch_size={batch_size} counts all ranks and must be a multiple of their number, {ranks}: '
            f'take {near}, for example'
        )
    return batch_size // ranks


def check_views(train: bool, views: int | None, view_seed: int = 0) -> None:
    """Raise ValueError unless these options of `data_spec` are right for such a split."""
    for name, is_given in (('views', views is not None), ('view_seed', view_seed)):
        if is_given and not train:
            raise ValueError(f'{name} is for split=train: what is evaluated on is always the same')
    if views is not None and views < 1:
        raise ValueError(f'views must be at least 1, or none for new ones in each epoch, not {views}')


def _replayable(dataset: Dataset, view_seed: int) -> Any:
    if not isinstance(dataset, GivesViews):
        return ReplayableViews(dataset, view_seed)
    if view_seed:
        raise ValueError(f'{type(dataset).__name__} gives views itself: set its own seed, not view_seed={view_seed}')
    return dataset


def check_split(split: str, *known: str) -> None:
    """Raise ValueError unless `split` is one of `known`."""
    if split not in known:
        raise ValueError(f'unknown split {split!r}: choose {" or ".join(known)}')


def shows_loader_options(build: _Builder) -> _Builder:
    """Let the signature of a builder that ends in `**loader: Unpack[LoaderOptions]` name those options one by one.

    Type checkers see through `Unpack`, `inspect.signature` does not; whoever binds arguments by signature, as recipes
    do, needs the names.
    """
    own = [p for p in inspect.signature(build).parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = inspect.signature(data_spec).parameters
    signature = inspect.Signature(
        [*own, *(options[name] for name in LoaderOptions.__annotations__)],
        return_annotation=inspect.signature(build).return_annotation,
    )
    build.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    build.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    build.__annotations__['return'] = signature.return_annotation
    return build
