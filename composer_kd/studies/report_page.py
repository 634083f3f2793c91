"""A report as one page that needs nothing else, and no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from composer_kd.recipes.load import RecipeError
from composer_kd.studies import report_tables as tables
from composer_kd.studies.report_figures import MUTED, colour_of, figures
from composer_kd.studies.report_findings import Findings
from composer_kd.studies.report_tables import Table
from composer_kd.studies.report_words import ONCE, answer, beside_it, charge_text, course_sentence, metric_of, sentence

_MARKS = '●■◆✚✖★⬢⬟'  # as the figures have them
_TEMPLATE = Path(__file__).with_name('report_page.html')

_TIME = (
    'Small: every run. Large: the mean over seeds at each length. The line is the best quality that so many seconds '
    'buy, which is what speed-ups are read from; dotted is the Pareto frontier of all methods. {goal}'
)
_SPEEDUP = (
    'Seconds of the baseline / seconds of the method at each quality that both reach; the mark is the headline. Bands '
    'are 95 % intervals by the bootstrap over seeds, shown where 95 % of the resamples have that quality. A triangle '
    'is a bound of curves that do not overlap, and points to where the speed-up lies.'
)
_COST = {
    'search': 'Marks: each run that was finished, at the seconds that all runs up to it have taken. Line: the best so '
    'far. {goal}',
    'other': 'Each run, at the seconds that all runs up to it have taken. {goal}',
}


def page(findings: Findings, pictures: Sequence[str]) -> str:
    """The whole page.

    Args:
        findings: What there is to say.
        pictures: File names of the pictures, which lie beside it.

    Raises:
        RecipeError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise RecipeError("the report needs plotly: pip install 'composer-kd[studies]'", 1) from error
    drawn = json.dumps(figures(findings), allow_nan=False).replace('<', '\\u003c')
    names = [found.line.name for found in findings.lines] + [found.course.name for found in findings.courses]
    return Template(_TEMPLATE.read_text(encoding='utf-8')).substitute(
        title=escape(', '.join(results.name for results in findings.results)),
        answer=escape(answer(findings)),
        beside=escape(f'{beside_it(findings)} {charge_text(findings)}'),
        pictures=escape(', '.join(pictures)),
        chips=''.join(map(_chip, range(len(names)), names)) + ('' if findings.courses else _frontier_chip()),
        body='\n'.join(_body(findings)),
        figures=drawn,
        plotly=get_plotlyjs(),
    )


def _body(findings: Findings) -> list[str]:
    metric = metric_of(findings)
    goal = 'Higher is better.' if findings.results[0].goal == 'max' else 'Lower is better.'
    if findings.courses:
        caption = _COST.get(findings.results[0].kind, _COST['other'])
        said = [course_sentence(f, metric) for f in findings.courses if not f.course.is_baseline]
        parts = [_plot('cost', f'{metric.label} over training time', caption.format(goal=goal))]
        parts += ['<h2>Speed-up</h2>', _list(said), _table(tables.sequences(findings), 'What each arm cost')]
        parts += [_table(table, 'When each quality was reached') for table in tables.reached(findings)]
        parts += ['<h2>Runs</h2>', _table(tables.steps(findings), 'Each step', text=2)]
    else:
        said = [sentence(f, metric) for f in findings.lines if not f.line.is_baseline]
        parts = [_plot('time', f'{metric.label} over training time', _TIME.format(goal=goal))]
        parts += ['<h2>Speed-up</h2>', _table(tables.speedups(findings), 'Speed-ups', text=5)]
        if any(found.comparison for found in findings.lines):
            parts.append(_plot('speedup', f'Speed-up over {metric.label}', _SPEEDUP))
        parts += [_list(said), '<h2>Runs by length</h2>', _table(tables.points(findings), 'Runs by length')]
    if (costs := tables.costs(findings)).rows:
        parts += ['<h2>What teachers cost</h2>', _table(costs, 'What teachers cost', bar=1)]
        if findings.lines:
            parts.append(f'<p class="soft">{ONCE}</p>')
    if said := tables.warnings(findings):
        parts += ['<h2>Left out, and doubtful</h2>', _list(said)]
    parts += ['<h2>How it was made</h2>', _table(tables.surroundings(findings), 'Surroundings', text=1)]
    every = tables.runs(findings)
    return [*parts, f'<details><summary>All {len(every.rows)} runs</summary>{_table(every, "Runs", code=8)}</details>']


def _plot(name: str, label: str, caption: str) -> str:
    figure = f'<div class="plot" id="plot-{name}" role="img" aria-label="{escape(label)}"></div>'
    return f'<figure>{figure}<figcaption>{escape(caption)}</figcaption></figure>'


def _chip(index: int, name: str) -> str:
    mark = f'<span class="mark" style="--c: var(--c{colour_of(index)})">{_MARKS[index % len(_MARKS)]}</span>'
    return f'<button type="button" aria-pressed="true" data-group="{index}">{mark}{escape(name)}</button>'


def _frontier_chip() -> str:
    mark = '<span class="mark" style="--c: var(--soft)">┈</span>'
    return f'<button type="button" aria-pressed="true" data-group="{MUTED}">{mark}Pareto frontier</button>'


def _list(items: Sequence[str]) -> str:
    return f'<ul>{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'


def _table(table: Table, label: str, bar: int | None = None, text: int | None = None, code: int | None = None) -> str:
    """A table, which scrolls where the window is too narrow.

    Args:
        table: What is in it.
        label: What it is, for those who do not see it.
        bar: The column whose shares get a bar.
        text: The column whose text may have several lines.
        code: The column that is code.
    """

    def cell(column: int, value: str) -> str:
        if column == 0:
            return f'<th scope="row">{escape(value)}</th>'
        if column == bar:
            return f'<td><span class="bar" style="--share: {escape(value)}"></span>{escape(value)}</td>'
        kind = ' class="text"' if column == text else ' class="code"' if column == code else ''
        return f'<td{kind}>{escape(value)}</td>'

    head = ''.join(f'<th scope="col">{escape(name)}</th>' for name in table.head)
    rows = ''.join(f'<tr>{"".join(map(cell, range(len(row)), row))}</tr>' for row in table.rows)
    head = f'<thead><tr>{head}</tr></thead>' if any(table.head) else ''
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<table>{head}<tbody>{rows}</tbody></table></div>'
    )
