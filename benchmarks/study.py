"""The row of a study, a folder of `composer-kd sweep` or `sequence`: what each of its runs took, and reached."""

import argparse
import math
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
    return figures | ({} if math.isnan(quality := results.quality(each)) else {'quality': quality})


if __name__ == '__main__':
    main()
