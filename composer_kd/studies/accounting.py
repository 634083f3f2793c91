"""What the runs of a sequence have found and cost, from the rows of results and from what the runs have logged."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer_kd.recipes.load import RecipeError
from composer_kd.studies.study import Study

_FILE = 'metrics.jsonl'


def evaluations(folder: Path, metric: str) -> list[dict[str, Any]]:
    """What a run has logged at each evaluation, but for the one that it ended with.

    Args:
        folder: Of the run, which may be at work.
        metric: What is compared.

    Raises:
        RecipeError: A line before the last one is damaged.
    """
    # After the last evaluation no batch comes, so that it is the last line.
    lines = enumerate(_lines(folder)[:-1], 1)
    return [_read(folder, number, line) for number, line in lines if json.dumps(metric) in line]


def seconds_spent(folder: Path) -> float | None:
    """Seconds of training in a run that is not finished, None if not one batch is.

    Raises:
        RecipeError: A line before the last one is damaged.
    """
    lines = _lines(folder)
    return json.loads(lines[-1])['seconds'] if lines else None


def with_costs(rows: Sequence[dict[str, Any]], metric: str, goal: str) -> list[dict[str, Any]]:
    """The rows of one arm, in order, with two more values each.

    `cumulated_seconds` are those of training up to the end of this run: teachers that were asked meanwhile, and what
    was recorded of them, are in it, and so are runs that were ended early or failed. `best_so_far` is the best quality
    of a finished run up to this one, None before there is any.

    Args:
        rows: The rows.
        metric: What is compared.
        goal: `max` or `min`.
    """
    seconds, best, costed = 0.0, None, []
    better = max if goal == 'max' else min
    for row in rows:
        seconds += row['train_seconds'] or 0.0
        value = quality(row, metric)
        if row['status'] == 'finished' and value is not None:
            best = value if best is None else better(best, value)
        costed.append(row | {'cumulated_seconds': seconds, 'best_so_far': best})
    return costed


def quality(row: dict[str, Any], metric: str) -> float | None:
    """The metric of a row; None if it has none, or one that is not finite."""
    value = float(row['metrics'].get(metric, 'nan'))
    return value if math.isfinite(value) else None


def table(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """All arms, run by run, as Markdown."""
    name = study.metric.rpartition('/')[2]
    head = ['arm', 'step', 'settings', name, 'best so far', 'seconds', 'teachers', 'cumulated']
    lines = [head, ['---'] * len(head)]
    for row in rows:
        value = _short(quality(row, study.metric))
        lines.append(
            [
                row['arm'],
                str(row['step']),
                ', '.join(f'{key.rpartition(".")[2]} {_short(value)}' for key, value in row['settings'].items()),
                value if row['status'] == 'finished' else f'{row["status"]} {value}'.strip(),
                _short(row['best_so_far']),
                *(f'{row[key] or 0:.1f}' for key in ('train_seconds', 'teacher_seconds', 'cumulated_seconds')),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ''.join(
        f'| {" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |\n' for line in lines
    )


def _lines(folder: Path) -> list[str]:
    """The lines of a run's metrics file; a last one that is torn, or being written, is left out."""
    path = folder / _FILE
    text = path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''
    lines = text[: text.rfind('\n') + 1].splitlines()
    if lines and not _is_whole(lines[-1]):
        lines.pop()
    for number, line in enumerate(lines, 1):
        if line.rfind('{"batch"') != 0 or not line.endswith('}'):  # quick, for it is done again and again
            raise _damaged(folder, number)
    return lines


def _read(folder: Path, number: int, line: str) -> dict[str, Any]:
    if not _is_whole(line):
        raise _damaged(folder, number)
    return json.loads(line)


def _is_whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _damaged(folder: Path, number: int) -> RecipeError:
    todo = f'delete {folder}, and the same command makes the run again'
    return RecipeError(f'{folder / _FILE}:{number}: this line is damaged; {todo}', 1)


def _short(value: Any) -> str:
    return '' if value is None else f'{value:.4g}' if isinstance(value, float) else str(value)
