"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from composer_kd.studies import report_tables as tables
from composer_kd.studies.report_findings import Findings
from composer_kd.studies.report_tables import Table
from composer_kd.studies.report_words import ONCE, answer, beside_it, charge_text, course_sentence, metric_of, sentence


def markdown(findings: Findings, pictures: Sequence[str]) -> str:
    """The whole text.

    Args:
        findings: What there is to say.
        pictures: File names of the pictures, which lie beside it.
    """
    metric = metric_of(findings)
    parts = [f'# {", ".join(results.name for results in findings.results)}', f'**{answer(findings)}**']
    parts += [f'{beside_it(findings)} {charge_text(findings)}'.strip()]
    parts += [f'![{name.removesuffix(".png").replace("_", " ")}]({name})' for name in pictures]
    if findings.courses:
        parts += [
            '## Speed-up',
            _list(course_sentence(f, metric) for f in findings.courses if not f.course.is_baseline),
        ]
        parts += [_table(tables.sequences(findings)), *map(_table, tables.reached(findings))]
        parts += ['## Runs', _table(tables.steps(findings))]
    else:
        parts += ['## Speed-up', _list(sentence(f, metric) for f in findings.lines if not f.line.is_baseline)]
        parts += [_table(tables.speedups(findings)), '## Runs', _table(tables.points(findings))]
    if (costs := tables.costs(findings)).rows:
        parts += ['## What teachers cost', _table(costs)]
        parts += [ONCE] if findings.lines else []
    if said := tables.warnings(findings):
        parts += ['## Left out, and doubtful', _list(said)]
    made_with = tables.surroundings(findings)
    parts += ['## How it was made', _table(made_with), _table(tables.commands(findings), code=True)]
    return '\n\n'.join(parts) + '\n'


def _list(items: Iterable[str]) -> str:
    return '\n'.join(f'- {_plain(item)}' for item in items)


def _table(table: Table, code: bool = False) -> str:
    """A table, whose last column may be code."""
    rows = [[_plain(cell) for cell in row] for row in table.rows]
    if code:
        rows = [[*row[:-1], f'`{row[-1]}`'] for row in rows]
    lines = [table.head, ['---'] * len(table.head), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _plain(text: str) -> str:
    return ' '.join(text.replace('|', '\\|').split())
