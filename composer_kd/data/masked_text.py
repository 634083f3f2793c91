"""Text for masked language modelling: local files, C4, and the documentation that comes with Python."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import Dataset
from typing_extensions import Unpack

from composer_kd.data.loader import LoaderOptions, check_split, data_spec, shows_loader_options
from composer_kd.data.masking import SPEC, MaskedBatch, Sample
from composer_kd.data.python_topics import paragraphs
from composer_kd.data.sequences import Sequences, Tokens
from composer_kd.data.stream import stream_spec
from composer_kd.data.text_files import OnError, hub_shards, text_files
from composer_kd.data.views import Key
from composer_kd.tokenization import Tokenizer, load_tokenizer, tokenizer_digest

Split = Literal['train', 'validation']

_C4 = 'allenai/c4', 'en'
_C4_SAMPLES = 10_000
_C4_WORKERS = 8
_DOCS_HOLDOUT = 0.1


class TextInMemory(Dataset):
    """Sequences of tokens, all in memory. Asked for (index, view) it gives the sample for this view of it.

    Args:
        sequences: what to hold.
        masked_batch: knows the tokenizer.
    """

    has_views = True

    def __init__(self, sequences: Iterable[Tokens], masked_batch: MaskedBatch):
        ids = [sequence.ids for sequence in sequences]
        self.tokenizer = masked_batch.tokenizer
        self.max_length = masked_batch.max_length
        self._masking = {
            'mask_seed': masked_batch.seed,
            'masking_probability': masked_batch.probability,
            'whole_word_masking': masked_batch.whole_words,
        }
        # Two arrays, not a million: workers that are forked from here share them, and do not count references to them.
        self._tokens = np.concatenate([np.empty(0, dtype=np.int32), *ids])
        self._ends = np.cumsum([0, *map(len, ids)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def identity(self) -> dict[str, Any]:
        """See `GivesViews`."""
        return {**self._masking, 'max_length': self.max_length, 'tokenizer': tokenizer_digest(self.tokenizer)}

    def __getitem__(self, index: int | Key) -> Sample:
        """One sample, in view 0 unless another is asked for."""
        index, view = index if isinstance(index, tuple) else (index, 0)
        return Sample(self._tokens[self._ends[index] : self._ends[index + 1]], (index,), view)


@shows_loader_options
def text(
    split: Split,
    batch_size: int,
    *,
    path: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    holdout: float = 0.0,
    text_key: str = 'text',
    on_error: OnError = 'fail',
    max_length: int = 128,
    pack: bool = False,
    masking_probability: float = 0.15,
    whole_word_masking: bool = False,
    mask_seed: int = 0,
    views: int | None = None,
    num_workers: int = 0,
    **loader: Unpack[LoaderOptions],
) -> DataSpec:
    """Local text, tokenized when the run starts and held in memory, for masked language modelling.

    Batches have `input_ids`, `attention_mask` and `labels`, int64 (samples, length): labels are -100 wherever there is
    nothing to predict. Length is that of the longest sample, rounded up to a multiple of 8.

    Masks are a function of `mask_seed`, sample and view: a training sample gets others in each epoch, or as many as
    `views`, an evaluation sample the same ones always, and a resumed run goes on with those it would have had.

    Args:
        split: `train` or `validation`: how to go through the text, and, with `holdout`, which part of it to take.
        batch_size: samples in a batch over all ranks.
        path: a file, or a folder with all folders in it: JSON lines (.jsonl, .json), Parquet, or a document per line
            (.txt); all but Parquet may be compressed (.gz). Or several of these, which are taken together.
        tokenizer: see `composer_kd.tokenization.load_tokenizer`.
        holdout: share of the documents that is kept for validation, where one path has both splits; a document's own
            text decides, so the same one is never in both. Default: 0, each split is all of the path.
        text_key: key or column of the text in JSON lines and Parquet. Default: `text`.
        on_error: what to do about lines that hold no text: `fail`, or `skip` them with a warning. Default: `fail`.
        max_length: tokens in a sample at most, [CLS] and [SEP] included. Default: 128.
        pack: whether documents, joined by [SEP], fill one sample after another, so that there is next to no padding;
            otherwise a document is a sample, and what is too long is cut off. Default: False.
        masking_probability: share of the tokens to predict. Default: 0.15.
        whole_word_masking: whether all pieces of a word are predicted together. Default: False.
        mask_seed: chooses the masks. Default: 0.
        views: how many masks each sample has, taken in turn from epoch to epoch; for split=train. Default: None, new
            ones in each epoch.
        num_workers: processes that make batches on each rank; the rank itself is fast enough. Default: 0.
        **loader: options of `composer_kd.data.loader.data_spec`.

    Raises:
        FileNotFoundError: There is no such path, or no text in it.
        TextError: A file is damaged, or has no text in it.
        ValueError: An option is out of range, or the tokenizer is not for masked language modelling.
    """
    check_split(split, 'train', 'validation')
    if not 0 <= holdout < 1:
        raise ValueError(f'holdout is a share of the documents, from 0 up to 1, not {holdout}')
    paths = [path] if isinstance(path, str | Path) else path
    shards = [shard for each in paths for shard in text_files(each, text_key, on_error)]
    documents = (_split(shard.documents(), split, holdout) for shard in shards)
    return _in_memory(
        documents,
        MaskedBatch(load_tokenizer(tokenizer), max_length, mask_seed, masking_probability, whole_word_masking),
        pack=pack,
        holdout=holdout,
        batch_size=batch_size,
        train=split == 'train',
        num_workers=num_workers,
        views=views,
        **loader,
    )


@shows_loader_options
def c4(
    split: Split,
    batch_size: int,
    *,
    tokenizer: Tokenizer,
    data_dir: str | Path | None = None,
    samples: int | None = None,
    text_key: str = 'text',
    on_error: OnError = 'fail',
    max_length: int = 128,
    pack: bool = False,
    shuffle_buffer: int = 10_000,
    masking_probability: float = 0.15,
    whole_word_masking: bool = False,
    mask_seed: int = 0,
    num_workers: int | None = None,
    **loader: Unpack[LoaderOptions],
) -> DataSpec:
    """C4, or any folder of text too large to be held in memory, for masked language modelling.

    Training streams the text without end, so `max_duration` must be in batches, samples or tokens: no epoch ever ends.
    A resumed run goes on with the very next sample, given as many ranks and workers as before. Each pass through the
    text has another order and other masks. Evaluation holds the first samples in memory, with the same masks always.

    Batches are as `text` makes them.

    Args:
        split: `train` or `validation`.
        batch_size: samples in a batch over all ranks.
        tokenizer: see `composer_kd.tokenization.load_tokenizer`.
        data_dir: a folder with files as in `text`, of which those are read that have the split in their name, as C4's
            own do (c4-train.00000-of-01024.json.gz); training reads all if none has a split. Default: None,
            `allenai/c4` in English, read from the Hugging Face hub while it is used.
        samples: samples to evaluate on; for split=validation. Default: None, 10,000.
        text_key: key or column of the text. Default: `text`.
        on_error: what to do about lines of files in `data_dir` that hold no text: `fail`, or `skip` them with a
            warning. Default: `fail`.
        max_length: tokens in a sample at most, [CLS] and [SEP] included. Default: 128.
        pack: whether documents, joined by [SEP], fill one sample after another, so that there is next to no padding;
            otherwise a document is a sample, and what is too long is cut off. Default: False.
        shuffle_buffer: samples that are shuffled among each other; each worker holds twice as many. Default: 10,000.
        masking_probability: share of the tokens to predict. Default: 0.15.
        whole_word_masking: whether all pieces of a word are predicted together. Default: False.
        mask_seed: chooses the masks. Default: 0.
        num_workers: processes that read and tokenize on each rank. Default: None, in training 8, or one for each core
            that a rank has if these are fewer; 0 in evaluation.
        **loader: options of `composer_kd.data.loader.data_spec`; training has neither `drop_last` nor
            `persistent_workers`, as its epoch does not end.

    Raises:
        FileNotFoundError: There is no text of the split in `data_dir`, or the hub cannot be reached.
        TextError: A file of the validation split is damaged, or has no text in it.
        ValueError: An option is out of range or not for this split, or the tokenizer is not for masked language
            modelling.
    """
    check_split(split, 'train', 'validation')
    train = split == 'train'
    masked_batch = MaskedBatch(
        load_tokenizer(tokenizer), max_length, mask_seed, masking_probability, whole_word_masking
    )
    if data_dir is None:
        shards = hub_shards(*_C4, split, text_key=text_key)
    else:
        shards = text_files(data_dir, text_key, on_error, split=split)
    if not train:
        return _in_memory(
            (shard.documents() for shard in shards),
            masked_batch,
            pack=pack,
            samples=_C4_SAMPLES if samples is None else samples,
            batch_size=batch_size,
            train=False,
            num_workers=num_workers or 0,
            **loader,
        )
    if samples is not None:
        raise ValueError('samples is for split=validation: training streams all of the text')
    for option in ('drop_last', 'persistent_workers'):
        if loader.pop(option, None) is not None:
            raise ValueError(f'{option} is for split=validation: training streams text without end')
    return stream_spec(
        shards,
        Sequences(masked_batch.tokenizer, max_length, pack),
        masked_batch,
        batch_size=batch_size,
        num_workers=_workers() if num_workers is None else num_workers,
        shuffle_buffer=shuffle_buffer,
        **loader,  # pyright: ignore[reportCallIssue]
    )


@shows_loader_options
def python_docs(
    split: Split,
    batch_size: int,
    *,
    tokenizer: Tokenizer,
    max_length: int = 128,
    pack: bool = False,
    masking_probability: float = 0.15,
    whole_word_masking: bool = False,
    mask_seed: int = 0,
    views: int | None = None,
    num_workers: int = 0,
    **loader: Unpack[LoaderOptions],
) -> DataSpec:
    """The prose of Python's own documentation, some 270,000 characters that are always there, as `text` makes batches.

    About a tenth of the paragraphs is for validation, the same ones in every run with the same version of Python.

    Args:
        split: `train` or `validation`.
        batch_size: samples in a batch over all ranks.
        tokenizer: see `composer_kd.tokenization.load_tokenizer`; `{text: python_docs, vocabulary: 4096}` trains one.
        max_length: tokens in a sample at most, [CLS] and [SEP] included. Default: 128.
        pack: whether paragraphs, joined by [SEP], fill one sample after another, so that there is next to no padding;
            otherwise a paragraph is a sample, and what is too long is cut off. Default: False.
        masking_probability: share of the tokens to predict. Default: 0.15.
        whole_word_masking: whether all pieces of a word are predicted together. Default: False.
        mask_seed: chooses the masks. Default: 0.
        views: how many masks each sample has, taken in turn from epoch to epoch; for split=train. Default: None, new
            ones in each epoch.
        num_workers: processes that make batches on each rank; the rank itself is fast enough. Default: 0.
        **loader: options of `composer_kd.data.loader.data_spec`.

    Raises:
        ValueError: An option is out of range, or the tokenizer is not for masked language modelling.
    """
    check_split(split, 'train', 'validation')
    return _in_memory(
        [_split(enumerate(paragraphs()), split, _DOCS_HOLDOUT)],
        MaskedBatch(load_tokenizer(tokenizer), max_length, mask_seed, masking_probability, whole_word_masking),
        pack=pack,
        batch_size=batch_size,
        train=split == 'train',
        num_workers=num_workers,
        views=views,
        **loader,
    )


def training_text(path: str, text_key: str, on_error: OnError) -> Iterator[str]:
    """The documents to train a tokenizer on: those of `python_docs`, or of a file or folder."""
    if path == 'python_docs':
        shards = [_split(enumerate(paragraphs()), 'train', _DOCS_HOLDOUT)]
    else:
        shards = (file.documents() for file in text_files(path, text_key, on_error, section='tokenizer.'))
    return (document for shard in shards for _, document in shard)


def _in_memory(
    shards: Iterable[Iterable[tuple[int, str]]],
    masked_batch: MaskedBatch,
    *,
    pack: bool,
    batch_size: int,
    train: bool,
    num_workers: int,
    samples: int | None = None,
    holdout: float = 0.0,
    views: int | None = None,
    **loader: Unpack[LoaderOptions],
) -> DataSpec:
    cut = Sequences(masked_batch.tokenizer, masked_batch.max_length, pack)
    sequences = (sequence for documents in shards for sequence in cut(documents))
    dataset = TextInMemory(islice(sequences, samples), masked_batch)
    if holdout and not len(dataset):
        what, todo = ('train', 'smaller') if train else ('evaluate', 'larger')
        raise ValueError(f'holdout={holdout} leaves no samples to {what} on: take a {todo} share, or more text')
    return data_spec(
        dataset,
        batch_size=batch_size,
        train=train,
        num_workers=num_workers,
        collate_fn=masked_batch,
        views=views,
        **SPEC,
        **loader,
    )


def _workers() -> int:
    """How many a rank has where nobody says."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, min(_C4_WORKERS, cores // dist.get_local_world_size()))


def _split(documents: Iterable[tuple[int, str]], split: str, holdout: float) -> Iterator[tuple[int, str]]:
    """The documents of a split, of which validation has the share `holdout`; each has all of them if that is 0."""
    for number, text in documents:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if not holdout or (split == 'validation') == (int.from_bytes(digest, 'big') < holdout * 2**64):
            yield number, text
