"""Rows of TSV, JSON lines and Parquet files, each with its place, so that a bad one can be named."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from composer_kd.data.text_files import TextError

ENDINGS = ('.tsv', '.jsonl', '.parquet')

Row = dict[str, Any]


def read_table(
    path: str | Path, columns: Sequence[str] | None = None, *, drop_short: bool = False, drop_surplus: bool = False
) -> Iterator[tuple[str, Row]]:
    """Read a table row by row.

    Fields of TSV are what stands between tabs: a quotation mark is a character like others.

    Args:
        path: a file that ends in .tsv (or .txt, read as one), .jsonl or .parquet; UTF-8.
        columns: names of the columns of a TSV file that has no header. Default: None, its first line has them.
        drop_short: leave out lines of a TSV file that have too few fields. Default: False, they are an error.
        drop_surplus: leave out fields of a TSV file that have no column. Default: False, they are an error.

    Yields:
        Where the row stands, `FILE:LINE`, and its values by column.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no table.
        TextError: a row is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'no such file: {path}')
    if path.suffix == '.parquet':
        yield from _parquet(path)
    elif path.suffix == '.jsonl':
        yield from _json_lines(path)
    elif path.suffix in ('.tsv', '.txt'):
        yield from _tsv(path, columns, drop_short, drop_surplus)
    else:
        raise ValueError(f'{path}: a table of texts ends in {", ".join(ENDINGS)}')


def header_of(path: Path) -> list[str]:
    """The fields of the first line of a TSV file, whether they are names or not."""
    return next((line.split('\t') for _, line in _lines(path)), [])


def _tsv(path: Path, columns: Sequence[str] | None, drop_short: bool, drop_surplus: bool) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(path):
        fields = line.split('\t')
        if columns is None:
            columns = fields
            continue
        short, surplus = len(fields) < len(columns), len(fields) > len(columns)
        if short and drop_short:
            continue
        if short or (surplus and not drop_surplus):
            raise TextError(f'{path}:{number}: {len(fields)} fields between tabs, not {len(columns)}; repair this line')
        yield f'{path}:{number}', dict(zip(columns, fields, strict=False))


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(f'{path}:{number}: not JSON; repair this line') from error
        if not isinstance(row, dict):
            raise TextError(f'{path}:{number}: no JSON object; repair this line')
        yield f'{path}:{number}', row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, by number."""
    number = 0
    try:
        # Text has other characters at which str.splitlines and csv would break a line; a file has only these.
        with path.open(encoding='utf-8-sig', newline='\n') as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.removesuffix('\n').removesuffix('\r')
    except UnicodeDecodeError as error:
        raise TextError(f'{path}:{number + 1}: not UTF-8, here or in the next lines; repair the file') from error


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f'{path}:{number}', row
    except (OSError, pyarrow.ArrowException) as error:
        raise TextError(f'{path} is damaged or cut short, fetch it again') from error
