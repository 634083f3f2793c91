"""The rows of studies -> curves: which runs belong together, and what each of them is charged."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from composer_kd.recipes.load import RecipeError, nearest, read
from composer_kd.studies.frontier import Goal, Runs, Steps
from composer_kd.studies.rows import RESULTS_FILE, read_rows
from composer_kd.studies.study import GOALS, SETTINGS_FILE

Row = dict[str, Any]
Charge = Literal['none', 'recording', 'teacher', 'all']
CHARGES: tuple[Charge, ...] = get_args(Charge)

_SEQUENCES = ('search', 'continual', 'chain')
_KINDS = ('sweep', *_SEQUENCES)


@dataclass(frozen=True)
class Results:
    """What a study has left: what its results mean, and its rows.

    Args:
        folder: Where they lie.
        name: Of the study; if several are read, one that no other one has.
        kind: `sweep`, `search`, `continual` or `chain`.
        metric: What is compared.
        goal: Whether more of it is better, or less.
        points: The key in which the runs of one curve differ.
        rows: Of all runs that have ended.
        expected: Names of the runs that are compared, as far as they were known before there was any.
    """

    folder: Path
    name: str
    kind: str
    metric: str
    goal: Goal
    points: str | None
    rows: list[Row]
    expected: Sequence[str] = ()

    @property
    def students(self) -> list[Row]:
        """The rows of what is compared."""
        return [row for row in self.rows if row['role'] == 'student']

    def judged(self) -> list[Row]:
        """The rows but of what goes on from students: what became of that, students say if they are judged by it."""
        return [row for row in self.rows if row['role'] != 'follow-up']

    def quality(self, row: Row) -> float:
        """The metric of a finished run; NaN if it has none, or was not finished.

        What a run that is ended early was worth at that time is not what its length is worth, as its schedule had other
        plans.
        """
        value = float(row['metrics'].get(self.metric, 'nan')) if row['status'] == 'finished' else math.nan
        return value if math.isfinite(value) else math.nan

    def length(self, row: Row) -> str:
        """The length of a run: what it has at the key in which the runs of a curve differ."""
        if self.points is None or self.points in row['settings']:
            return str(row['settings'].get(self.points, ''))
        found: Any = row['config']
        for part in self.points.split('.'):
            found = found.get(part, '') if isinstance(found, dict) else ''
        return str(found)


@dataclass(frozen=True)
class Line:
    """The runs of one curve: of one method, with the same settings but for their length.

    Args:
        name: What people call it.
        results: Of its study.
        method: Its method.
        settings: What sets it apart from other curves of the method.
        is_baseline: Whether others are compared with it.
        rows: Of its finished runs.
        runs: Of these the length, seed, charged seconds and quality.
        others: Rows of its runs that failed, or have no quality.
    """

    name: str
    results: Results
    method: str
    settings: dict[str, Any]
    is_baseline: bool
    rows: list[Row] = field(repr=False)
    runs: Runs = field(repr=False)
    others: list[Row] = field(repr=False)

    def points(self) -> list[tuple[str, list[int]]]:
        """Each length, and the indices of its runs; the quickest first."""
        lengths = dict.fromkeys(self.runs.lengths)
        of = {length: [i for i, each in enumerate(self.runs.lengths) if each == length] for length in lengths}
        return sorted(
            ((str(length), indices) for length, indices in of.items()),
            key=lambda point: np.log([self.runs.seconds[i] for i in point[1]]).mean(),
        )


@dataclass(frozen=True)
class Course:
    """How one arm of a study went: its runs, in order.

    Args:
        name: What people call it.
        results: Of its study.
        is_baseline: Whether others are compared with it.
        rows: Of its runs.
        steps: Their seconds of training, and their quality.
    """

    name: str
    results: Results
    is_baseline: bool
    rows: list[Row] = field(repr=False)
    steps: Steps = field(repr=False)


def read_results(folders: Sequence[str | Path], metric: str | None = None, goal: str | None = None) -> list[Results]:
    """Read the results of studies that are to be compared.

    Args:
        folders: Of the studies, at least one.
        metric: What is compared. Default: None, what the studies say.
        goal: `max` or `min`. Default: None, what the studies say.

    Raises:
        RecipeError: One holds no study, is damaged, or cannot be compared with the first.
    """
    found = [_results(Path(folder), metric, goal) for folder in folders]
    first = found[0]
    for other in found[1:]:
        for key in ('metric', 'goal'):
            ours, theirs = getattr(first, key), getattr(other, key)
            if ours != theirs:
                where = other.folder / SETTINGS_FILE
                raise RecipeError(f'{where}: {key} is {theirs}, in {first.folder} {ours}; report them one by one')
        if is_sequence(first) != is_sequence(other):
            where = other.folder / SETTINGS_FILE
            raise RecipeError(
                f'{where}: a {other.kind} beside a {first.kind} in {first.folder}; report them one by one'
            )
    resolved = [one.folder.resolve() for one in found]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise RecipeError(f'{found[index].folder}: named twice; name each folder once')
    times = Counter(one.name for one in found)
    return [one if times[one.name] == 1 else _renamed(one, str(one.folder)) for one in found]


def is_sequence(results: Results) -> bool:
    """Whether what is compared are sequences of runs."""
    return results.kind in _SEQUENCES


def charged(row: Row, charge: Charge) -> float:
    """The seconds that a run is charged, as if it had to pay for everything alone.

    Args:
        row: Its row.
        charge: Beside its own training, in which what its teachers say meanwhile is counted always: `recording`, the
            making of the record that it learns from; `teacher`, the training of its teachers; `all`, both; `none`.
    """
    seconds = row['train_seconds'] or 0.0
    if charge in ('recording', 'all'):
        seconds += row['recording_seconds'] or 0.0
    if charge in ('teacher', 'all'):
        seconds += row['teacher_training_seconds'] or 0.0
    return seconds


def lines(results: Sequence[Results], charge: Charge = 'none') -> list[Line]:
    """The curves of some sweeps; baselines first, then in the order of the rows."""
    groups: dict[tuple[int, str, str], list[Row]] = {}
    for index, one in enumerate(results):
        for row in one.students:
            settings = json.dumps(_apart(row, one), sort_keys=True)
            groups.setdefault((index, row['method'], settings), []).append(row)
    names = _names(results, groups)
    found = []
    for (index, method, _), rows in groups.items():
        one = results[index]
        good, others = _parted(rows, one)
        runs = Runs(
            [one.length(row) for row in good],
            [row['seed'] for row in good],
            [charged(row, charge) for row in good],
            [one.quality(row) for row in good],
            one.goal,
        )
        name, apart = names[index, method], _apart(rows[0], one)
        line = Line(_labelled(name, apart, rows[0]), one, method, apart, rows[0]['baseline'], good, runs, others)
        found.append(line)
    return sorted(found, key=lambda line: not line.is_baseline)


def baseline_of(line: Line, among: Sequence[Line]) -> Line | None:
    """The curve that another one is compared with: of the baseline of its own study, and with the same settings."""
    for other in among:
        is_ours = other.is_baseline and other.results is line.results
        if is_ours and line.settings == line.settings | other.settings:
            return other
    return None


def courses(results: Sequence[Results]) -> list[Course]:
    """The arms of some studies; in each study the first is the baseline if none says that it is."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for index, one in enumerate(results):
        for row in one.students:
            groups.setdefault((index, row['arm'] or row['method']), []).append(row)
    times = Counter(arm for _, arm in groups)
    found = []
    for index, one in enumerate(results):
        ours = {arm: rows for (i, arm), rows in groups.items() if i == index}
        baseline = next((arm for arm, rows in ours.items() if rows[0]['baseline']), next(iter(ours), None))
        for arm, rows in ours.items():
            rows = sorted(rows, key=lambda row: row['step'] or 0)
            seconds = np.array([row['train_seconds'] or 0.0 for row in rows])
            steps = Steps(seconds, np.array([one.quality(row) for row in rows]), one.goal)
            name = arm if times[arm] == 1 else f'{one.name}/{arm}'
            found.append(Course(name, one, arm == baseline, rows, steps))
    return found


