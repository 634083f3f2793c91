"""The tables and lists of a report, as text that Markdown and HTML show alike."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from composer_kd.studies.curves import Row, charged
from composer_kd.studies.report_findings import Findings
from composer_kd.studies.report_words import (
    Metric,
    factor_text,
    interval_text,
    metric_of,
    notes,
    seconds_text,
    settings_text,
    speedup_text,
)


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it.

    Args:
        head: Of each column.
        rows: Of text.
    """

    head: list[str]
    rows: list[list[str]]


def speedups(findings: Findings) -> Table:
    """The speed-up of each curve."""
    metric, rows = metric_of(findings), []
    for found in findings.lines:
        comparison, best = found.comparison, '' if found.curve is None else metric.text(found.curve.best[-1])
        if comparison is None:
            rows.append([found.line.name, *[''] * 3, best, 'baseline' if found.line.is_baseline else 'no baseline'])
            continue
        interval, at = interval_text(comparison.interval), metric.text(comparison.speedup.quality)
        rows.append([found.line.name, speedup_text(comparison), interval, at, best, notes(comparison)])
    return Table(['curve', 'speed-up', '95 % interval', 'at', 'best', ''], rows)


def points(findings: Findings) -> Table:
    """Quality and seconds of each curve at each length, over the seeds."""
    metric, rows = metric_of(findings), []
    for found in findings.lines:
        runs = found.line.runs
        for length, indices in found.line.points():
            quality, seconds = ([values[i] for i in indices] for values in (runs.quality, runs.seconds))
            spread = (_spread(quality, metric.text), _spread(seconds, seconds_text))
            rows.append([found.line.name, length, str(len(indices)), *spread])
    head = ['curve', 'length', 'runs', f'{metric.name.rpartition("/")[2]}, median (low - high)']
    return Table([*head, 'seconds charged, median (low - high)'], rows)


def costs(findings: Findings) -> Table:
    """What teachers cost, of each curve or arm that has some: their share of the training, and what is paid once."""
    rows, head = [], ['', "teachers' share of the training"]
    for course in (found.course for found in findings.courses):
        if share := teachers_share(course.rows):
            rows.append([course.name, f'{share:.1%}'])
    for line in (found.line for found in findings.lines):
        share = teachers_share(line.rows)
        once = [max((row[key] or 0.0 for row in line.rows), default=0.0) for key in _ONCE]
        if share or any(once):
            rows.append([line.name, f'{share:.1%}', *(seconds_text(each) if each else '' for each in once)])
    return Table(head if findings.courses else [*head, 'training of the teachers, once', 'recording, once'], rows)


def teachers_share(rows: Iterable[Row]) -> float:
    """The share of the training that teachers take."""
    seconds = [(row['teacher_seconds'] or 0.0, row['train_seconds'] or 0.0) for row in rows]
    total = sum(of_all for _, of_all in seconds)
    return sum(of_teachers for of_teachers, _ in seconds) / total if total else 0.0


def sequences(findings: Findings) -> Table:
    """What each sequence cost, and reached."""
    metric, rows = metric_of(findings), []
    for found in findings.courses:
        course, speedup = found.course, found.speedup
        ended = [sum(row['status'] == status for row in course.rows) for status in ('finished', 'pruned', 'failed')]
        quality = (_text(metric, course.steps.best[-1]), _text(metric, course.steps.quality[-1]))
        total = seconds_text(course.steps.total[-1])
        how = ['baseline' if course.is_baseline else '', '']
        if speedup:
            how = [factor_text(speedup.factor), metric.text(speedup.quality)]
        rows.append([course.name, *map(str, ended), total, *quality, *how])
    head = ['arm', 'finished', 'pruned', 'failed', 'seconds charged', 'best', 'last', 'speed-up', 'at']
    return Table(head, rows)


def reached(findings: Findings) -> list[Table]:
    """For each baseline of sequences: when each quality that it reached was reached first."""
    metric, tables = metric_of(findings), []
    for baseline in (found.course for found in findings.courses if found.course.is_baseline):
        ours = [found.course for found in findings.courses if found.course.results is baseline.results]
        rows = []
        for quality in dict.fromkeys(q for q in baseline.steps.best if not math.isnan(q)):
            seconds = [float(course.steps.seconds_for(quality)) for course in ours]
            of_baseline = float(baseline.steps.seconds_for(quality))
            cells = [
                'never' if math.isnan(s) else f'{seconds_text(s)} ({factor_text(of_baseline / s)})' for s in seconds
            ]
            rows.append([metric.text(quality), *cells])
        tables.append(Table(['reached first after', *(course.name for course in ours)], rows))
    return tables


