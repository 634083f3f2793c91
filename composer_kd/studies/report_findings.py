"""What some studies have found: each curve, or each sequence, beside the baseline of its study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from composer_kd.recipes.load import RecipeError
from composer_kd.studies.curves import (
    Charge,
    Course,
    Line,
    Results,
    baseline_of,
    courses,
    is_sequence,
    lines,
    missing,
    read_results,
)
from composer_kd.studies.frontier import Comparison, Curve, Speedup, compare, sooner


@dataclass(frozen=True)
class OfLine:
    """What was found of a curve.

    Args:
        line: Its runs.
        curve: Their means; None if no run has a quality.
        baseline: What it is compared with, if there is something.
        comparison: How it compares.
    """

    line: Line
    curve: Curve | None
    baseline: OfLine | None = None
    comparison: Comparison | None = None


@dataclass(frozen=True)
class OfCourse:
    """What was found of a sequence.

    Args:
        course: Its runs.
        baseline: What it is compared with, if there is something.
        speedup: How much sooner it reaches the best quality that both reach.
    """

    course: Course
    baseline: Course | None = None
    speedup: Speedup | None = None


@dataclass(frozen=True)
class Findings:
    """What some studies have found.

    Args:
        results: The studies, one at least.
        charge: What runs are charged beside their own training.
        lines: The curves of sweeps.
        courses: The arms of sequences.
        missing: Runs that have not ended yet.
    """

    results: list[Results]
    charge: Charge
    lines: list[OfLine]
    courses: list[OfCourse]
    missing: list[str]


def find(folders: Sequence[str | Path], charge: Charge, metric: str | None = None, goal: str | None = None) -> Findings:
    """Compare the runs of some studies.

    Raises:
        RecipeError: There are no results, damaged ones, or ones that cannot be compared.
    """
    results = read_results(folders, metric, goal)
    if is_sequence(results[0]):
        if charge != 'none':
            todo = f'leave out --charge {charge}'
            raise RecipeError(f'{folders[0]}: what teaches in a sequence are its own runs, which are charged; {todo}')
        return Findings(results, charge, [], _courses(courses(results)), [])
    found = lines(results, charge)
    not_there = [run for one in results for run in missing(one)]
    return Findings(results, charge, _lines(found), [], not_there)


def _lines(found: Sequence[Line]) -> list[OfLine]:
    plain = {id(line): OfLine(line, line.runs.curve()) for line in found}
    compared = []
    for line in found:
        this, baseline = plain[id(line)], None if line.is_baseline else baseline_of(line, found)
        against = plain[id(baseline)] if baseline else None
        if against is None or against.curve is None or this.curve is None:
            compared.append(this)
        else:
            compared.append(OfLine(line, this.curve, against, compare(against.line.runs, line.runs)))
    return compared


def _courses(found: Sequence[Course]) -> list[OfCourse]:
    baselines = {id(course.results): course for course in found if course.is_baseline}
    return [
        OfCourse(course)
        if course.is_baseline
        else OfCourse(course, (other := baselines[id(course.results)]), sooner(other.steps, course.steps))
        for course in found
    ]
