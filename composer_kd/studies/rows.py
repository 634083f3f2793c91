"""The results of a study: a row for each of its runs, as lines of JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from composer_kd.files import write
from composer_kd.recipes.load import RecipeError

RESULTS_FILE = 'results.jsonl'
TABLE_FILE = 'results.csv'

_NUMBER = float | int | None
_TYPES = {
    **dict.fromkeys(('study', 'cell', 'method', 'role', 'status'), str),
    **dict.fromkeys(('settings', 'config', 'metrics'), dict),
    **dict.fromkeys(('train_seconds', 'teacher_seconds', 'teacher_training_seconds', 'recording_seconds'), _NUMBER),
    'baseline': bool,
    'command': list,
    'seed': int | None,
    'error': str | None,
    'arm': str | None,
    'step': int | None,
    'of': str | None,
    'versions': dict | None,
}


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of a study to `results.jsonl` in its folder, and flattened to `results.csv`."""
    import pandas  # takes a second

    table = pandas.json_normalize([{**row, 'command': ' '.join(row['command'])} for row in rows])
    write(folder / RESULTS_FILE, ''.join(f'{json.dumps(row, ensure_ascii=False)}\n' for row in rows))
    write(folder / TABLE_FILE, table.to_csv(index=False))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a study, none where no run has ended yet.

    Raises:
        RecipeError: The file cannot be read, or holds something else.
    """
    path = folder / RESULTS_FILE
    try:
        text = path.read_text(encoding='utf-8')
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f'{path}: cannot read the results: {getattr(error, "strerror", None) or error}', 1) from error
    # Not splitlines: values may hold other ends of lines.
    lines = text.removesuffix('\n').split('\n') if text else []
    return [_row(path, number, line) for number, line in enumerate(lines, 1)]


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not _is_row(row):
        todo = f'delete {path}, and the command that made it writes it anew from what the runs have left'
        raise RecipeError(f'{path}:{number}: this is no whole row of results; {todo}', 1)
    return row


def _is_row(row: Any) -> TypeGuard[dict[str, Any]]:
    if not isinstance(row, dict) or not all(isinstance(row.get(name, ...), kind) for name, kind in _TYPES.items()):
        return False
    return all(isinstance(part, str) for part in row['command'])
