"""Text as shards of numbered documents: local files, or the parts of a data set of the Hugging Face hub."""

from __future__ import annotations

import gzip
import json
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

OnError = Literal['fail', 'skip']

_LINES = ('.jsonl', '.json', '.txt')
_ENDINGS = (*_LINES, *(f'{ending}.gz' for ending in _LINES), '.parquet')
_BYTE_ORDER_MARK = b'\xef\xbb\xbf'


class TextError(RuntimeError):
    """Text that cannot be used."""


class Shard(Protocol):
    """A part of a body of text: documents in a fixed order, each with a number that never changes."""

    @property
    def identity(self) -> str:
        """Tells this shard from other ones, on any machine."""
        ...

    @property
    def size(self) -> int:
        """How large the shard is, against other ones."""
        ...

    @property
    def options(self) -> Mapping[str, str]:
        """What else decides its documents, under the names that people know it by."""
        ...

    def documents(self, start: int = 0, part: int = 0, parts: int = 1) -> Iterator[tuple[int, str]]:
        """Read documents one by one; the ones that are not asked for are passed over unparsed.

        Args:
            start: number of the first document. Default: 0.
            part: read the documents alone whose number leaves this remainder ... Default: 0.
            parts: ... when divided by this. Default: 1, all.

        Yields:
            The number of a document, and its text, which is not blank. Numbers ascend, not always by one.

        Raises:
            TextError: The shard is damaged, or has no document at all.
        """
        ...


@dataclass(frozen=True)
class TextFile:
    """A file as a shard.

    Args:
        path: JSON lines (.jsonl, .json), Parquet, or a document per line (.txt); all but Parquet may end in .gz.
        name: the file's name below the folder that was searched.
        text_key: key or column of the text in JSON lines and Parquet. Default: `text`.
        on_error: what to do about a line or row that holds no text: `fail`, or `skip` it and warn of how many there
            were at the end of the file. Default: `fail`.
        section: what errors put before the names of these two options. Default: nothing.
    """

    path: Path
    name: str
    text_key: str = 'text'
    on_error: OnError = 'fail'
    section: str = ''

    @property
    def identity(self) -> str:
        """Name and size."""
        return f'{self.name}, {self.size} bytes'

    @property
    def size(self) -> int:
        """In bytes."""
        return self.path.stat().st_size

    @property
    def options(self) -> Mapping[str, str]:
        """See `Shard`."""
        return {'text_key': self.text_key, 'on_error': self.on_error}

    def documents(self, start: int = 0, part: int = 0, parts: int = 1) -> Iterator[tuple[int, str]]:
        """See `Shard`; a document's number is that of its line or row, from 0."""
        unit = 'row' if self.path.suffix == '.parquet' else 'line'
        empty, skipped, first = True, 0, ''
        for number, raw in self._rows(start):
            if isinstance(raw, bytes) and not raw.strip():
                continue
            empty = False
            if number < start or number % parts != part:
                continue
            try:
                text = self._text(raw)
            except (ValueError, RecursionError) as error:
                if self.on_error == 'fail':
                    raise TextError(
                        f'{self.path}, {unit} {number + 1}: {error}; repair it, or set {self.section}on_error=skip to '
                        f'leave such {unit}s out'
                    ) from None
                skipped, first = skipped + 1, first or f'{unit} {number + 1}: {error}'
                continue
            if not text.isspace() and text:
                yield number, text
        if empty and start == 0:
            raise TextError(f'{self.path} has no text in it: remove it')
        if skipped:
            warnings.warn(f'{self.path}: left out {skipped} {unit}s that hold no text, first {first}', stacklevel=2)

    def _rows(self, start: int) -> Iterator[tuple[int, Any]]:
        """Number and content of the lines or rows; those before `start` may be missing."""
        import pyarrow

        try:
            yield from self._parquet_rows(start) if self.path.suffix == '.parquet' else self._lines()
        except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
            raise TextError(f'{self.path} is damaged or cut short, fetch it again: {_one_line(error)}') from error

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with gzip.open(self.path) if self.path.suffix == '.gz' else self.path.open('rb') as file:
            for number, line in enumerate(file):
                yield number, line.removeprefix(_BYTE_ORDER_MARK) if number == 0 else line

    def _parquet_rows(self, start: int) -> Iterator[tuple[int, Any]]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path) as file:
            columns = file.schema_arrow.names
            if self.text_key not in columns:
                todo = f'set {self.section}text_key to one of {columns}'
                raise TextError(f'{self.path} has no column {self.text_key!r}: {todo}')
            number = 0
            for group in range(file.num_row_groups):
                end = number + file.metadata.row_group(group).num_rows
                if end > start:
                    # Threads of Arrow's would be missing in a worker that is forked from here.
                    for batch in file.iter_batches(row_groups=[group], columns=[self.text_key], use_threads=False):
                        yield from enumerate(batch.column(0), start=number)
                        number += len(batch)
                number = end

    def _text(self, raw: Any) -> str:
        """Raises ValueError with the reason, if there is no text."""
        if not isinstance(raw, bytes):
            text = raw.as_py()
        else:
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                raise ValueError('not UTF-8') from None
            if self.path.name.removesuffix('.gz').endswith('.txt'):
                return text.strip()
            try:
                record = json.loads(text)
            except ValueError as error:
                raise ValueError(f'not JSON ({error})') from None
            if not isinstance(record, dict) or self.text_key not in record:
                raise ValueError(f'no JSON object with the key {self.text_key!r} (see {self.section}text_key)')
            text = record[self.text_key]
        if not isinstance(text, str):
            raise ValueError(f'{self.text_key!r} is no text but {type(text).__name__}')
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f'{self.text_key!r} holds half a surrogate pair') from None
        return text


