"""Samples that are augmented or masked at random, and yet the same each time they are asked for.

A sample in one of its views is named by (index, view): what is drawn at random for it is a function of a seed and these
two numbers alone. So it does not matter which process draws it, or what was drawn before: a resumed run sees what it
would have seen, and what a teacher once said about a view holds whenever the view comes again.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets import VisionDataset
from torchvision.datasets.vision import StandardTransform

Key: TypeAlias = tuple[int, int]

_PROBED = 64
_GOLDEN = 0x9E3779B97F4A7C15
_ADDRESS = re.compile(r' at 0x[0-9a-fA-F]+')


@runtime_checkable
class GivesViews(Protocol):
    """A data set with a length that is asked for (index, view) instead of an index, and answers with that very view.

    It has a `__getitem__`, or a `__getitems__` for a whole batch, as torch's DataLoader asks for them.
    """

    has_views: bool
    """Whether the views of a sample differ; if not, it is asked for view 0 alone."""

    def identity(self) -> dict[str, Any]:
        """What samples depend on beside the data: plain JSON values under names that people know."""
        ...


class BatchRandom:
    """Random numbers for a batch of samples, each a pure function of the seed, the sample, its view, and which it is.

    Args:
        seed: from 0 up to 2^64.
        keys: the samples and their views, int64 (samples, 2).
    """

    def __init__(self, seed: int, keys: np.ndarray):
        index, view = keys.astype(np.uint64).T
        start = _scramble(np.array([seed], dtype=np.uint64) + np.uint64(_GOLDEN))
        self._start = _scramble(_scramble(start ^ index) ^ view)

    def bits(self, draw: int) -> np.ndarray:
        """64 random bits for each sample, uint64 (samples,); those of draw 0, 1, 2 ... are independent."""
        return _scramble(self._start + np.uint64((draw + 1) * _GOLDEN % 2**64))

    def integers(self, draw: int, below: int) -> torch.Tensor:
        """An integer from 0 up to `below` for each sample, int64 (samples,); `below` is at most 2^32."""
        high = self.bits(draw) >> np.uint64(32)
        return torch.from_numpy((high * np.uint64(below) >> np.uint64(32)).astype(np.int64))


def _scramble(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al. 2014, doi 10.1145/2660193.2660195): each bit depends on all bits."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class ReplayableViews(VisionDataset):
    """Gives any view of the samples of a data set that draws at random from the global generators.

    While it fetches a sample, the global generators of torch (CPU), NumPy and Python's `random` start from a function
    of the seed, the sample's index and the view; afterwards they are as they were. So any transform will do,
    torchvision's or one's own, for PIL images or tensors.

    All other attributes are those of the wrapped data set. It passes for a `VisionDataset`, so that Composer's
    algorithms which add a transform to such a data set (RandAugment, AugMix, ColOut) add it to the wrapped one.

    Args:
        dataset: a data set with a length that is asked for an index.
        seed: from 0 up to 2^64. Default: 0.

    Raises:
        ValueError: `seed` is out of range.
    """

    def __init__(self, dataset: Dataset, seed: int = 0):
        # Not VisionDataset's own, which would put None in place of the wrapped transform.
        check_seed('view_seed', seed)
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # pyright: ignore[reportArgumentType]

    @property
    def has_views(self) -> bool:
        """See `GivesViews`: what the wrapped data set says, and where it says nothing, it may draw at random."""
        return getattr(self.dataset, 'has_views', True)

    def __getitem__(self, index: int | Key) -> Any:
        """One sample, in view 0 unless (index, view) is asked for."""
        return self.__getitems__([index])[0]

    def __getitems__(self, keys: Sequence[int | Key]) -> list[Any]:
        """Samples, one by one: their draws would mix, if the data set made them all at once."""
        pairs = as_keys(keys)
        numbers = BatchRandom(self.seed, pairs)
        seeds = zip(*(numbers.bits(draw) for draw in range(3)), strict=True)
        samples = []
        with _global_generators_kept():
            for index, (of_torch, of_python, of_numpy) in zip(pairs[:, 0].tolist(), seeds, strict=True):
                # Not torch.manual_seed, which seeds the GPUs too.
                torch.default_generator.manual_seed(int(of_torch))
                random.seed(int(of_python))
                np.random.seed([int(of_numpy) >> 32, int(of_numpy) & 0xFFFFFFFF])
                samples.append(self.dataset[index])
        return samples

    def identity(self) -> dict[str, Any]:
        """See `GivesViews`."""
        parts = {name: getattr(self.dataset, name, None) for name in ('transform', 'target_transform', 'transforms')}
        if isinstance(parts['transforms'], StandardTransform):
            del parts['transforms']  # made of the other two
        transform = ', '.join(plain(part) for part in parts.values() if part is not None)
        return {'transform': transform, 'view_seed': self.seed}

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or 'dataset' not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ('dataset', 'seed'):
            super().__setattr__(name, value)
        else:
            setattr(self.dataset, name, value)

    def __repr__(self) -> str:
        return f'ReplayableViews({self.dataset!r}, seed={self.seed})'


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


class ViewsSampler(DistributedSampler):
    """Deals (index, view) out to the ranks: all of a rank's samples in an epoch are in one view.

    Args:
        samples: the indices to deal out.
        views: how many views there are before they come again. Default: None, a new one each epoch.
        **options: those of `DistributedSampler`.
    """

    def __init__(self, samples: Sequence[int], *, views: int | None = None, **options: Any):
        super().__init__(samples, **options)  # pyright: ignore[reportArgumentType]
        self.samples = samples
        self.views = views

    def __iter__(self) -> Iterator[Key]:  # pyright: ignore[reportIncompatibleMethodOverride]
        indices = (self.samples[place] for place in super().__iter__())
        view = self.epoch if self.views is None else self.epoch % self.views
        return ((index, view) for index in indices)


class ViewsLoader(DataLoader):
    """A loader of training data that knows which samples, in which views, are in the batch it gave last.

    Args:
        dataset: one with a length that `GivesViews`.
        sampler: deals them out.
        transforms: what is done to its batches before a network sees them, one after another, under names for
            `identity`. Default: nothing.
        **options: those of torch's DataLoader.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: ViewsSampler,
        transforms: Mapping[str, Callable[[Any], Any]] | None = None,
        **options: Any,
    ):
        super().__init__(dataset, sampler=sampler, **options)
        self.views = sampler.views
        self.transforms = dict(transforms or {})
        self.keys: torch.Tensor | None = None

    @property
    def samples(self) -> int:
        """Number of samples in the data set."""
        return len(self.dataset)  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Batches; `keys` are those of the samples in the last one, int64 (samples, 2)."""
        # Asked twice, the sampler gives the same keys twice.
        for batch, keys in zip(super().__iter__(), self.batch_sampler, strict=True):  # pyright: ignore
            self.keys = torch.from_numpy(as_keys(keys))
            yield batch

    def batches(self, keys_per_batch: Iterable[Iterable[Sequence[int]]]) -> Iterator[tuple[Any, torch.Tensor]]:
        """Batches of any samples in any views, made as those to train on, by as many workers.

        Args:
            keys_per_batch: the samples of each batch, each as (index, view).

        Returns:
            Each batch, and its keys, int64 (samples, 2).
        """
        return self._made(
            keys_per_batch,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor,
            pin_memory=self.pin_memory,
            multiprocessing_context=self.multiprocessing_context,
        )

    def identity(self) -> dict[str, Any]:
        """What a batch depends on, as plain JSON values: a teacher's stored outputs hold while none of it changes.

        Last comes `content`, the SHA-256 of up to 64 samples, evenly spaced, in view 0 as a network sees them: after
        `transforms`, on the CPU.
        """
        dataset: Any = self.dataset
        transforms = {name: plain(transform) for name, transform in self.transforms.items()}
        return {'samples': self.samples, **dataset.identity(), **transforms, 'content': self._content(view=0)}

    def seems_fixed(self) -> bool:
        """Whether each epoch is a new view, and yet some samples are the same in two views."""
        return self.views is None and self._content(view=0) == self._content(view=1)

    def _content(self, view: int) -> str:
        probed = min(self.samples, _PROBED)
        keys = [(number * self.samples // probed, view) for number in range(probed)]
        ((batch, _),) = self._made([keys])
        with _global_generators_kept():
            for transform in self.transforms.values():
                batch = transform(batch)
        digest = hashlib.sha256()
        for part in _parts(batch):
            digest.update(part)
        return digest.hexdigest()

    def _made(
        self, keys_per_batch: Iterable[Iterable[Sequence[int]]], **options: Any
    ) -> Iterator[tuple[Any, torch.Tensor]]:
        asked, known = itertools.tee([(index, view) for index, view in keys] for keys in keys_per_batch)
        loader = DataLoader(
            self.dataset,
            batch_sampler=asked,
            collate_fn=self.collate_fn,
            generator=torch.Generator(),  # the run's own stream would be drawn from
            **options,
        )
        for batch, keys in zip(loader, known, strict=True):
            yield batch, torch.from_numpy(as_keys(keys))


def as_keys(indices: Sequence[int | Key]) -> np.ndarray:
    """What a data set is asked for as keys, int64 (samples, 2); view 0 where there is an index alone."""
    keys = np.array(indices, dtype=np.int64)
    return keys if keys.ndim == 2 else np.stack([keys, np.zeros_like(keys)], axis=1)


def _parts(batch: Any) -> Iterator[bytes]:
    """All that is in a batch, as bytes."""
    if isinstance(batch, torch.Tensor):
        yield f'{batch.dtype} {tuple(batch.shape)}'.encode()
        yield batch.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(batch, Mapping):
        for name in sorted(batch):
            yield str(name).encode()
            yield from _parts(batch[name])
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            yield from _parts(part)
    else:
        yield plain(batch).encode()


def plain(value: Any) -> str:
    """What `repr` says, on one line and without addresses in memory, which differ from process to process."""
    return ' '.join(_ADDRESS.sub('', repr(value)).split())


def check_seed(name: str, seed: int) -> None:
    """Raise ValueError unless `seed` fits in 64 bits without a sign."""
    if not 0 <= seed < 2**64:
        raise ValueError(f'{name} must be from 0 up to 2^64, not {seed}')
