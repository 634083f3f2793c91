"""The row of a study, a folder of `composer-kd sweep` or `sequence`: what each of its runs took, and reached.

Before it, a table of its methods: of each, the mean over the runs, and their standard deviation; where a run is one of
several teams, of the mean over these, since the best of them is chosen by what it is judged by.
"""

import argparse
import math
import statistics
from typing import Any

from row import row

from composer_kd.studies.curves import Results, read_results


def main() -> None:
    """Print the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', help='of the study')
    parser.add_argument('--metric', help='default: what the study says')
    arguments = parser.parse_args()
    (results,) = read_results([arguments.folder], arguments.metric)
    runs = {each['cell']: _figures(results, each) for each in results.rows}
    for line in _table(results):
        print(line)
    of_runs = {key: _all(results, key) for key in ('git_commit', 'device', 'world_size', 'versions')}
    print(row('study', study=results.name, metric=results.metric, of_runs=of_runs, runs=runs))


def _all(results: Results, key: str) -> list[Any]:
    """Every value that runs have there."""
    found = []
    for each in results.rows:
        if each[key] is not None and each[key] not in found:
            found.append(each[key])
    return found


def _figures(results: Results, each: dict[str, Any]) -> dict[str, Any]:
    keys = ('train_seconds', 'teacher_seconds', 'teacher_forwards')
    seconds = {key: each[key] and round(each[key], 3) for key in keys}
    figures = {'status': each['status'], 'parameters': each['parameters'], **seconds}
    if teams := _teams(results, each):
        figures['teams'] = teams
    return figures | ({} if math.isnan(quality := results.quality(each)) else {'quality': quality})


def _teams(results: Results, each: dict[str, Any]) -> list[float]:
    """What each team of a run reached; nothing of a run that is none of teams."""
    return [results.quality({**each, 'metrics': metrics}) for metrics in (each.get('teams') or {}).values()]


def _table(results: Results) -> list[str]:
    """Lines of Markdown, one for each method and the settings that it was run with."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for each in results.students:
        if each['status'] == 'finished':
            name = ' '.join([each['method'], *map(str, each['settings'].values())])
            runs.setdefault(name, []).append(each)
    lines = ['| | runs | mean | deviation | seconds |', '|---|---|---|---|---|']
    for name, those in runs.items():
        means = [statistics.mean(_teams(results, each) or [results.quality(each)]) for each in those]
        deviation = f'{statistics.stdev(means):.4f}' if len(means) > 1 else ''
        seconds = statistics.mean(each['train_seconds'] for each in those)
        lines.append(f'| {name} | {len(means)} | {statistics.mean(means):.4f} | {deviation} | {seconds:.1f} |')
    return lines


if __name__ == '__main__':
    main()
