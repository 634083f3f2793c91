"""The pictures of a report, for where no page can be shown."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from composer_kd.studies.report_figures import cumulative_cost, quality_vs_time, speedup
from composer_kd.studies.report_findings import Findings

_COLOURS = ('#59636e', '#0062b8', '#c2410c', '#047857', '#8b3fc7', '#8a6100', '#0e7490', '#be185d')
_MARKERS = {'circle': 'o', 'square': 's', 'diamond': 'D', 'triangle-up': '^', 'triangle-down': 'v', 'cross': 'P'}
_MARKERS |= {'x': 'X', 'star': '*', 'hexagon': 'h', 'pentagon': 'p'}
_DASHES = {'dot': ':', 'dash': '--'}


def pictures(findings: Findings) -> dict[str, bytes]:
    """The same figures as in the page, as PNG files by their names."""
    if findings.courses:
        return {'cumulative_cost.png': _drawn(cumulative_cost(findings), [f.course.name for f in findings.courses])}
    names = [found.line.name for found in findings.lines]
    drawn = {'quality_vs_time.png': _drawn(quality_vs_time(findings), names)}
    if any(found.comparison for found in findings.lines):
        drawn['speedup.png'] = _drawn(speedup(findings), names)
    return drawn


def _drawn(figure: dict[str, Any], names: list[str]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(8, 4.5), layout='constrained')
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    for trace in figure['data']:
        _draw(axes, trace)
    layout = figure['layout']
    x, y = layout['xaxis'], layout['yaxis']
    for name, options in (('x', x), ('y', y)):
        values: dict[str, Any] = {'label': options['title']['text']}
        if options.get('type') == 'log':
            values |= {'scale': 'log', 'lim': [10**end for end in options['range']]}
        axes.set(**{f'{name}{what}': value for what, value in values.items()})
        if 'tickvals' in options:
            axis = axes.xaxis if name == 'x' else axes.yaxis
            axis.set_ticks(options['tickvals'], options['ticktext'])
            axis.set_ticks([], minor=True)
    if x.get('autorange') == 'reversed':
        axes.invert_xaxis()
    for shape in layout.get('shapes', ()):
        axes.axhline(shape['y0'], color=_COLOURS[0], linestyle='--', linewidth=1)
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    drawn = {trace['legendgroup']: trace for trace in figure['data'] if 'marker' in trace}
    for group, trace in drawn.items():
        marker, colour = _MARKERS[trace['marker']['symbol']], _COLOURS[trace['meta']['colour']]
        axes.plot([], [], color=colour, marker=marker, label=names[int(group)].replace('$', r'\$'))
    canvas.legend(frameon=False, loc='outside lower center', ncols=3, fontsize='small')
    file = io.BytesIO()
    canvas.savefig(file, dpi=150, format='png')
    return file.getvalue()


def _draw(axes: Any, trace: dict[str, Any]) -> None:
    number = trace['meta']['colour']
    colour = _COLOURS[number] if isinstance(number, int) else '#9aa4af'
    x, y = (np.array(trace[name], float) for name in ('x', 'y'))
    if 'fill' in trace:
        axes.fill(x, y, color=colour, alpha=0.15, linewidth=0)
    elif trace['mode'] == 'lines':
        line = trace.get('line', {})
        steps = {'drawstyle': 'steps-post'} if line.get('shape') == 'hv' else {}
        axes.plot(x, y, color=colour, linestyle=_DASHES.get(line.get('dash'), '-'), linewidth=1.8, **steps)
    else:
        mark = trace['marker']
        size = {'marker': _MARKERS[mark['symbol']], 'markersize': mark['size'] * 0.62, 'alpha': mark.get('opacity')}
        axes.plot(x, y, color=colour, linestyle='none', markeredgecolor='white', markeredgewidth=0.6, **size)