def missing(results: Results) -> list[str]:
    """Names of the runs of a sweep that have not ended yet."""
    there = {row['cell'] for row in results.students}
    return [name for name in results.expected if name not in there]


def _results(folder: Path, metric: str | None, goal: str | None) -> Results:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise RecipeError(
            f'{folder}: there is no study; give the folder of one, with {SETTINGS_FILE} and {RESULTS_FILE}'
        )
    source = read(path, 'study')
    config = source.config
    for key, known in (('kind', _KINDS), ('goal', GOALS)):
        if config.get(key) not in known:
            raise source.error((key,), f'must be one of {", ".join(known)}, not {config.get(key)!r}', 1)
    for key in ('name', 'metric', 'points'):
        if not isinstance(config.get(key), str) and not (key == 'points' and config.get(key) is None):
            raise source.error((key,), f'must be text, not {config.get(key)!r}', 1)
    values = {key: config.get(key) for key in ('name', 'kind', 'metric', 'goal', 'points')}
    values |= {key: given for key, given in (('metric', metric), ('goal', goal)) if given is not None}
    found = read_rows(folder)
    rows: Sequence[Row | None] = found
    if (judge := str(values['metric']).partition('/')[0]) in (config.get('then') or []):
        rows = _judged(found, judge)
    expected = config.get('students', [])
    if not isinstance(expected, list) or not all(isinstance(name, str) for name in expected):
        raise source.error(('students',), 'must be names of runs', 1)
    ended = [row for row in rows if row]
    results = Results(folder, **values, rows=ended, expected=expected)  # type: ignore[arg-type]
    for number, row in enumerate(rows, 1):
        if row:
            _check(results, row, f'{folder / RESULTS_FILE}:{number}')
    if not any(row['status'] == 'finished' for row in results.students):
        todo = 'let one finish first'
        if any(row['status'] == 'failed' for row in results.students):
            todo = f'see {folder / RESULTS_FILE} for what failed'
        raise RecipeError(f'{folder}: no run of this study is finished; {todo}', 1)
    if all(math.isnan(results.quality(row)) for row in results.students):
        raise RecipeError(f'{folder}: no finished run of this study has a finite {results.metric}', 1)
    return results