def text_files(
    path: str | Path,
    text_key: str = 'text',
    on_error: OnError = 'fail',
    *,
    split: str | None = None,
    section: str = '',
) -> list[TextFile]:
    """The shards of a file or of a folder, searched with all folders in it, by name.

    Args:
        path: a file or a folder.
        text_key: see `TextFile`.
        on_error: see `TextFile`.
        split: `train` or `validation`: take the files alone whose name has this word in it; all of them for `train`,
            if no name has either word. Default: None, all files.
        section: see `TextFile`.

    Raises:
        FileNotFoundError: There is no such file, or none of the split.
        ValueError: A file's ending, or `on_error`, is unknown.
    """
    if on_error not in ('fail', 'skip'):
        raise ValueError(f'unknown {section}on_error {on_error!r}: choose fail or skip')
    path = Path(path).expanduser()
    if path.is_file():
        if not path.name.endswith(_ENDINGS):
            raise ValueError(f'{path}: text comes in files that end in {", ".join(_ENDINGS)}')
        return [TextFile(path, path.name, text_key, on_error, section)]
    if not path.is_dir():
        raise FileNotFoundError(f'no file or folder {path}')
    names = sorted(
        file.relative_to(path).as_posix()
        for file in path.rglob('*')
        if file.name.endswith(_ENDINGS)
        and not any(part.startswith('.') for part in file.relative_to(path).parts)
        and file.is_file()
    )
    if not names:
        raise FileNotFoundError(f'no text in the folder {path}: no file there ends in {", ".join(_ENDINGS)}')
    are_named = any(_has_word(name, word) for name in names for word in ('train', 'validation'))
    if split == 'validation' or (split and are_named):
        names = [name for name in names if _has_word(name, split)]
        if not names:
            todo = 'put one there, or take another eval_data, or none' if split == 'validation' else 'put one there'
            raise FileNotFoundError(f'no file in the folder {path} has {split!r} in its name: {todo}')
    return [TextFile(path / name, name, text_key, on_error, section) for name in names]


@dataclass(frozen=True)
class HubShard:
    """A part of a data set of the Hugging Face hub, read over the network while it is used.

    Args:
        identity: names the part.
        rows: a streaming `datasets.IterableDataset` of this part alone.
        text_key: column of the text. Default: `text`.
        size: see `Shard`. Default: 1, all are of one size.
    """

    identity: str
    rows: Any
    text_key: str = 'text'
    size: int = 1

    @property
    def options(self) -> Mapping[str, str]:
        """See `Shard`."""
        return {'text_key': self.text_key}

    def documents(self, start: int = 0, part: int = 0, parts: int = 1) -> Iterator[tuple[int, str]]:
        """See `Shard`; a document's number is that of its row, from 0."""
        try:
            for number, row in enumerate(self.rows.skip(start), start=start):
                if number % parts != part:
                    continue
                if not isinstance(text := row.get(self.text_key), str):
                    raise ValueError(f'no text under {self.text_key!r} in row {number + 1}, set text_key')
                if text.strip():
                    yield number, text
        except Exception as error:  # of any of the libraries that lie between here and the network
            raise TextError(f'{self.identity} cannot be read: {_one_line(error)}') from error


def hub_shards(name: str, config: str, split: str, *, text_key: str = 'text') -> Sequence[HubShard]:
    """The shards of a data set of the Hugging Face hub.

    Raises:
        FileNotFoundError: The hub cannot be reached, or has no such data set.
    """
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        parts = rows.num_shards
        return [
            HubShard(f'{name} {config} {split} {part}/{parts}', rows.shard(num_shards=parts, index=part), text_key)
            for part in range(parts)
        ]
    except Exception as error:  # as above
        raise FileNotFoundError(
            f'cannot read {name} from the Hugging Face hub ({type(error).__name__}): set data_dir to a folder with its '
            'files, or HF_ENDPOINT to a mirror that can be reached'
        ) from error


def _has_word(name: str, word: str) -> bool:
    return re.search(rf'(?<![a-z]){word}(?![a-z])', name.lower()) is not None


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split()) or type(error).__name__
