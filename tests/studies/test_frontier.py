"""Curves, speed-ups at equal quality, their intervals: known answers, and what holds for any curves."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from composer_kd.studies.frontier import (
    Curve,
    Runs,
    Steps,
    at_equal_quality,
    best_so_far,
    common_range,
    compare,
    pareto,
    sooner,
    speedups,
)


def curve(seconds, quality, goal='max'):
    return Curve(np.array(seconds, float), np.array(quality, float), goal)


def runs(table, goal='max'):
    """From length -> seed -> (seconds, quality)."""
    cells = [(length, seed, *values) for length, row in table.items() for seed, values in row.items()]
    return Runs(*map(list, zip(*cells, strict=True)), goal)  # type: ignore[arg-type]


def scaled(some, *, seconds=1.0, shift=0.0, sign=1):
    goal = some.goal if sign == 1 else {'max': 'min', 'min': 'max'}[some.goal]
    quality = [sign * q + shift for q in some.quality]
    return Runs(some.lengths, some.seeds, [s * seconds for s in some.seconds], quality, goal)


QUALITY = st.integers(0, 1000).map(lambda q: q / 8)  # sums and differences of these are exact
SECONDS = st.floats(0.01, 1e6)


@st.composite
def curves(draw, least=1):
    size = draw(st.integers(least, 6))
    seconds = draw(st.lists(SECONDS, min_size=size, max_size=size, unique=True))
    return curve(sorted(seconds), draw(st.lists(QUALITY, min_size=size, max_size=size)))


@st.composite
def tables(draw, seeds=(1, 2, 3)):
    lengths = range(draw(st.integers(1, 4)))
    return runs({n: {s: (draw(SECONDS), draw(QUALITY)) for s in seeds} for n in lengths})


def test_a_point_is_the_geometric_mean_of_seconds_and_the_mean_of_quality():
    some = runs({'8ep': {1: (10, 0.8), 2: (40, 0.9)}, '2ep': {1: (2, 0.5), 2: (8, 0.7)}})
    found = some.curve()
    assert found is not None
    assert found.seconds == pytest.approx([4, 20]) and found.quality == pytest.approx([0.6, 0.85])


def test_the_seconds_for_a_quality_lie_on_a_straight_line_over_their_logarithm():
    found = curve([1, 4, 64], [0.0, 0.5, 1.0]).seconds_for([0.0, 0.25, 0.5, 0.75, 1.0])
    assert found == pytest.approx([1, 2, 4, 16, 64])


def test_nothing_is_extrapolated():
    some = curve([1, 4], [0.2, 0.5])
    assert np.isnan(some.seconds_for([0.19, 0.51])).all()
    assert np.isnan(curve([1, 4], [0.5, 0.2], 'min').seconds_for([0.51, 0.19])).all()


def test_noise_and_training_too_long_make_a_curve_flat():
    some = curve([1, 2, 4, 8], [0.8, 0.9, 0.85, 0.95])
    assert some.best.tolist() == [0.8, 0.9, 0.9, 0.95]
    assert some.seconds_for(0.9) == 2 and some.seconds_for(0.925) == pytest.approx(4 * 2**0.5)
    assert some.seconds_for(0.95) == 8


def test_the_headline_is_at_the_best_quality_that_the_baseline_reaches():
    baseline, method = curve([10, 100], [0.8, 0.9]), curve([5, 20, 80], [0.7, 0.9, 0.95])
    found = at_equal_quality(baseline, method)
    assert (found.quality, found.factor, found.bound) == (0.9, pytest.approx(5), None)
    found = at_equal_quality(method, baseline)  # which never reaches 0.95
    assert (found.quality, found.factor, found.bound) == (0.9, pytest.approx(0.2), None)


def test_less_is_better_where_that_is_the_goal():
    baseline, method = curve([10, 100], [3.0, 2.0], 'min'), curve([5, 20, 80], [4.0, 2.0, 1.0], 'min')
    found = at_equal_quality(baseline, method)
    assert (found.quality, found.factor, found.bound) == (2.0, pytest.approx(5), None)
    assert common_range(baseline, method) == (3.0, 2.0)


def test_curves_that_do_not_overlap_give_a_bound():
    low, high = curve([10, 60], [0.5, 0.6]), curve([20, 90], [0.7, 0.8])
    assert common_range(low, high) is None
    above = at_equal_quality(low, high)
    assert (above.quality, above.factor, above.bound) == (0.6, pytest.approx(3), 'more than')
    below = at_equal_quality(high, low)
    assert (below.quality, below.factor, below.bound) == (0.6, pytest.approx(1 / 3), 'less than')


@given(curves(), curves())
def test_a_bound_holds_wherever_the_curve_that_lies_above_begins(one, other):
    found = at_equal_quality(one, other)
    assume(found.bound == 'more than')
    longer = curve([other.seconds[0] / 2, *other.seconds], [found.quality, *other.quality])  # it is at least that quick
    assert at_equal_quality(one, longer).factor >= found.factor


@given(curves(), st.floats(0.1, 10))
def test_the_same_in_a_cth_of_the_seconds_is_c_times_as_fast(some, c):
    found = at_equal_quality(some, Curve(some.seconds / c, some.quality))
    assert found.bound is None and found.factor == pytest.approx(c)


@given(curves(), curves(), st.integers(-100, 100), st.floats(0.1, 10))
def test_only_ratios_of_seconds_and_differences_of_quality_matter(one, other, shift, c):
    plain = at_equal_quality(one, other)
    moved = at_equal_quality(*(Curve(some.seconds * c, some.quality + shift) for some in (one, other)))
    assert moved.bound == plain.bound and moved.quality == plain.quality + shift
    assert moved.factor == pytest.approx(plain.factor)


@given(curves(), curves())
def test_the_sign_of_the_quality_does_not_matter(one, other):
    plain = at_equal_quality(one, other)
    turned = at_equal_quality(*(Curve(some.seconds, -some.quality, 'min') for some in (one, other)))
    assert (turned.factor, turned.bound, turned.quality) == (plain.factor, plain.bound, -plain.quality)


@given(curves(), curves())
def test_one_speed_up_is_the_inverse_of_the_other(one, other):
    there, back = at_equal_quality(one, other), at_equal_quality(other, one)
    assert there.factor * back.factor == pytest.approx(1) and there.quality == back.quality
    assert {there.bound, back.bound} in ({None}, {'more than', 'less than'})


@given(curves(), st.lists(QUALITY, min_size=2, max_size=20))
def test_better_quality_never_takes_less(some, wanted):
    found = some.seconds_for(sorted(wanted))
    found = found[~np.isnan(found)]
    assert (np.diff(found) >= -1e-9 * found[1:]).all()
    inside = (np.array(wanted) >= some.best[0]) & (np.array(wanted) <= some.best[-1])
    assert len(found) == inside.sum()


@given(curves(least=2))
def test_a_curve_goes_through_its_best_points(some):
    found = some.seconds_for(some.best)
    first = [some.seconds[np.flatnonzero(some.best == q)[0]] for q in some.best]
    assert found == pytest.approx(first)


@settings(max_examples=20, deadline=None)
@given(tables(), st.floats(0.1, 10))
def test_the_bootstrap_of_the_same_runs_knows_the_speed_up_exactly(some, c):
    # The seeds are drawn for both at once, so noise that both have is no noise of the speed-up.
    found = compare(some, scaled(some, seconds=1 / c), resamples=100)
    assert found.interval is not None and found.apart == 0
    assert found.interval == pytest.approx((c, c))
    assert found.factors == pytest.approx(c)


@settings(max_examples=20, deadline=None)
@given(tables(), tables(seeds=(4, 5)))
def test_the_bootstrap_does_not_depend_on_the_sign_of_the_quality(one, other):
    plain, turned = (
        compare(one, other, resamples=100),
        compare(scaled(one, sign=-1), scaled(other, sign=-1), resamples=100),
    )
    assert (turned.interval, turned.apart) == (plain.interval, plain.apart)
    assert np.array_equal(turned.low, plain.low, equal_nan=True)


NOISY = runs({n: {s: (n * (1 + s / 50), n / 10 + (s * 7 % 5) / 100) for s in range(5)} for n in (1, 2, 4, 8)})
QUICKER = runs({n: {s: (n / 2 * (1 + s / 40), n / 10 + (s * 3 % 5) / 100) for s in range(5)} for n in (1, 2, 4, 8)})


def test_without_noise_the_interval_is_the_point():
    table = {n: {s: (n, n / 10) for s in range(3)} for n in (1, 2, 4)}
    quicker = {n: {s: (n / 2, n / 10) for s in range(3)} for n in (1, 2, 4)}
    found = compare(runs(table), runs(quicker))
    assert found.speedup.factor == pytest.approx(2) and found.interval == pytest.approx((2, 2))
    assert found.low == pytest.approx(2) and found.high == pytest.approx(2)


def test_an_interval_is_around_the_speed_up_and_the_same_each_time():
    found, again, other = (compare(NOISY, QUICKER, seed=seed) for seed in (0, 0, 1))
    assert found.interval is not None and other.interval is not None
    low, high = found.interval
    assert low < found.speedup.factor < high
    assert again.interval == found.interval
    assert other.interval == pytest.approx(found.interval, rel=0.05)
    known = ~np.isnan(found.low)
    assert (
        known[10:90].all() and (found.low <= found.factors)[known].all() and (found.factors <= found.high)[known].all()
    )


def test_where_resamples_are_out_of_range_there_is_no_band():
    found = compare(NOISY, QUICKER)
    assert np.isnan(found.low[-1]) and np.isfinite(found.factors[-1])


def test_resamples_in_which_the_curves_do_not_overlap_are_counted():
    # They overlap if the baseline's seeds are as good as the method's, as both seeds together are.
    one = runs({1: {1: (1, 0.0), 2: (1, 0.0)}, 2: {1: (2, 0.0), 2: (2, 1.0)}})
    other = runs({1: {3: (1, 0.4), 4: (1, 0.4)}})
    found = compare(one, other, resamples=1000)
    assert found.resamples == 1000 and found.speedup.bound is None
    assert 200 < found.apart < 300  # one in four draws the first seed twice
    assert found.interval is None  # 95 % of the rest is not 95 %

    one = runs({1: {s: (1, 0.0) for s in range(5)}, 2: {s: (2, float(s > 0)) for s in range(5)}})
    found = compare(one, other, resamples=1000)
    assert 0 < found.apart < 50 and found.interval is not None  # few draw the first one four times


def test_one_seed_has_no_interval():
    found = compare(runs({1: {1: (1, 0.1)}, 2: {1: (2, 0.2)}}), QUICKER)
    assert found.interval is None and found.resamples == 0 and np.isnan(found.low).all()
    assert np.isfinite(found.factors).all()


def test_a_length_that_a_seed_is_missing_at_is_made_of_the_others():
    table = {1: {1: (1, 0.1), 2: (1, 0.1)}, 2: {1: (2, 0.2)}}
    found = compare(runs(table), runs(table), resamples=200)
    assert found.speedup.factor == 1 and found.interval == (1, 1)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_the_pareto_frontier_is_what_nothing_beats(points):
    def beats(p, q):
        return p != q and p[0] <= q[0] and p[1] >= q[1]

    expected = [not any(beats(p, q) for p in points) for q in points]
    seconds, quality = zip(*points, strict=True)
    assert pareto(seconds, quality).tolist() == expected
    assert pareto(seconds, [-q for q in quality], 'min').tolist() == expected


def test_steps_add_up():
    some = Steps(np.array([3.0, 2.0, 0.0, 5.0]), np.array([0.5, np.nan, np.nan, 0.8]))
    assert some.total.tolist() == [3, 5, 5, 10]
    assert some.best.tolist() == [0.5, 0.5, 0.5, 0.8]
    assert some.seconds_for([0.1, 0.5, 0.6, 0.8]).tolist() == [3, 3, 10, 10] and np.isnan(some.seconds_for(0.81))


def test_a_sequence_is_sooner_by_the_ratio_of_its_seconds():
    baseline = Steps(np.full(4, 10.0), np.array([0.5, 0.6, 0.7, 0.8]))
    arm = Steps(np.full(3, 5.0), np.array([0.5, np.nan, 0.9]))
    found = sooner(baseline, arm)
    assert found is not None and (found.quality, found.factor) == (0.8, 40 / 15)
    less = (Steps(steps.seconds, -steps.quality, 'min') for steps in (baseline, arm))
    found = sooner(*less)
    assert found is not None and (found.quality, found.factor) == (-0.8, 40 / 15)


def test_a_sequence_that_reaches_nothing_is_compared_with_nothing():
    nothing = Steps(np.array([1.0]), np.array([np.nan]))
    assert sooner(nothing, nothing) is None
    assert sooner(Steps(np.array([1.0]), np.array([0.5])), nothing) is None


def test_the_best_so_far():
    assert best_so_far([1, 3, np.nan, 2]).tolist() == [1, 3, 3, 3]
    assert best_so_far([3, 1, np.nan, 2], 'min').tolist() == [3, 1, 1, 1]


def test_speed_ups_over_a_range():
    found = speedups(curve([10, 100], [0.8, 0.9]), curve([5, 20], [0.8, 1.0]), [0.8, 0.9, 0.95])
    assert found[:2] == pytest.approx([2, 10]) and np.isnan(found[2])
