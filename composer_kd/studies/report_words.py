"""Figures and findings in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from composer_kd.studies.curves import Charge
from composer_kd.studies.frontier import Comparison, Curve, Steps
from composer_kd.studies.report_findings import Findings, OfCourse, OfLine

_UNITS = ((86400, 'd', 72 * 3600), (3600, 'h', 2 * 3600), (60, 'min', 120), (1, 's', 0))

ONCE = 'What is paid once serves every run that comes later, of other curves, too.'

_OF_A_SEQUENCE = 'The training of the teachers is in them, which are earlier runs of the same arm.'

_ENOUGH_SEEDS = 5
_SPACE = '\u00a0'  # which no line ends with

_CHARGES: dict[Charge, str] = {
    'none': 'Neither the training of the teachers nor the making of records is charged.',
    'recording': 'Each run is charged the making of the record that it learns from, in full, as if it had to pay for '
    'it alone; the training of the teachers is not charged.',
    'teacher': 'Each run is charged the training of the teachers that it learns from, in full, as if it had to pay for '
    'it alone; the making of records is not charged.',
    'all': 'Each run is charged the training of the teachers and the making of the record that it learns from, in '
    'full, as if it had to pay for them alone.',
}


@dataclass(frozen=True)
class Metric:
    """How the qualities of a metric are written.

    Args:
        name: Its full name.
    """

    name: str

    @property
    def label(self) -> str:
        """Its name for people, with the unit."""
        return f'{self.name.rpartition("/")[2]}{", %" if self.scale == 100 else ""}'

    @property
    def scale(self) -> int:
        """What its values are multiplied by."""
        return 100 if 'accuracy' in self.name.lower() else 1

    def text(self, quality: float) -> str:
        """A value of it."""
        return f'{100 * quality:.2f}{_SPACE}%' if self.scale == 100 else f'{quality:.4g}'


def seconds_text(seconds: float) -> str:
    """A time, in the unit in which it is easy to read."""
    size, unit, _ = next(entry for entry in _UNITS if seconds >= entry[2])
    return f'{seconds / size:{".3g" if seconds < 999.5 * size else ".0f"}}{_SPACE}{unit}'


def factor_text(factor: float) -> str:
    """How many times as much."""
    return f'{factor:.2f}x' if factor < 9.995 else f'{factor:.3g}x'


def interval_text(interval: tuple[float, float] | None) -> str:
    """An interval of factors."""
    return '' if interval is None else f'{interval[0]:.2f} - {interval[1]:.2f}'


def speedup_text(comparison: Comparison) -> str:
    """A headline in short."""
    speedup = comparison.speedup
    return f'{speedup.bound} {factor_text(speedup.factor)}' if speedup.bound else factor_text(speedup.factor)


def charge_text(findings: Findings) -> str:
    """What a second of a curve is."""
    own = _OF_A_SEQUENCE if findings.courses else _CHARGES[findings.charge]
    return f'Seconds are those of training, with what teachers say meanwhile in them and evaluation left out. {own}'


def metric_of(findings: Findings) -> Metric:
    """What is compared."""
    return Metric(findings.results[0].metric)


def answer(findings: Findings) -> str:
    """What was found, in one sentence."""
    if findings.courses:
        return _answer_of_courses(findings)
    compared = [found for found in findings.lines if found.comparison]
    if not compared:
        return 'There is nothing to compare yet: it takes finished runs of the baseline and of another method.'
    best = max(compared, key=_rank)
    if _rank(best) > (2, 1.0):
        return sentence(best, metric_of(findings))
    baselines = {found.baseline.line.name for found in compared if found.baseline}
    name = _the(baselines.pop()) if len(baselines) == 1 else 'its baseline'
    return f'No method reaches the best of {name} sooner. {sentence(best, metric_of(findings))}'


def beside_it(findings: Findings) -> str:
    """What one must know of the answer: of how many it is the best, and how sure it is."""
    compared = [found for found in findings.lines if found.comparison]
    said = []
    if len(compared) > 1:
        sooner = [found for found in compared if _rank(found) > (2, 1.0)]
        surely = sum(bool(of.interval) and of.interval[0] > 1 for found in sooner if (of := found.comparison))
        what = f'{len(sooner)} reach the best of the baseline sooner, {surely} of them by more than their seeds explain'
        said.append(f'Of {len(compared)} curves {what}; this is the quickest.')
    seeds = max((len(set(found.line.runs.seeds)) for found in compared), default=0)
    if 1 < seeds < _ENOUGH_SEEDS:
        said.append(f'Intervals of {seeds} seeds are rough, and rather too narrow.')
    failed = sum(row['status'] == 'failed' for results in findings.results for row in results.judged())
    if failed or findings.missing:
        said.append(f'Not all runs are in it: {failed} failed, {len(findings.missing)} are not there yet.')
    if findings.courses:
        said.append('Each arm is one sequence of runs: how much another one would differ is not known.')
    if findings.results[0].goal == 'min':
        said.append('Less of it is better.')
    return ' '.join(said)


def sentence(found: OfLine, metric: Metric) -> str:
    """How a curve compares with its baseline."""
    if found.baseline is None or found.comparison is None or found.curve is None or found.baseline.curve is None:
        return f'{found.line.name} is compared with nothing: its baseline has no finished run with the same settings.'
    return _sentence(found.line.name, found.baseline.line.name, found.curve, found.baseline.curve, found, metric)


def _sentence(name: str, other: str, curve: Curve, against: Curve, found: OfLine, metric: Metric) -> str:
    comparison = found.comparison
    assert comparison is not None
    speedup, the = comparison.speedup, _the(other)
    top, text = float(against.best[-1]), metric.text(speedup.quality)
    if speedup.bound == 'more than':
        start = f'{name} at its shortest ({metric.text(curve.best[0])} in {seconds_text(curve.seconds[0])})'
        start += f' is better already than {the} ever gets ({metric.text(top)}, after '
        start += f'{seconds_text(float(against.seconds_for(top)))}): '
        if speedup.factor > 1:
            return f'{start}it reaches that more than {factor_text(speedup.factor)} sooner.'
        return f'{start}how much sooner it gets there can be said only with shorter runs of it.'
    if speedup.bound == 'less than':
        start = f'{the[0].upper()}{the[1:]} at its shortest ({metric.text(against.best[0])} in '
        start += f'{seconds_text(against.seconds[0])}) is better already than {name} ever gets ({text}, after '
        start += f'{seconds_text(float(curve.seconds_for(speedup.quality)))}): '
        if speedup.factor < 1:
            return f'{start}{name} takes more than {factor_text(1 / speedup.factor)} as long.'
        return f'{start}how much later {name} gets there can be said only with shorter runs of {the}.'
    if speedup.quality == top:
        start = f"{name} reaches {the}'s {text} "
    else:
        start = f"{name} does not reach {the}'s {metric.text(top)}; its own best, {text}, it reaches "
    return f'{start}{_sooner(speedup.factor, comparison)}.'


def notes(comparison: Comparison) -> str:
    """What must be said of an interval, if anything."""
    if comparison.speedup.bound:
        return ''
    if not comparison.resamples:
        return 'one seed: no interval'
    said = []
    if comparison.apart:
        too_many = ', too many for an interval' if comparison.interval is None else ''
        said = [f'in {comparison.apart} of {comparison.resamples} resamples the curves do not overlap{too_many}']
    if comparison.interval and comparison.interval[0] <= 1 <= comparison.interval[1]:
        said.append('no difference that these seeds can tell')
    return '; '.join(said)


def course_sentence(found: OfCourse, metric: Metric, with_totals: bool = True) -> str:
    """How a sequence compares with its baseline; what all of both took and gave, too, if that is wanted."""
    name, baseline, speedup = found.course.name, found.baseline, found.speedup
    if baseline is None or speedup is None:
        return f'{name} is compared with nothing: there are no finished runs on both sides.'
    ours, theirs = found.course.steps, baseline.steps
    there, here = (seconds_text(float(steps.seconds_for(speedup.quality))) for steps in (theirs, ours))
    best = f'the best of "{baseline.name}", {metric.text(theirs.best[-1])}'
    if speedup.quality == theirs.best[-1]:
        start = f'"{name}" reaches {best},'
    else:
        start = f'"{name}" does not reach {best}; its own best, {metric.text(speedup.quality)}, it reaches'
    how = f'{factor_text(speedup.factor)} sooner' if speedup.factor >= 1 else 'later'
    behind = f'; {_totals(ours, theirs, metric)}' if with_totals else ''
    return f'{start} {how}, after {here} of training in place of {there}{behind}.'


def _totals(ours: Steps, theirs: Steps, metric: Metric) -> str:
    steps = f'all {len(ours.seconds)} steps' if len(ours.seconds) == len(theirs.seconds) else 'all steps'
    return (
        f'{steps} take {seconds_text(ours.total[-1])} in place of {seconds_text(theirs.total[-1])} and end at '
        f'{metric.text(ours.best[-1])} in place of {metric.text(theirs.best[-1])}'
    )


def _answer_of_courses(findings: Findings) -> str:
    compared = [found for found in findings.courses if found.speedup and found.baseline]
    if not compared:
        return 'There is nothing to compare yet: it takes finished runs of two arms.'
    best = max(compared, key=_course_rank)
    return course_sentence(best, metric_of(findings), with_totals=False)


def _course_rank(found: OfCourse) -> tuple[bool, float]:
    assert found.speedup and found.baseline
    return found.speedup.quality == found.baseline.steps.best[-1], found.speedup.factor


def _rank(found: OfLine) -> tuple[int, float]:
    """2 for what reaches the baseline's best, 1 for what does not but overlaps with it; and the factor."""
    assert found.comparison and found.baseline and found.baseline.curve
    speedup = found.comparison.speedup
    reaches = speedup.quality == found.baseline.curve.best[-1] and speedup.bound != 'less than'
    return 2 if reaches else 0 if speedup.bound else 1, speedup.factor


def _sooner(factor: float, comparison: Comparison) -> str:
    interval = comparison.interval
    later = factor < 1
    if later:
        factor, interval = 1 / factor, interval and (1 / interval[1], 1 / interval[0])
    said = [f'95 % interval {interval_text(interval)}'] * (interval is not None)
    said += [note] if (note := notes(comparison)) else []
    behind = f' ({"; ".join(said)})' if said else ''
    return f'{f"later, in {factor_text(factor)} the time" if later else f"{factor_text(factor)} sooner"}{behind}'


def _the(name: str) -> str:
    return 'the baseline' if name == 'baseline' else name


def settings_text(settings: dict[str, Any]) -> str:
    """Settings, by the last word of their keys."""
    named = ((key.rpartition('.')[2], value) for key, value in settings.items())
    return ', '.join(f'{name} {f"{value:.4g}" if isinstance(value, float) else value}' for name, value in named)