def _check(results: Results, row: Row, where: str) -> None:
    """Raise if a finished run does not say what a curve needs."""
    if row['role'] != 'student' or row['status'] != 'finished':
        return
    if not (row['train_seconds'] and row['train_seconds'] > 0):
        raise RecipeError(f'{where}: {row["cell"]} is finished, but has train_seconds {row["train_seconds"]}', 1)
    if results.metric not in row['metrics']:
        hint = nearest(results.metric, row['metrics']) if row['metrics'] else 'it has none'
        raise RecipeError(f'{where}: {row["cell"]} did not report {results.metric}; {hint}', 1)
    try:
        results.quality(row)
    except (TypeError, ValueError):
        value = row['metrics'][results.metric]
        raise RecipeError(f'{where}: {row["cell"]}: {results.metric} is no number: {value!r}', 1) from None


def _judged(rows: Sequence[Row], judge: str) -> list[Row | None]:
    """The rows, in which students have the metrics of the runs that go on from them, and end as these do.

    A student that nothing has gone on from yet is not there yet: None.
    """
    of = {row['of']: row for row in rows if row['role'] == 'follow-up' and row['method'] == judge}

    def judged(row: Row) -> Row | None:
        if row['role'] != 'student' or row['status'] != 'finished':
            return row
        if row['cell'] not in of:
            return None
        then = of[row['cell']]
        metrics = {f'{judge}/{name}': value for name, value in then['metrics'].items()}
        error = then['error'] and f'{then["error"].rstrip()} ({then["cell"]})'
        return {**row, 'metrics': metrics, 'status': then['status'], 'error': error}

    return [judged(row) for row in rows]


def _renamed(results: Results, name: str) -> Results:
    return Results(**{**vars(results), 'name': name})


def _apart(row: Row, results: Results) -> dict[str, Any]:
    """The settings that set curves apart."""
    return {key: value for key, value in row['settings'].items() if key != results.points}


def _parted(rows: Sequence[Row], results: Results) -> tuple[list[Row], list[Row]]:
    """Those that have a quality, and the others."""
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        parts[math.isnan(results.quality(row))].append(row)
    return parts


def _names(results: Sequence[Results], groups: dict[tuple[int, str, str], list[Row]]) -> dict[tuple[int, str], str]:
    """The name of each method, with its study's name before it where two studies have it."""
    methods = dict.fromkeys((index, method) for index, method, _ in groups)
    times = Counter(method for _, method in methods)
    return {
        (index, method): method if times[method] == 1 else f'{results[index].name}/{method}'
        for index, method in methods
    }


def _labelled(name: str, settings: dict[str, Any], row: Row) -> str:
    """A method's name and its settings, by the last word of their keys where that says which is meant."""
    last = Counter(key.rpartition('.')[2] for key in row['settings'])
    words = [key.rpartition('.')[2] if last[key.rpartition('.')[2]] == 1 else key for key in settings]
    return ' '.join([name, *(f'{word}={value}' for word, value in zip(words, settings.values(), strict=True))])
