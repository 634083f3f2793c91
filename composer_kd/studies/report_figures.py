"""The figures of a report, as plotly.js draws them: plain data, whose colours the page gives by its scheme."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from composer_kd.studies.frontier import Floats, pareto
from composer_kd.studies.report_findings import Findings
from composer_kd.studies.report_words import Metric, metric_of, seconds_text, settings_text

Trace = dict[str, Any]
Figure = dict[str, Any]

SYMBOLS = ('circle', 'square', 'diamond', 'cross', 'x', 'star', 'hexagon', 'pentagon')
MUTED = 'muted'

_COLOURS = 8

_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800)
_TICKS += tuple(3600 * hours for hours in (1, 2, 4, 8, 12, 24, 48, 96, 240, 480, 960))
_FACTORS = (  # of these the first that has some in the range
    (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100),
    (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10),
    (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2),
    tuple(1 + hundredth / 100 for hundredth in range(-20, 21, 2)),
)
_MOST_TICKS = 6  # that a phone has room for
_ROOM = 1.15  # of an axis beyond its points, on a logarithmic scale


def figures(findings: Findings) -> dict[str, Figure]:
    """All figures, by the name of their place in the page."""
    if findings.courses:
        return {'cost': cumulative_cost(findings)}
    found = {'time': quality_vs_time(findings)}
    return found | ({'speedup': speedup(findings)} if any(line.comparison for line in findings.lines) else {})


def quality_vs_time(findings: Findings) -> Figure:
    """Every run, the curves of their means, and the Pareto frontier of these."""
    metric, traces = metric_of(findings), []
    frontier = frontier_of(findings)
    if len(frontier[0]) > 1:
        frontier_trace = _trace(MUTED, *frontier, metric, mode='lines', line={'dash': 'dot', 'width': 2, 'shape': 'hv'})
        traces.append(frontier_trace | {'name': 'Pareto frontier', 'hoverinfo': 'skip'})
    everything: list[float] = []
    for index, found in enumerate(findings.lines):
        line, curve = found.line, found.curve
        if curve is None:
            continue
        everything += line.runs.seconds
        said = [
            _hover(line.name, f'{length}, seed {seed}', metric, quality, seconds)
            for length, seed, seconds, quality in zip(*_columns(line.runs), strict=True)
        ]
        mark = {'size': 7, 'opacity': 0.45, 'symbol': SYMBOLS[index % len(SYMBOLS)]}
        traces.append(_trace(index, line.runs.seconds, line.runs.quality, metric, said, mode='markers', marker=mark))
        traces.append(_trace(index, curve.seconds, curve.best, metric, mode='lines') | {'hoverinfo': 'skip'})
        names = [length for length, _ in line.points()]
        means = zip(names, curve.quality, curve.seconds, strict=True)
        said = [_hover(line.name, f'{name}, mean', metric, quality, seconds) for name, quality, seconds in means]
        mark = {'size': 11, 'symbol': SYMBOLS[index % len(SYMBOLS)]}
        traces.append(_trace(index, curve.seconds, curve.quality, metric, said, mode='markers', marker=mark))
    x = {'type': 'log', 'title': {'text': 'training time'}, **_time_axis(everything)}
    return _figure(traces, x, {'title': {'text': metric.label}})


def frontier_of(findings: Findings) -> tuple[Floats, Floats]:
    """Seconds and quality of the means that no other one beats, the quickest first."""
    curves = [found.curve for found in findings.lines if found.curve is not None]
    seconds = np.concatenate([curve.seconds for curve in curves])
    quality = np.concatenate([curve.quality for curve in curves])
    best = np.flatnonzero(pareto(seconds, quality, findings.results[0].goal))
    best = best[np.argsort(seconds[best])]
    return seconds[best], quality[best]


def speedup(findings: Findings) -> Figure:
    """The speed-up at each quality, with its interval; bounds are triangles that point to where it lies."""
    metric, traces = metric_of(findings), []
    values = [1.0]
    for index, found in enumerate(findings.lines):
        comparison = found.comparison
        if comparison is None:
            continue
        known = ~np.isnan(comparison.low)
        x = comparison.qualities[known]
        if known.any():
            low, high = comparison.low[known], comparison.high[known]
            around = (np.concatenate([x, x[::-1]]), np.concatenate([low, high[::-1]]))
            band = _trace(index, around[1], around[0], metric, mode='lines', line={'width': 0}, fill='toself')
            traces.append(_turned(band) | {'hoverinfo': 'skip'})
            values += [*low, *high]
        head = comparison.speedup
        if not head.bound:
            line = _trace(index, comparison.factors, comparison.qualities, metric, mode='lines')
            traces.append(_turned(line) | {'hoverinfo': 'skip'})
            values += [*comparison.factors]
        symbol = {'more than': 'triangle-up', 'less than': 'triangle-down', None: SYMBOLS[index % len(SYMBOLS)]}
        mark = {'size': 12, 'symbol': symbol[head.bound]}
        said = f'{found.line.name}<br>{head.bound or ""} {head.factor:.2f}x at {metric.text(head.quality)}'
        trace = _trace(index, [head.factor], [head.quality], metric, [said], mode='markers', marker=mark)
        traces.append(_turned(trace))
        values.append(head.factor)
    y = {'title': {'text': 'times as fast as the baseline'}, **_factor_axis(values)}
    x_axis = {'title': {'text': metric.label}, 'autorange': 'reversed' if findings.results[0].goal == 'min' else True}
    figure = _figure(traces, x_axis, y)
    figure['layout']['shapes'] = [
        {'type': 'line', 'xref': 'paper', 'x0': 0, 'x1': 1, 'y0': 1, 'y1': 1, 'line': {'dash': 'dash', 'width': 1.5}}
    ]
    return figure


def cumulative_cost(findings: Findings) -> Figure:
    """What sequences have reached, against what they had cost until then."""
    metric, traces, longest = metric_of(findings), [], 0.0
    for index, found in enumerate(findings.courses):
        course = found.course
        total, is_search = course.steps.total, course.results.kind == 'search'
        longest = max(longest, float(total[-1]))
        height = course.steps.best if is_search else course.steps.quality
        shape = {'shape': 'hv' if is_search else 'linear'}
        traces.append(_trace(index, total, height, metric, mode='lines', line=shape) | {'hoverinfo': 'skip'})
        said = [
            _hover(course.name, f'step {row["step"]}: {settings_text(row["settings"])}', metric, quality, seconds)
            for row, quality, seconds in zip(course.rows, course.steps.quality, total, strict=True)
        ]
        mark = {'size': 8, 'symbol': SYMBOLS[index % len(SYMBOLS)]}
        traces.append(_trace(index, total, course.steps.quality, metric, said, mode='markers', marker=mark))
    step = next((tick for tick in _TICKS if longest / tick < _MOST_TICKS - 1), longest)
    ticks = np.arange(0, longest * _ROOM, step).tolist()
    axis = {'tickvals': ticks, 'ticktext': ['0', *map(_round_time, ticks[1:])], 'rangemode': 'tozero'}
    x = {'title': {'text': 'training time of all steps so far'}, **axis}
    return _figure(traces, x, {'title': {'text': metric.label}})


def _figure(traces: list[Trace], x: dict[str, Any], y: dict[str, Any]) -> Figure:
    for axis in (x, y):
        axis |= {'automargin': True, 'zeroline': False}
    layout = {'xaxis': x, 'yaxis': y, 'showlegend': False, 'hovermode': 'closest'}
    return {'data': traces, 'layout': layout | {'margin': {'l': 8, 'r': 12, 't': 34, 'b': 8}}}


def _trace(
    colour: int | str, x: ArrayLike, y: ArrayLike, metric: Metric, text: Sequence[str] = (), **more: Any
) -> Trace:
    group = MUTED if colour == MUTED else str(colour)
    meta = {'colour': MUTED if isinstance(colour, str) else colour_of(colour)}
    said = {'text': [*text], 'hoverinfo': 'text'} if text else {}
    values = {'x': _plain(x), 'y': _plain(np.asarray(y, float) * metric.scale)}
    return {'type': 'scatter', 'legendgroup': group, 'meta': meta, **values, **said, **more}


def _turned(trace: Trace) -> Trace:
    """The same, with quality on the other axis."""
    return trace | {'x': trace['y'], 'y': trace['x']}


def _plain(values: ArrayLike) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in np.asarray(values, float)]


def _columns(runs: Any) -> tuple[Sequence[Any], ...]:
    return runs.lengths, runs.seeds, runs.seconds, runs.quality


def _hover(name: str, which: str, metric: Metric, quality: float, seconds: float) -> str:
    return f'{html.escape(name)}<br>{html.escape(which)}<br>{metric.text(quality)} in {seconds_text(seconds)}'


def colour_of(index: int) -> int:
    """The colour of a curve. That of the first one, which is a baseline, does not come again."""
    return index if index < _COLOURS else 1 + (index - _COLOURS) % (_COLOURS - 1)


def _time_axis(seconds: Sequence[float]) -> dict[str, Any]:
    """The range, and ticks at round times."""
    low, high = min(seconds) / _ROOM, max(seconds) * _ROOM
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    if len(ticks) < 3:
        ticks = [float(f'{tick:.2g}') for tick in np.geomspace(low * 1.02, high / 1.02, 4)]
    ticks = ticks[:: -(-len(ticks) // _MOST_TICKS)]
    return {
        'range': [float(np.log10(low)), float(np.log10(high))],
        'tickvals': ticks,
        'ticktext': [_round_time(tick) for tick in ticks],
    }


def _round_time(seconds: float) -> str:
    size, unit = next(entry for entry in ((86400, 'd'), (3600, 'h'), (60, 'min'), (0, 's')) if seconds >= entry[0])
    return f'{seconds / (size or 1):g} {unit}' if seconds % (size or 1) == 0 or unit == 's' else seconds_text(seconds)


def _factor_axis(factors: Sequence[float]) -> dict[str, Any]:
    """The same for factors: half as fast is as far from 1 as twice as fast."""
    low, high = min(factors) / _ROOM, max(factors) * _ROOM
    inside = [[tick for tick in ticks if low <= tick <= high] for ticks in _FACTORS]
    ticks = next((ticks for ticks in inside if len(ticks) > 3), inside[-1])
    shown = {'tickvals': ticks, 'ticktext': [f'{tick:g}x' for tick in ticks]}
    return {'type': 'log', 'range': [float(np.log10(low)), float(np.log10(high))], **shown}
