"""From a data set to Composer's `DataSpec`, and the loader options that every builder has in common."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypedDict, TypeVar

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler

_Builder = TypeVar('_Builder', bound=Callable[..., Any])


class LoaderOptions(TypedDict, total=False):
    """The options that builders pass on to `data_spec`, which says what they mean."""

    shuffle: bool | None
    drop_last: bool | None
    shuffle_seed: int
    pin_memory: bool | None
    persistent_workers: bool | None
    prefetch_factor: int | None


def data_spec(
    dataset: Dataset,
    *,
    batch_size: int,
    train: bool,
    num_workers: int,
    shuffle: bool | None = None,
    drop_last: bool | None = None,
    shuffle_seed: int = 0,
    pin_memory: bool | None = None,
    persistent_workers: bool | None = None,
    prefetch_factor: int | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    with_epoch: bool = False,
    **of_batches: Any,
) -> DataSpec:
    """Deal `dataset` out to the ranks in batches.

    Rank r of n gets the samples r, r + n, r + 2n ... of an order that is the same on all ranks. The order of epoch e is
    a function of `shuffle_seed` + e alone, so a resumed run goes on in the same order. What is drawn at random when a
    sample is fetched resumes exactly with `num_workers=0`, where the draws are from the random state that Composer
    restores; workers have random states of their own, which no checkpoint holds.

    Args:
        dataset: a data set with a length.
        batch_size: samples in a batch over all ranks.
        train: whether this is a training split: it decides what None stands for below.
        num_workers: processes that fetch samples on each rank; 0 fetches in the rank's own process.
        shuffle: whether each epoch has another order. Default: None, `train`.
        drop_last: whether to leave out the last batch when it is not full, and on several ranks the samples that do not
            divide by them; otherwise ranks repeat a sample each to come out even, which Composer's metrics leave out
            again. Default: None, `train`.
        shuffle_seed: chooses the orders. Default: 0.
        pin_memory: whether batches are copied to page-locked memory, from where a GPU fetches them faster. Default:
            None, whether there is a GPU.
        persistent_workers: whether workers live on from epoch to epoch. Default: None, yes if there are any.
        prefetch_factor: batches that each worker keeps ready. Default: None, torch's 2.
        collate_fn: makes a batch of what the data set returns. Default: None, torch's.
        with_epoch: whether the data set is asked for (index, epoch) instead of an index, so that what it draws at
            random can be a function of these alone. Default: False.
        **of_batches: what else Composer's DataSpec is to know: `batch_transforms`, `microbatch_transforms`, ...

    Raises:
        ValueError: `batch_size` is no multiple of the number of ranks, there is not one batch in an epoch, or there are
            no samples at all.
    """
    shuffle = train if shuffle is None else shuffle
    drop_last = train if drop_last is None else drop_last
    sampler = (_IndexAndEpoch if with_epoch else DistributedSampler)(
        dataset,
        num_replicas=dist.get_world_size(),
        rank=dist.get_global_rank(),
        shuffle=shuffle,
        drop_last=drop_last,
        seed=shuffle_seed,
    )
    loader = DataLoader(
        dataset,
        batch_size=rank_batch_size(batch_size),
        sampler=sampler,
        drop_last=drop_last,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        persistent_workers=num_workers > 0 if persistent_workers is None else persistent_workers,
        prefetch_factor=prefetch_factor,
    )
    if len(dataset) == 0:  # pyright: ignore[reportArgumentType]
        raise ValueError('the data set has no samples')
    if len(loader) == 0:
        raise ValueError(
            f'the data set has {len(dataset)} samples, which is not one batch of batch_size={batch_size}: '  # pyright: ignore[reportArgumentType]
            'take a smaller batch_size, or drop_last=false'
        )
    return DataSpec(loader, **of_batches)


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


class _IndexAndEpoch(DistributedSampler):
    def __iter__(self) -> Iterator[tuple[int, int]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for index in super().__iter__():
            yield index, self.epoch


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
