"""How much sooner: curves of quality over seconds, and the speed-up at equal quality.

A method is run at several lengths, each a run of its own with its own full schedule, with several seeds each.

1.  Each length is one point: the geometric mean of its seconds over the seeds, and the arithmetic mean of its quality.
    Seconds are only ever compared as ratios, and what disturbs them (a busy machine) is a factor; of their geometric
    means the ratio is the mean ratio. Quality is disturbed by the seed, up as much as down. Means, not medians: of
    three seeds a median is one run, and under the bootstrap it jumps.
2.  Q(t), the quality that t seconds buy, is the best of all points of up to t seconds: whoever has the time for a long
    run may as well choose a short one. So it never falls, and noise, or training for too long, makes it flat.
    Between neighbouring points it is a straight line over log t. Outside of what was measured it is not defined:
    nothing is extrapolated.
3.  t(q) is the least t with Q(t) = q, and the speed-up at quality q is t(q) of the baseline / t(q) of the method.
4.  The headline is the speed-up at the best quality that the baseline reaches in the range that both have. Where one
    curve lies above the other entirely there is no such range, only a bound.
5.  Intervals are percentiles of the bootstrap over seeds.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Goal = Literal['max', 'min']
Bound = Literal['more than', 'less than']

RESAMPLES = 2000
SHARE = 0.95  # of an interval


@dataclass(frozen=True)
class Curve:
    """The quality that seconds buy.

    Args:
        seconds: Of each point, above 0, ascending.
        quality: Of each point.
        goal: Whether more of the quality is better, or less.
    """

    seconds: Floats
    quality: Floats
    goal: Goal = 'max'

    @property
    def best(self) -> Floats:
        """The best quality up to each point."""
        return best_so_far(self.quality, self.goal)

    def seconds_for(self, quality: ArrayLike) -> Floats:
        """The least seconds that buy each quality; NaN outside of what was measured."""
        wanted, best = np.asarray(quality, float) * _sign(self.goal), self.best * _sign(self.goal)
        after = np.searchsorted(best, wanted)  # the first point that is as good
        inside = (wanted >= best[0]) & (after < len(best))
        after = np.where(inside, after, 0)
        before = np.maximum(after - 1, 0)
        rise = best[after] - best[before]
        share = np.divide(wanted - best[before], rise, out=np.zeros_like(wanted), where=rise > 0)
        seconds = self.seconds[before] * (self.seconds[after] / self.seconds[before]) ** share
        return np.where(inside, seconds, np.nan)


@dataclass(frozen=True)
class Runs:
    """Runs of one method: of each its length, its seed, its seconds and its quality.

    Args:
        lengths: By any name; runs of one name are one point of the curve.
        seeds: Runs of one seed are resampled together.
        seconds: Above 0.
        quality: Finite.
        goal: Whether more of the quality is better, or less.
    """

    lengths: Sequence[Hashable]
    seeds: Sequence[Hashable]
    seconds: Sequence[float]
    quality: Sequence[float]
    goal: Goal = 'max'

    def curve(self, times: dict[Hashable, int] | None = None) -> Curve | None:
        """The curve of their means.

        Args:
            times: How often each seed counts. Default: once.

        Returns:
            None if no run counts.
        """
        counts = np.array([1 if times is None else times.get(seed, 0) for seed in self.seeds], float)
        number = {length: index for index, length in enumerate(dict.fromkeys(self.lengths))}
        of_length = np.array([number[length] for length in self.lengths], int)
        total = np.bincount(of_length, counts)
        heard = total > 0
        if not heard.any():
            return None
        log_seconds, quality = (
            np.bincount(of_length, counts * np.asarray(values, float))[heard] / total[heard]
            for values in (np.log(self.seconds), self.quality)
        )
        order = np.argsort(log_seconds, kind='stable')
        return Curve(np.exp(log_seconds[order]), quality[order], self.goal)


@dataclass(frozen=True)
class Speedup:
    """How much sooner a quality is reached.

    Args:
        quality: Which.
        factor: Seconds of the baseline / seconds of the method.
        bound: Whether the speed-up is more than the factor, or less; None if it is the factor.
    """

    quality: float
    factor: float
    bound: Bound | None = None


@dataclass(frozen=True)
class Comparison:
    """A method beside its baseline.

    Args:
        speedup: The headline.
        interval: The 95 % interval of its factor; None with fewer than two seeds, if it is a bound, or if in more than
            5 % of the resamples the curves did not overlap.
        resamples: How many resamples of the seeds there were.
        apart: In how many of them the curves did not overlap. They have no part in the interval.
        qualities: A grid over the range that both have; empty where there is none.
        factors: The speed-up at each.
        low: Where its 95 % interval begins; NaN where more than 5 % of the resamples do not have that quality.
        high: Where it ends.
    """

    speedup: Speedup
    interval: tuple[float, float] | None
    resamples: int
    apart: int
    qualities: Floats
    factors: Floats
    low: Floats
    high: Floats


def best_so_far(quality: ArrayLike, goal: Goal = 'max') -> Floats:
    """The best up to each value; NaN, which is no quality, is never the best."""
    return (np.fmax if goal == 'max' else np.fmin).accumulate(np.asarray(quality, float))


def at_equal_quality(baseline: Curve, method: Curve) -> Speedup:
    """The headline: the speed-up at the best quality that the baseline reaches in the range that both have.

    Where the method is better at its least seconds than the baseline ever is, the speed-up at the baseline's best is
    more than the ratio of the seconds; where the baseline is, the speed-up at the method's best is less than it.
    """
    sign = _sign(baseline.goal)
    top, top_of_method = baseline.best[-1], method.best[-1]
    if sign * method.best[0] > sign * top:
        return Speedup(float(top), float(baseline.seconds_for(top) / method.seconds[0]), 'more than')
    if sign * baseline.best[0] > sign * top_of_method:
        factor = baseline.seconds[0] / method.seconds_for(top_of_method)
        return Speedup(float(top_of_method), float(factor), 'less than')
    quality = sign * min(sign * top, sign * top_of_method)
    return Speedup(float(quality), float(baseline.seconds_for(quality) / method.seconds_for(quality)))


def speedups(baseline: Curve, method: Curve, quality: ArrayLike) -> Floats:
    """The speed-up at each quality; NaN where one of the two was not measured."""
    return baseline.seconds_for(quality) / method.seconds_for(quality)


def common_range(baseline: Curve, method: Curve) -> tuple[float, float] | None:
    """The worst and the best quality that both have; None where the curves do not overlap."""
    sign = _sign(baseline.goal)
    worst = max(sign * baseline.best[0], sign * method.best[0])
    best = min(sign * baseline.best[-1], sign * method.best[-1])
    return (float(sign * worst), float(sign * best)) if worst <= best else None


def compare(
    baseline: Runs, method: Runs, *, resamples: int = RESAMPLES, seed: int = 0, points: int = 101
) -> Comparison:
    """Compare a method with its baseline, with 95 % intervals by the bootstrap over seeds.

    A resample draws as many seeds as there are, with replacement, for all lengths at once, and for both methods if they
    have the same seeds; what is computed from it is what is computed from the runs: the headline, at the quality that
    the resampled baseline reaches. A few seeds make a rough interval, and rather too narrow a one.

    Args:
        baseline: Its runs, at least one.
        method: Its runs, at least one, with the same goal.
        resamples: How many.
        seed: Of the draws; the same seed gives the same interval.
        points: Of the grid of qualities.
    """
    one, other = baseline.curve(), method.curve()
    assert one is not None and other is not None, 'there are no runs'
    speedup, both = at_equal_quality(one, other), common_range(one, other)
    qualities = np.linspace(*both, points, dtype=np.float64) if both else np.empty(0)
    found: list[float] = []
    rows: list[Floats] = []
    weights: list[int] = []
    apart = 0
    few = min(len(set(runs.seeds)) for runs in (baseline, method)) < 2
    for times, count in [] if few else _draws(baseline.seeds, method.seeds, resamples, seed):
        drawn, against = method.curve(times[1]), baseline.curve(times[0])
        if drawn is None or against is None or (headline := at_equal_quality(against, drawn)).bound:
            apart += count
            continue
        found.append(headline.factor)
        rows.append(speedups(against, drawn, qualities))
        weights.append(count)
    low, high = _band(np.array(rows).reshape(len(rows), len(qualities)), weights, resamples)
    interval = None
    if found and not speedup.bound and apart <= (1 - SHARE) * resamples:
        ends = np.quantile(np.repeat(found, weights), _ENDS)
        interval = (float(ends[0]), float(ends[1]))
    factors = speedups(one, other, qualities)
    return Comparison(speedup, interval, 0 if few else resamples, apart, qualities, factors, low, high)


def pareto(seconds: ArrayLike, quality: ArrayLike, goal: Goal = 'max') -> NDArray[np.bool_]:
    """Which points no other one beats: none is as quick and better, or quicker and as good."""
    seconds, quality = np.asarray(seconds, float), np.asarray(quality, float) * _sign(goal)
    quicker, as_quick = seconds[:, None] < seconds, seconds[:, None] <= seconds
    better, as_good = quality[:, None] > quality, quality[:, None] >= quality
    beats = (quicker & as_good) | (better & as_quick)
    return ~np.any(beats, axis=0)


@dataclass(frozen=True)
class Steps:
    """A sequence of runs, one after another: what they cost together, and the best of them.

    Args:
        seconds: Of each step, at least 0.
        quality: Of each step; NaN for one that failed, or was ended early.
        goal: Whether more of the quality is better, or less.
    """

    seconds: Floats
    quality: Floats
    goal: Goal = 'max'

    @property
    def total(self) -> Floats:
        """The seconds of all steps up to each."""
        return np.cumsum(self.seconds)

    @property
    def best(self) -> Floats:
        """The best quality up to each step; NaN before there is one."""
        return best_so_far(self.quality, self.goal)

    def seconds_for(self, quality: ArrayLike) -> Floats:
        """The total when each quality was reached first, at the end of a step; NaN if it never was."""
        sign = _sign(self.goal)
        best = np.nan_to_num(sign * self.best, nan=-np.inf)
        after = np.searchsorted(best, np.asarray(quality, float) * sign)
        return np.append(self.total, np.nan)[after]


def sooner(baseline: Steps, arm: Steps) -> Speedup | None:
    """How much sooner a sequence reaches the best quality that both reach; None if one of them reaches none."""
    sign = _sign(baseline.goal)
    quality = sign * np.minimum(*(sign * steps.best[-1] for steps in (baseline, arm)))
    if np.isnan(quality):
        return None
    return Speedup(float(quality), float(baseline.seconds_for(quality) / arm.seconds_for(quality)))


_ENDS = [(1 - SHARE) / 2, (1 + SHARE) / 2]


def _sign(goal: Goal) -> int:
    return 1 if goal == 'max' else -1


def _draws(
    of_baseline: Sequence[Hashable], of_method: Sequence[Hashable], resamples: int, seed: int
) -> list[tuple[tuple[dict[Hashable, int], dict[Hashable, int]], int]]:
    """Resamples of the seeds: how often each counts, in baseline and method, and how many resamples are like that."""
    groups = [[*dict.fromkeys(of_baseline)]]
    if set(of_method) != set(of_baseline):
        groups.append([*dict.fromkeys(of_method)])
    generator = np.random.default_rng(seed)
    counts = [generator.multinomial(len(group), [1 / len(group)] * len(group), size=resamples) for group in groups]
    alike, number = np.unique(np.hstack(counts), axis=0, return_counts=True)
    drawn = []
    for row, count in zip(alike, number, strict=True):
        parts = np.split(row, [len(groups[0])])
        times = [dict(zip(group, part.tolist(), strict=True)) for group, part in zip(groups, parts, strict=False)]
        drawn.append(((times[0], times[-1]), int(count)))
    return drawn


def _band(rows: Floats, weights: Sequence[int], resamples: int) -> tuple[Floats, Floats]:
    """Percentiles of each column, where enough of it is known."""
    rows = np.repeat(rows, weights, axis=0)
    ends = np.full((2, rows.shape[1]), np.nan)
    known = (~np.isnan(rows)).sum(axis=0) >= SHARE * resamples
    if len(rows) and known.any():
        ends[:, known] = np.nanquantile(rows[:, known], _ENDS, axis=0)
    return ends[0], ends[1]
