"""What a teacher costs, by the ways to make it cost less: online, recorded, every k-th batch, stopped early.

    FASHION_MNIST_DIR=data python benchmarks/overhead.py [--seeds 3] [--quick] [key=value ...]

One student and one teacher on augmented Fashion-MNIST, as many epochs each. Every run is started as a person would
start it, by Composer's launcher, one after another; the settings take turns, so that whatever else the machine has to
do meanwhile is nobody's gain. Runs that are finished already are read, not repeated.

The overhead of a way is what its runs take longer than those without a teacher; beside it stand the seconds that were
spent on the teacher alone, which other work on the machine disturbs less. Recording is done once, for all seeds
and whatever runs come later; its own seconds are given beside.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from row import row
from twins import FIRST_SEED, finish, quality_of

from composer_kd.recipes import RecipeError

_PLAIN, _TAUGHT, _RECORDED = (Path('yamls', f'fashion_mnist{name}.yaml') for name in ('', '_kd', '_recorded'))
_VIEWS, _INTERVALS = (1, 4, 16), (4, 10)
_METRIC = 'metrics/eval/MulticlassAccuracy'


def main() -> None:
    arguments = options()
    always = ['train_data.augment=true', f'max_duration={arguments.epochs}ep', *arguments.overrides]
    taught = 'fashion_mnist_augmented_teacher'
    of_teacher = ['train_data.augment=true', f'run_name={taught}']
    of_teacher += [*arguments.overrides, 'max_duration=1ep'] if arguments.quick else []
    teacher = [f'teachers.0.overrides={json.dumps(of_teacher)}']
    views_of, intervals = (_VIEWS[:1], ()) if arguments.quick else (_VIEWS, _INTERVALS)
    ways: dict[str, tuple[Path, list[str]]] = {
        'no teacher': (_PLAIN, []),
        'online': (_TAUGHT, teacher),
        **{
            _recorded(views): (
                _RECORDED,
                [f'train_data.views={views}', f'teachers.0.path={arguments.runs_dir}/records/{views}'],
            )
            for views in views_of
        },
        **{
            f'every {interval}th batch': (_TAUGHT, [*teacher, f'algorithms.knowledge_distillation.interval={interval}'])
            for interval in intervals
        },
        'stopped at 0.3dur': (_TAUGHT, [*teacher, 'algorithms.early_stop_distillation.stop=0.3dur']),
    }
    if arguments.quick:
        del ways['stopped at 0.3dur']
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    arguments.quick = False  # of `finish`, which would take untrained teachers; our own is in the epochs
    try:
        # Online first: its teacher is trained then, which the records are of.
        finish(_TAUGHT, 'overhead-seed17-online', FIRST_SEED, arguments, [*always, *teacher])
        recording = {views: record(views, [*always, *teacher], arguments) for views in views_of}
        for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
            for way in [*ways][:: 1 if seed % 2 else -1]:
                path, overrides = ways[way]
                name = f'overhead-seed{seed}-{way}'.replace(' ', '_').replace(',', '').replace('.', '_')
                runs[way].append(finish(path, name, seed, arguments, [*always, *overrides]))
    except RecipeError as error:
        raise SystemExit(str(error)) from error

    seconds = {way: median(run['train_seconds'] for run in done) for way, done in runs.items()}
    quality = {way: [quality_of(run, _METRIC) for run in done] for way, done in runs.items()}
    online = seconds['online'] - seconds['no teacher']
    cut = {way: 1 - (seconds[way] - seconds['no teacher']) / online for way in ways}
    spent = {way: median(run['teacher_seconds'] for run in done) for way, done in runs.items()}
    once = {_recorded(views): value for views, value in recording.items()}
    print(f'\n| {arguments.seeds} seeds, {arguments.epochs} epochs | accuracy, median | lowest - highest |', end='')
    print(" training, median | overhead cut by | teacher's seconds | cut by | once, beforehand |")
    print('|---|---|---|---|---|---|---|---|')
    for way, values in quality.items():
        beforehand = f'{once[way]:.1f} s' if way in once else ''
        print(
            f'| {way} | {median(values):.4f} | {min(values):.4f} - {max(values):.4f} | {seconds[way]:.1f} s | '
            f'{cut[way]:.0%} | {spent[way]:.1f} s | {1 - spent[way] / spent["online"]:.0%} | {beforehand} |'
        )
    figures = {
        'ratios': {f'overhead, {way} / online': round(1 - cut[way], 4) for way in ways if way != 'no teacher'},
        'quality': quality,
        'train_seconds': {way: [run['train_seconds'] for run in done] for way, done in runs.items()},
        'teacher_seconds': {way: [run['teacher_seconds'] for run in done] for way, done in runs.items()},
        'teacher_forwards': {way: done[0]['teacher_forwards'] for way, done in runs.items()},
        'recording_seconds': once,
        'teacher_training_seconds': runs['online'][0]['teacher_training_seconds'],
        'epochs': arguments.epochs,
        'git_commit_of_runs': runs['online'][0]['git_commit'],
        'seeds': [*range(FIRST_SEED, FIRST_SEED + arguments.seeds)],
    }
    print()
    print(row('overhead', **figures))


def _recorded(views: int) -> str:
    return f'recorded, {views} {"view" if views == 1 else "views"}'


def record(views: int, overrides: list[str], arguments: argparse.Namespace) -> float:
    """Record so many views, if they are not recorded yet; the seconds that the command took."""
    folder = Path(arguments.runs_dir, 'records', str(views))
    cost = folder.with_suffix('.json')
    if not cost.exists():
        start = time.perf_counter()
        options = ['--views', str(views), '--out', str(folder)]
        more = [*overrides, f'runs_dir={arguments.runs_dir}']
        command = [sys.executable, '-m', 'composer_kd', 'record', str(_TAUGHT), *options, *more]
        if subprocess.run(command).returncode != 0:
            raise SystemExit(f'{folder} was not recorded: see above')
        cost.write_text(json.dumps(time.perf_counter() - start), encoding='utf-8')
    return json.loads(cost.read_text(encoding='utf-8'))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='What a teacher costs, by the ways to make it cost less.')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='for all runs')
    parser.add_argument('--seeds', type=int, help='how many; default: 3')
    parser.add_argument('--epochs', type=int, help='of each run; default: 8')
    parser.add_argument('--runs-dir', help='default: runs, with --quick runs/quick')
    parser.add_argument('--quick', action='store_true', help='one seed, one epoch of 1,024 images: see that it works')
    arguments = parser.parse_intermixed_args()
    arguments.seeds = arguments.seeds or (1 if arguments.quick else 3)
    arguments.epochs = arguments.epochs or (1 if arguments.quick else 8)
    arguments.runs_dir = arguments.runs_dir or ('runs/quick' if arguments.quick else 'runs')
    arguments.overrides += ['train_data.subset=1024', 'eval_data.subset=1024'] if arguments.quick else []
    return arguments


if __name__ == '__main__':
    main()
