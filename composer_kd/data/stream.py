"""Training on shards without end, resumed to the sample: a stream for each worker, each with a cursor of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from composer.core import DataSpec
from composer.utils import dist, reproducibility
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from composer_kd.data.loader import check_part, rank_batch_size
from composer_kd.data.masking import SPEC, MaskedBatch, Sample, random_stream
from composer_kd.data.sequences import Sequences
from composer_kd.data.text_files import Shard, TextError
from composer_kd.data.views import check_seed
from composer_kd.tokenization import tokenizer_digest

_EVEN_ENOUGH = 1.25
_SHUFFLE_SHARDS, _SHUFFLE_SAMPLES = 1, 2


class _Place(NamedTuple):
    """Where a sequence begins in a stream: in which of its passes, at which shard of that, where in the shard."""

    number: int
    slot: int
    document: int
    offset: int


class TextStream(IterableDataset):
    """Samples of text shards, without end, and how far each stream of them was read.

    The text is dealt out to n streams, one for each worker of each rank. A stream has shards of its own; where one
    would then get over a quarter more than another, each has every n-th document of all shards instead. It goes through
    its part again and again, and through the shards in another order each time. Sequences are shuffled within blocks of
    `shuffle_buffer`, none of which reaches from one pass into the next. So every sequence comes once per pass, in an
    order that is a function of `shuffle_seed` and of the number of streams, and a resumed run goes on with the very
    next one.

    A sample's masks depend on its shard, the place in it and the pass, not on the streams.

    Args:
        shards: in an order that never changes.
        sequences: cuts documents into sequences.
        masked_batch: knows the tokenizer, and masks.
        workers: processes that read on each rank; 0 reads in the rank's own.
        shuffle: whether to shuffle at all.
        shuffle_seed: chooses the orders.
        shuffle_buffer: sequences in a block; a stream holds twice as many in memory.
        part: see `composer_kd.data.loader.data_spec`; of the streams, not of the samples one by one.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        sequences: Sequences,
        masked_batch: MaskedBatch,
        *,
        workers: int,
        shuffle: bool,
        shuffle_seed: int,
        shuffle_buffer: int,
        part: Sequence[int] | None = None,
    ):
        self.shards = shards
        self.sequences = sequences
        self.tokenizer = masked_batch.tokenizer
        self.max_length = masked_batch.max_length
        self.shuffle = shuffle
        self.shuffle_seed = shuffle_seed
        self.block = shuffle_buffer if shuffle else 1
        self.rank, self.ranks = dist.get_global_rank(), dist.get_world_size()
        self.workers = max(workers, 1)
        self.part, self.parts = (0, 1) if part is None else check_part(part)
        self.description = self._describe(masked_batch)
        # A cursor is the place where a block begins, and how many of its samples are used up.
        self.cursors = [[0] * (len(_Place._fields) + 1) for _ in range(self.workers)]
        self.turn = 0
        self.random_states: list[dict[str, Any]] | None = None
        self.used = False
        self.offered: list[int] | None = None

    def __iter__(self) -> Iterator[tuple[Sample, list[int]] | TextError]:
        """Samples, each with the cursor behind it; an error comes as the last item, to be raised in its turn."""
        worker = get_worker_info()
        # Torch asks worker 0 for the first batch, whichever stream's turn it is.
        stream = (self.turn + (worker.id if worker else 0)) % self.workers
        try:
            first = (self.part * self.ranks + self.rank) * self.workers
            yield from self._samples(first + stream, self.cursors[stream])
        except TextError as error:
            yield error

    def use(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Count the batch that was offered last; a Trainer calls this for each that it trains on."""
        if self.offered is not None:
            self.cursors[self.turn] = self.offered
            self.turn = (self.turn + 1) % self.workers
            self.used, self.offered = True, None
        return batch

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """How much of the streams of all ranks was used. Composer calls this on all ranks.

        Args:
            num_samples: samples in the epoch so far.
            from_beginning: there is no other way to count.

        Raises:
            RuntimeError: Batches were trained on, but not counted.
        """
        del from_beginning
        if num_samples and self.offered is not None and not self.used:
            raise RuntimeError('a stream of text needs its whole DataSpec in the Trainer, not the dataloader alone')
        return {
            'of': self.description,
            'cursors': torch.tensor(dist.all_gather_object(self.cursors)),
            'turn': self.turn,
            'within_epoch': num_samples > 0,
            # Composer leaves it to the data set to find the way back into an epoch, and then restores no random state.
            'random_states': reproducibility.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: It was taken of other streams.
        """
        if not state or 'cursors' not in state:
            raise ValueError(
                'the checkpoint does not say how far its run had read in a stream of text: it had other data'
            )
        for what, value in self.description.items():
            if (saved := state['of'].get(what)) != value:
                difference = f'other {what}' if isinstance(value, str) else f'{what}={saved}, not {value}'
                raise ValueError(
                    f'the checkpoint stopped in a stream of text with {difference}: go on with what the run began '
                    'with, so that no sample comes twice or not at all'
                )
        self.cursors = state['cursors'][self.rank].tolist()
        self.turn = state['turn']
        self.random_states = state['random_states'] if state['within_epoch'] else None

    def _describe(self, masked_batch: MaskedBatch) -> dict[str, Any]:
        """All that decides samples, their order and their masks, under the names that people know it by."""
        return {
            'ranks': self.ranks,
            'num_workers': self.workers,
            'part': [self.part, self.parts] if self.parts > 1 else None,
            'files (names and sizes)': _digest(*(shard.identity for shard in self.shards)),
            'tokens (tokenizer)': tokenizer_digest(self.tokenizer),
            'max_length': self.max_length,
            'pack': self.sequences.pack,
            'shuffle_buffer': self.block,
            'shuffle_seed': self.shuffle_seed,
            'mask_seed': masked_batch.seed,
            'masking_probability': masked_batch.probability,
            'whole_word_masking': masked_batch.whole_words,
            **self.shards[0].options,
        }

    def _samples(self, stream: int, cursor: Sequence[int]) -> Iterator[tuple[Sample, list[int]]]:
        *start, used = cursor
        read = self._read(stream, _Place(*start))
        ahead = [next(read)]

        def read_one() -> bool:
            """Read on, unless a whole block, and the first sequence of the next one, are there."""
            if len(ahead) > self.block or ahead[-1][0].number != ahead[0][0].number:
                return False
            ahead.append(next(read))
            return True

        while True:
            while read_one():
                pass
            block, ahead = ahead[:-1], ahead[-1:]
            place, begin = block[0]
            order = random_stream(self.shuffle_seed, place.number, begin.where, _SHUFFLE_SAMPLES)
            for position, index in enumerate(order.permutation(len(block)), start=1):
                if position > used:
                    yield block[index][1], [*place, position]
                # One read for one given, or the network would wait for each block.
                read_one()
            used = 0

    def _read(self, stream: int, place: _Place) -> Iterator[tuple[_Place, Sample]]:
        """A stream's sequences from a place on, in the order of their files."""
        shards, part, parts = self._part(stream)
        number, first, document, offset = place
        whole_pass = place[1:] == (0, 0, 0)
        while True:
            order = range(len(shards))
            if self.shuffle:
                order = random_stream(self.shuffle_seed, number, [stream], _SHUFFLE_SHARDS).permutation(len(shards))
            found = False
            for slot in range(first, len(shards)):
                shard = shards[order[slot]]
                documents = self.shards[shard].documents(document, (part + shard) % parts, parts)
                for sequence in self.sequences(documents, offset):
                    found = True
                    where = shard, sequence.document, sequence.offset
                    yield _Place(number, slot, *where[1:]), Sample(sequence.ids, where, number)
                document = offset = 0
            if whole_pass and not found:
                raise TextError(
                    f'{len(self.shards)} files have no text left for one of {self._streams()} streams: take '
                    'fewer workers (num_workers), or more text'
                )
            number, first, whole_pass = number + 1, 0, True

    def _part(self, stream: int) -> tuple[Sequence[int], int, int]:
        """The shards of a stream, and which documents of shard 0: those that leave this remainder, divided by that."""
        shards, streams = range(len(self.shards)), self._streams()
        sizes = [sum(self.shards[shard].size for shard in shards[each::streams]) for each in range(streams)]
        if max(sizes) > _EVEN_ENOUGH * min(sizes):
            return shards, stream, streams
        return shards[stream::streams], 0, 1

    def _streams(self) -> int:
        return self.parts * self.ranks * self.workers


class StreamLoader(DataLoader):
    """Batches of a `TextStream`, each time from behind the last one that was used."""

    dataset: TextStream

    def __init__(self, stream: TextStream, masked_batch: MaskedBatch, **options: Any):
        # With a generator of its own, it draws none of the run's random numbers.
        super().__init__(stream, collate_fn=_StreamBatch(masked_batch), generator=torch.Generator(), **options)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Yield batches, without end.

        Raises:
            TextError: There is a shard that cannot be read.
        """
        stream = self.dataset
        goes_on = stream.used
        for batch in super().__iter__():
            if isinstance(batch, TextError):
                raise batch
            stream.offered = batch.pop('cursor').tolist()
            if stream.random_states is not None:
                reproducibility.load_rng_state(stream.random_states)
                stream.random_states = None
            yield batch
            # A Trainer that fits anew wants to pass over what it had of this epoch, and all of that is behind us.
            while goes_on and stream.offered is not None:
                yield batch


class _StreamBatch:
    def __init__(self, masked_batch: MaskedBatch):
        self.masked_batch = masked_batch

    def __call__(self, items: list[Any]) -> dict[str, torch.Tensor] | TextError:
        if isinstance(items[-1], TextError):
            return items[-1]
        samples, cursors = zip(*items, strict=True)
        return {**self.masked_batch(samples), 'cursor': torch.tensor(cursors[-1])}


def stream_spec(
    shards: Sequence[Shard],
    sequences: Sequences,
    masked_batch: MaskedBatch,
    *,
    batch_size: int,
    num_workers: int,
    shuffle_buffer: int,
    shuffle: bool | None = None,
    shuffle_seed: int = 0,
    part: Sequence[int] | None = None,
    pin_memory: bool | None = None,
    prefetch_factor: int | None = None,
) -> DataSpec:
    """Batches without end, dealt out to the ranks.

    Args:
        shards: see `TextStream`.
        sequences: see `TextStream`.
        masked_batch: see `TextStream`.
        batch_size: samples in a batch over all ranks.
        num_workers: processes that read and tokenize on each rank; 0 does it in the rank's own process.
        shuffle_buffer: see `TextStream`.
        shuffle: whether to shuffle. Default: None, yes.
        shuffle_seed: chooses the orders. Default: 0.
        part: see `TextStream`. Default: None, all.
        pin_memory: see `data_spec`.
        prefetch_factor: see `data_spec`.

    Raises:
        ValueError: `batch_size` is no multiple of the number of ranks, or an option is out of range.
    """
    if shuffle_buffer < 1:
        raise ValueError(f'shuffle_buffer must be at least 1, not {shuffle_buffer}')
    check_seed('shuffle_seed', shuffle_seed)
    stream = TextStream(
        shards,
        sequences,
        masked_batch,
        workers=num_workers,
        shuffle=shuffle is not False,
        shuffle_seed=shuffle_seed,
        shuffle_buffer=shuffle_buffer,
        part=part,
    )
    loader = StreamLoader(
        stream,
        masked_batch,
        batch_size=rank_batch_size(batch_size),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        prefetch_factor=prefetch_factor,
    )
    return DataSpec(loader, batch_transforms=stream.use, **SPEC)


def _digest(*texts: str) -> str:
    return hashlib.sha256('\n'.join(texts).encode()).hexdigest()
