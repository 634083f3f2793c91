"""What distillation gains, and what it costs: a recipe and its distilled twin, side by side over several seeds.

    python benchmarks/twins.py yamls/digits.yaml yamls/digits_kd.yaml [--seeds 5] [--quick] [key=value ...]
    python benchmarks/twins.py yamls/bert_text.yaml yamls/bert_text_kd.yaml --then yamls/text_classification.yaml

Every run is started as a person would start it, by Composer's launcher, one after another. Runs that are finished
already are read, not repeated; one that was interrupted goes on. Overrides are for both recipes. With `--then`, every
run is fine-tuned by a third recipe, and what is compared is the quality after that.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from row import row

from composer_kd.recipes import RecipeError, check, load
from composer_kd.recipes.folder import finished_run

FIRST_SEED = 17


def main() -> None:
    arguments = options()
    baseline, distilled = arguments.baseline.stem, arguments.distilled.stem
    seeds = [*range(FIRST_SEED, FIRST_SEED + arguments.seeds)]
    runs: dict[str, list[dict[str, Any]]] = {baseline: [], distilled: []}
    judged: dict[str, list[dict[str, Any]]] = {baseline: [], distilled: []}
    try:
        for seed in seeds:
            # Each goes first in turn: whatever else the machine has to do meanwhile is nobody's gain.
            for path in (arguments.baseline, arguments.distilled)[:: 1 if seed % 2 else -1]:
                run = finish(path, f'{path.stem}-seed{seed}', seed, arguments, arguments.overrides)
                runs[path.stem].append(run)
                if arguments.then:
                    start = [f'model.pretrained={arguments.runs_dir}/{run["run_name"]}']
                    name = f'{run["run_name"]}-{arguments.then.stem}'
                    run = finish(arguments.then, name, seed, arguments, start)
                judged[path.stem].append(run)
    except RecipeError as error:
        raise SystemExit(str(error)) from error

    quality = {name: [quality_of(run, arguments.metric) for run in done] for name, done in judged.items()}
    seconds = {name: [run['train_seconds'] for run in done] for name, done in runs.items()}
    difference = median(quality[distilled]) - median(quality[baseline])
    ratio = median(seconds[distilled]) / median(seconds[baseline])
    share = median(run['teacher_seconds'] / run['train_seconds'] for run in runs[distilled])
    teacher_training = runs[distilled][0]['teacher_training_seconds']

    print(f'\n| {len(seeds)} seeds | {arguments.metric.split("/")[-1]}, median | min | max | training, median |')
    print('|---|---|---|---|---|')
    for name, values in quality.items():
        low, middle, high = min(values), median(values), max(values)
        print(f'| {name} | {middle:.4f} | {low:.4f} | {high:.4f} | {median(seconds[name]):.1f} s |')
    print(
        f'\nDifference of the medians {difference:+.4f}; training takes {ratio:.2f}x the time, {share:.0%} of it the '
        f"teacher's; the teacher's own training, once: {teacher_training:.1f} s.\n"
    )
    figures = {
        'ratios': {f'training time, {distilled} / {baseline}': round(ratio, 4)},
        'metric': arguments.metric,
        'then': str(arguments.then) if arguments.then else None,
        'difference': round(difference, 6),
        'quality': quality,
        'train_seconds': seconds,
        'teacher_share': round(share, 4),
        'teacher_training_seconds': teacher_training,
        'seeds': seeds,
        'device': runs[distilled][0]['device'],
        'world_size': runs[distilled][0]['world_size'],
    }
    if arguments.plot:
        plot(quality, arguments)
    print(row('twins', **figures))


def finish(path: Path, name: str, seed: int, arguments: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """The summary of a run, which is started unless it is finished already."""
    overrides = [*overrides, f'seed={seed}', f'run_name={name}', f'runs_dir={arguments.runs_dir}']
    if arguments.quick:
        overrides += quick(path)
    recipe = check(load(path, overrides)).recipe
    summary = finished_run(recipe)
    if summary is None:
        command = [sys.executable, '-m', 'composer', str(path), *overrides, 'autoresume=true']
        failed = subprocess.run(command).returncode != 0
        summary = None if failed else finished_run(recipe)
    if summary is None:
        raise SystemExit(f'{path} with seed {seed} did not finish: see above')
    return summary


def quick(path: Path) -> list[str]:
    """Overrides for a run of two batches, taught by networks that nobody has trained."""
    overrides = ['max_duration=2ba']
    for index, teacher in enumerate(load(path).config.get('teachers') or []):
        if 'recipe' in teacher:
            name = teacher.pop('recipe')
            beside = path.parent / name
            teacher['model'] = load(beside if beside.exists() else name).config['model']
            overrides.append(f'teachers.{index}={json.dumps(teacher)}')
    return overrides


def quality_of(run: dict[str, Any], metric: str) -> float:
    """The metric of a finished run."""
    if metric not in run['metrics']:
        raise SystemExit(f'{run["run_name"]} has no {metric}; --metric can be: {", ".join(run["metrics"])}')
    return run['metrics'][metric]


def plot(quality: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    """Draw the quality of every run, one dot each, and the medians."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.9), layout='constrained')
    axes = figure.subplots()
    for height, (name, colour) in enumerate(zip(reversed(quality), ('#c0392b', '#7f8c8d'), strict=True)):
        values = quality[name]
        axes.plot(values, [height] * len(values), 'o', color=colour, alpha=0.6, markersize=7, markeredgewidth=0)
        axes.plot([median(values)] * 2, [height - 0.25, height + 0.25], color=colour, linewidth=2)
    axes.set(xlabel=arguments.metric.split('/')[-1], yticks=[0, 1], yticklabels=reversed(quality), ylim=(-0.6, 1.6))
    axes.grid(axis='x', alpha=0.3)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.tick_params(left=False)
    figure.savefig(arguments.plot, dpi=150)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Runs a recipe and its distilled twin with several seeds.')
    parser.add_argument('baseline', type=Path, metavar='BASELINE.yaml')
    parser.add_argument('distilled', type=Path, metavar='KD.yaml')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='for both recipes')
    parser.add_argument('--seeds', type=int, help='how many; default: 5')
    parser.add_argument('--metric', default='metrics/eval/MulticlassAccuracy', help='default: %(default)s')
    parser.add_argument('--then', type=Path, metavar='RECIPE.yaml', help='fine-tune every run by it, and compare that')
    parser.add_argument('--runs-dir', help='default: runs, with --quick runs/quick')
    parser.add_argument('--plot', metavar='FILE.png', help='draw the metric of every run')
    parser.add_argument('--quick', action='store_true', help='one seed, two batches: see that it works')
    arguments = parser.parse_intermixed_args()
    arguments.seeds = arguments.seeds or (1 if arguments.quick else 5)
    arguments.runs_dir = arguments.runs_dir or ('runs/quick' if arguments.quick else 'runs')
    return arguments


if __name__ == '__main__':
    main()
