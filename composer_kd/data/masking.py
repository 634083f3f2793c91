"""Masks for masked language modelling, each a pure function of a seed, a sample and a view of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from composer.core.data_spec import default_split_batch
from transformers import PreTrainedTokenizerFast

from composer_kd.data.views import check_seed
from composer_kd.tokenization import begins_word

NOT_PREDICTED = -100

_MASK, _KEEP = 0.8, 0.1
_MULTIPLE = 8


def random_stream(seed: int, view: int, where: Sequence[int], purpose: int = 0) -> np.random.Generator:
    """Random numbers that are a function of the arguments alone, and independent for any two that differ.

    Args:
        seed: from 0 up to 2^64.
        view: at least 0.
        where: up to three numbers, at least 0.
        purpose: 0 to 255. Default: 0.
    """
    # Philox enciphers a counter of 256 bits with a key of 128: no two streams meet before 2^56 draws.
    counter = np.zeros(4, dtype=np.uint64)
    counter[0] = purpose << 56
    counter[1 : len(where) + 1] = where
    return np.random.Generator(np.random.Philox(key=np.array([seed, view], dtype=np.uint64), counter=counter))


def mask(
    input_ids: Sequence[int] | np.ndarray,
    special: Sequence[bool] | np.ndarray,
    *,
    seed: int,
    sample: int | Sequence[int],
    mask_token_id: int,
    vocabulary: int,
    view: int = 0,
    probability: float = 0.15,
    words: Sequence[int] | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mask tokens of one sample as BERT does (Devlin et al. 2018, arXiv 1810.04805, section 3.1).

    Each token, or each word, is chosen with `probability`; if none was, one is. Of the chosen tokens 80 % become the
    mask token, 10 % a random token of the vocabulary, and 10 % stay.

    Args:
        input_ids: shape (length,), without padding.
        special: whether a token must not be chosen, shape (length,).
        seed: chooses the masks.
        sample: up to three numbers that name the sample.
        mask_token_id: the id of the mask token.
        vocabulary: number of ids to draw random tokens from.
        view: which of its masks the sample gets. Default: 0.
        probability: share of the tokens to choose. Default: 0.15.
        words: the word that each token belongs to, from 0 to length - 1; whole words are chosen then. Default: None.

    Returns:
        The masked ids and the labels, int64 (length,): labels are the ids at chosen tokens, -100 at all others.
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    length = len(ids)
    random = random_stream(seed, view, [sample] if isinstance(sample, int) else sample)
    lots = random.random(length)
    lots = np.where(special, np.inf, lots if words is None else lots[np.asarray(words)])
    chosen = lots < max(probability, np.nextafter(lots.min(initial=1.0), 1.0))
    fate = random.random(length)
    inputs = np.where(chosen & (fate < _MASK), mask_token_id, ids)
    inputs = np.where(chosen & (fate >= _MASK + _KEEP), random.integers(vocabulary, size=length), inputs)
    return inputs, np.where(chosen, ids, NOT_PREDICTED)


class Sample(NamedTuple):
    """A sequence of tokens, and what its masks depend on."""

    ids: np.ndarray
    where: tuple[int, ...]
    view: int


@dataclass
class MaskedBatch:
    """Makes a batch of samples: masks each, and pads them all to one length.

    That length is the longest sample's, rounded up to a multiple of 8, so that a GPU's matrix units are filled and only
    max_length / 8 shapes occur (one, for text that is longer than `max_length`); it is at most `max_length`.

    Args:
        tokenizer: the tokenizer the samples were made with.
        max_length: tokens in a sample at most.
        seed: chooses the masks.
        probability: see `mask`.
        whole_words: whether to mask whole words.

    Raises:
        ValueError: The tokenizer lacks a token that is needed, or an option is out of range.
    """

    tokenizer: PreTrainedTokenizerFast
    max_length: int
    seed: int = 0
    probability: float = 0.15
    whole_words: bool = False

    def __post_init__(self):
        if not 0 < self.probability <= 1:
            raise ValueError(f'masking_probability must be above 0 and at most 1, not {self.probability}')
        check_seed('mask_seed', self.seed)
        self._mask_token_id: Any = self.tokenizer.mask_token_id
        self._vocabulary = len(self.tokenizer)
        self._special = np.zeros(self._vocabulary, dtype=bool)
        self._special[self.tokenizer.all_special_ids] = True
        self._begins_word = begins_word(self.tokenizer) if self.whole_words else None

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each int64 (samples, length)."""
        longest = max(len(sample.ids) for sample in samples)
        shape = len(samples), min(-(-longest // _MULTIPLE) * _MULTIPLE, self.max_length)
        input_ids = np.full(shape, self.tokenizer.pad_token_id)
        attention_mask = np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, NOT_PREDICTED)
        for row, (ids, where, view) in enumerate(samples):
            tokens = slice(len(ids))
            input_ids[row, tokens], labels[row, tokens] = mask(
                ids,
                self._special[ids],
                seed=self.seed,
                sample=where,
                view=view,
                probability=self.probability,
                mask_token_id=self._mask_token_id,
                vocabulary=self._vocabulary,
                words=None if self._begins_word is None else self._begins_word[ids].cumsum() - 1,
            )
            attention_mask[row, tokens] = 1
        batch = {'input_ids': input_ids, 'attention_mask': attention_mask, 'labels': labels}
        return {key: torch.from_numpy(value) for key, value in batch.items()}


def split_batch(batch: Mapping[str, torch.Tensor], microbatch_size: int | float) -> list[dict[str, torch.Tensor]]:
    """Split a batch, and add to each part `positions`: where labels are, as indices into its flattened positions.

    Found out on the host, and taken along, they spare the device a halt: their number is not known there without one.
    """
    samples = {key: value for key, value in batch.items() if key != 'positions'}
    parts = default_split_batch(samples, microbatch_size)
    return [{**part, 'positions': _positions(part['labels'])} for part in parts]


def count_samples(batch: Mapping[str, torch.Tensor]) -> int:
    """Number of samples in a batch, or in a part of it."""
    return len(batch['input_ids'])


def count_tokens(batch: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """How many tokens are no padding (`total`), and how many are to be predicted (`loss_generating`).

    Of what is on a device, Composer asks for the latter alone, and for the former the device would have to halt.
    """
    positions = batch['positions'] if 'positions' in batch else _positions(batch['labels'])
    total = {'total': int(batch['attention_mask'].sum())} if positions.device.type == 'cpu' else {}
    return {**total, 'loss_generating': len(positions)}


#: What Composer's DataSpec is to know of these batches.
SPEC = {
    'split_batch': split_batch,
    'get_num_samples_in_batch': count_samples,
    'get_num_tokens_in_batch': count_tokens,
}


def _positions(labels: torch.Tensor) -> torch.Tensor:
    return (labels.flatten() != NOT_PREDICTED).nonzero().squeeze(1)