def steps(findings: Findings) -> Table:
    """Each run of each sequence."""
    metric, rows = metric_of(findings), []
    for course in (found.course for found in findings.courses):
        for index, row in enumerate(course.rows):
            quality = _text(metric, course.steps.quality[index]) or row['status']
            seconds = [seconds_text(values[index]) for values in (course.steps.seconds, course.steps.total)]
            best = _text(metric, course.steps.best[index])
            rows.append([course.name, str(row['step']), settings_text(row['settings']), quality, best, *seconds])
    return Table(['arm', 'step', 'settings', metric.label, 'best so far', 'seconds charged', 'cumulated'], rows)


def runs(findings: Findings) -> Table:
    """Every run, with its command."""
    metric, rows = metric_of(findings), []
    for results in findings.results:
        for row in results.rows:
            figures = [_text(metric, results.quality(row)) if row['role'] == 'student' else '']
            figures += [seconds_text(row[key]) if row[key] else '' for key in ('train_seconds', 'teacher_seconds')]
            figures.append(seconds_text(seconds) if (seconds := charged(row, findings.charge)) else '')
            seed = '' if row['seed'] is None else str(row['seed'])
            rows.append([row['cell'], row['role'], row['status'], seed, *figures, command(row)])
    head = ['run', 'role', 'status', 'seed', metric.label, 'training', "of it the teachers'", 'charged', 'command']
    return Table(head, rows)


def command(row: Row) -> str:
    """What a person types to start a run."""
    return shlex.join(['composer-kd' if row['role'] == 'record' else 'composer', *row['command']])


def commands(findings: Findings) -> Table:
    """The command of one run of each curve or arm; the others differ in length, seed and name."""
    found = [(found.line.name, found.line.rows) for found in findings.lines]
    found += [(found.course.name, found.course.rows) for found in findings.courses]
    return Table(['', 'one of its commands'], [[name, command(rows[-1])] for name, rows in found if rows])


def surroundings(findings: Findings) -> Table:
    """What the runs were made on, and with."""
    rows = [row for results in findings.results for row in results.students if row['status'] != 'failed']
    kinds: dict[str, Callable[[Row], Any]] = {
        'studies': lambda row: row['study'],
        'hardware': lambda row: f'{row.get("world_size")} x {row.get("device")}, {row.get("precision")}',
        'versions': lambda row: ', '.join(f'{name} {value}' for name, value in (row.get('versions') or {}).items()),
        'commit': lambda row: str(row.get('git_commit')),
    }
    return Table(['', ''], [[name, ' | '.join(dict.fromkeys(map(of, rows)))] for name, of in kinds.items()])


def warnings(findings: Findings) -> list[str]:
    """What makes the comparison doubtful, or is not in it."""
    said = []
    for results in findings.results:
        places = {f'{row.get("world_size")} x {row.get("device")}' for row in results.students if row.get('device')}
        if len(places) > 1:
            said.append(f'{results.name}: runs on different hardware ({", ".join(sorted(places))}) do not compare.')
        for row in results.judged():
            if row['status'] == 'failed':
                last = (row['error'] or '').strip().splitlines()[-1:]
                said.append(f'{row["cell"]} failed and is left out: {"".join(last) or "see its log"}')
            elif row['role'] == 'student' and row['status'] == 'finished' and math.isnan(results.quality(row)):
                said.append(f'{row["cell"]} is left out: its {results.metric} is {row["metrics"][results.metric]}')
    return [*said, *(f'Not there yet: {run}' for run in findings.missing)]


_ONCE = ('teacher_training_seconds', 'recording_seconds')


def _spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    if len(values) == 1:
        return text(values[0])
    return f'{text(median(values))} ({text(min(values))} - {text(max(values))})'


def _text(metric: Metric, quality: float) -> str:
    return '' if np.isnan(quality) else metric.text(float(quality))
