"""Texts, or pairs of texts, with labels: tokenized once, padded batch by batch."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from composer.core import DataSpec
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast
from typing_extensions import Unpack

from composer_kd.data.dates import day_given, rows_between
from composer_kd.data.loader import LoaderOptions, check_split, data_spec, shows_loader_options
from composer_kd.data.tables import Row, read_table
from composer_kd.data.tensor_images import whole_batch
from composer_kd.data.text_files import TextError
from composer_kd.data.views import Key, as_keys
from composer_kd.tokenization import Tokenizer, load_tokenizer, tokenizer_digest

_MULTIPLE = 8  # of which lengths are, for the sake of tensor cores
_AT_ONCE = 10_000

Label = int | float
Example = tuple[str, str | None, Label]


class LabelledTexts(Dataset):
    """Tokens of texts and their labels, held in memory. Use it with `collate_fn=whole_batch`.

    Args:
        examples: texts, what they are paired with or None, and labels.
        tokenizer: makes tokens of them.
        max_length: tokens of the longest example; longer ones lose the end of the longer of their texts.
        num_labels: number of classes, 1 for grades.

    Raises:
        ValueError: `max_length` leaves no room for text.
    """

    has_views = False

    def __init__(
        self, examples: Iterable[Example], tokenizer: PreTrainedTokenizerFast, *, max_length: int, num_labels: int
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.num_labels = num_labels
        texts, pairs, labels = (list(column) for column in zip(*examples, strict=True))
        has_pairs = any(pair is not None for pair in pairs)
        special = tokenizer.num_special_tokens_to_add(pair=has_pairs)
        if max_length <= special:
            raise ValueError(f'max_length={max_length} leaves no room for text beside {special} special tokens')
        self.labels = torch.tensor(labels, dtype=torch.float32 if num_labels == 1 else torch.int64)
        self._tells_apart = has_pairs and 'token_type_ids' in tokenizer.model_input_names
        self._tokens, self._types, self._starts = self._tokenize(texts, pairs if has_pairs else None)

    def __len__(self) -> int:
        return len(self.labels)

    def identity(self) -> dict[str, Any]:
        """See `GivesViews`."""
        return {'max_length': self.max_length, 'tokenizer': tokenizer_digest(self.tokenizer)}

    def __getitem__(self, index: int | Key) -> dict[str, torch.Tensor]:
        """One example, padded."""
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int | Key]) -> dict[str, torch.Tensor]:
        """A batch: `input_ids`, `attention_mask`, `token_type_ids` of pairs, all (batch, length), and `labels`."""
        rows = as_keys(indices)[:, 0]
        spans = [slice(self._starts[row], self._starts[row + 1]) for row in rows]
        longest = max(span.stop - span.start for span in spans)
        shape = (len(spans), min(math.ceil(longest / _MULTIPLE) * _MULTIPLE, self.max_length))
        tokens = np.full(shape, self.tokenizer.pad_token_id or 0)
        mask, types = np.zeros(shape, np.int64), np.full(shape, self.tokenizer.pad_token_type_id)
        for place, span in enumerate(spans):
            length = span.stop - span.start
            tokens[place, :length] = self._tokens[span]
            types[place, :length] = self._types[span]
            mask[place, :length] = 1
        batch = {'input_ids': torch.from_numpy(tokens), 'attention_mask': torch.from_numpy(mask)}
        if self._tells_apart:
            batch['token_type_ids'] = torch.from_numpy(types)
        return batch | {'labels': self.labels[torch.from_numpy(rows)]}

    def _tokenize(self, texts: list[str], pairs: list[str] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All tokens in a row, their types, and where each example begins; the end of the last one is added."""
        tokens: list[np.ndarray] = []
        types: list[np.ndarray] = []
        lengths = [0]
        for start in range(0, len(texts), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            found = self.tokenizer(
                texts[part],
                None if pairs is None else pairs[part],
                truncation=True,
                max_length=self.max_length,
                return_token_type_ids=True,
                return_attention_mask=False,
            )
            ids: Any = found['input_ids']
            kinds: Any = found['token_type_ids']
            lengths += [len(sequence) for sequence in ids]
            tokens.append(np.array([token for sequence in ids for token in sequence], np.int32))
            types.append(np.array([kind for sequence in kinds for kind in sequence], np.int8))
        return np.concatenate(tokens), np.concatenate(types), np.cumsum(lengths)


@shows_loader_options
def text_classification(
    split: Literal['train', 'validation'],
    batch_size: int,
    *,
    file: str | Path,
    tokenizer: Tokenizer,
    text: str = 'sentence',
    text_pair: str | None = None,
    label: str = 'label',
    num_labels: int = 2,
    max_length: int = 128,
    date_column: str | None = None,
    since: str | None = None,
    before: str | None = None,
    num_workers: int = 0,
    **loader: Unpack[LoaderOptions],
) -> DataSpec:
    """Texts of one's own with labels, from a table; for the GLUE tasks there is `glue`.

    Args:
        split: whether the file is to learn from (`train`), or to measure by (`validation`).
        batch_size: texts in a batch over all ranks.
        file: a table: TSV with a header and no quoting, JSON lines (.jsonl), or Parquet.
        tokenizer: see `composer_kd.tokenization.load_tokenizer`; the model's.
        text: the column of the text. Default: `sentence`.
        text_pair: the column of a second text. Default: None, there is none.
        label: the column of the label: a class, counted from 0, or with `num_labels=1` a grade, any number.
            Default: `label`.
        num_labels: number of classes, 1 for grades. Default: 2.
        max_length: tokens of the longest example, longer ones are cut. Default: 128.
        date_column: the column of the date (`2024-01-31`, with or without a time of the day), for `since` and `before`.
            Default: None.
        since: leave out the rows of earlier days. Default: None, none of them.
        before: leave out the rows of this day and of later ones. Default: None, none of them.
        num_workers: processes that fetch batches on each rank; the rank itself is fast enough. Default: 0.
        **loader: options of `composer_kd.data.loader.data_spec`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no table, has no such column, or `since` or `before` is no date, or has no `date_column`.
        TextError: a row is damaged, or has a label that there is not, or no date, or no row is left.
    """
    check_split(split, 'train', 'validation')
    columns = (text, text_pair, label)
    rows, source = read_table(file), str(file)
    first, end = day_given('since', since), day_given('before', before)
    if date_column is not None:
        rows = rows_between(rows, date_column, first, end)
        source += ''.join(f', {name} {day}' for name, day in (('since', first), ('before', end)) if day)
    elif first or end:
        raise ValueError('since and before need to know the column of the date: set date_column')
    examples = examples_of(rows, columns, lambda value: class_or_grade(value, num_labels), source)
    dataset = LabelledTexts(examples, load_tokenizer(tokenizer), max_length=max_length, num_labels=num_labels)
    return data_spec(
        dataset,
        batch_size=batch_size,
        train=split == 'train',
        num_workers=num_workers,
        collate_fn=whole_batch,
        **loader,
    )


def examples_of(
    rows: Iterable[tuple[str, Row]],
    columns: tuple[str, str | None, str],
    label_of: Callable[[Any], Label],
    source: str,
) -> list[Example]:
    """The examples in the rows of a table.

    Args:
        rows: where each row stands, and its values by column.
        columns: those of the text, of a second text or None, and of the label.
        label_of: makes a label of a value; raises ValueError if it is none.
        source: what errors call the table.

    Raises:
        ValueError: there is no such column.
        TextError: a row has no text, or no label, or there are no rows.
    """
    examples: list[Example] = []
    for place, row in rows:
        for column in columns:
            if column is not None and column not in row:
                raise ValueError(f'{place}: there is no column {column!r}, but: {", ".join(row)}')
        texts = [None if column is None else row[column] for column in columns[:2]]
        for column, value in zip(columns[:2], texts, strict=True):
            if column is not None and not isinstance(value, str):
                raise TextError(f'{place}: {column} is no text but {value!r}')
        try:
            label = label_of(row[columns[2]])
        except ValueError as error:
            raise TextError(f'{place}: {columns[2]} is {row[columns[2]]!r}, which is {error}') from None
        examples.append((texts[0] or '', texts[1], label))
    if not examples:
        raise TextError(f'{source}: there is not one row in it')
    return examples


def class_or_grade(value: Any, num_labels: int, words: Sequence[str] = ()) -> Label:
    """A label: with `num_labels=1` a number, else a class, given by its number or its word.

    Raises:
        ValueError: it is none; the message ends a sentence that begins with `which is`.
    """
    if value in words:
        return words.index(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if num_labels == 1:
        if not math.isfinite(number):
            raise ValueError('no number')
        return number
    if not number.is_integer() or not 0 <= number < num_labels:
        known = f'a class from 0 to {num_labels - 1}' + (f', nor one of {", ".join(words)}' if words else '')
        raise ValueError(f'not {known}')
    return int(number)
