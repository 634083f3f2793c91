"""The row of a study, a folder of `composer-kd sweep` or `sequence`: what each of its runs took, and reached."""

import argparse
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
    commits = sorted({str(each['git_commit']) for each in results.rows})
    runs = {each['cell']: _figures(results, each) for each in results.rows}
    print(row('study', study=results.name, metric=results.metric, git_commit_of_runs=commits, runs=runs))


def _figures(results: Results, each: dict[str, Any]) -> dict[str, Any]:
    keys = ('train_seconds', 'teacher_seconds', 'teacher_forwards')
    seconds = {key: each[key] and round(each[key], 3) for key in keys}
    is_judged = each['role'] == 'student' and each['status'] == 'finished'
    return {'status': each['status'], **seconds, **({'quality': results.quality(each)} if is_judged else {})}


if __name__ == '__main__':
    main()
