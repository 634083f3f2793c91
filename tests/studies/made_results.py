"""Results of studies, made by hand: what a driver leaves, without the runs."""

import math
import random

import yaml

from composer_kd.studies.rows import write_rows

METRIC = 'metrics/eval/MulticlassAccuracy'


def row(method, seed, quality, seconds, *, settings=None, metric=METRIC, **more):
    """A row; the name of its cell is made of the rest."""
    settings = settings or {}
    name = '-'.join([method, *map(str, settings.values()), f'seed{seed}'])
    command = [f'yamls/{method}.yaml', *(f'{key}={value}' for key, value in settings.items()), f'seed={seed}']
    return {
        **{'study': 'made', 'cell': name, 'method': method, 'role': 'student', 'baseline': method == 'baseline'},
        **{'settings': settings, 'seed': seed, 'status': 'finished', 'command': command, 'config': {}},
        **{'metrics': {metric: quality}, 'train_seconds': seconds, 'teacher_seconds': 0.0, 'teacher_forwards': 0},
        **{'teacher_share': None, 'teacher_training_seconds': 0.0, 'recording_seconds': 0, 'error': None},
        **{'epochs': 1, 'batches': 10, 'samples': 640, 'samples_per_second': 64.0, 'parameters': 1000},
        **{'world_size': 1, 'device': 'cpu', 'precision': 'fp32', 'versions': {'torch': '2.7'}, 'git_commit': 'abc'},
        **{'arm': None, 'step': None, 'of': None, **more},
    }


def study(
    folder, rows, *, name='made', kind='sweep', metric=METRIC, goal='max', points='max_duration', then=(), students=()
):
    """Write the folder of a study."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {'name': name, 'kind': kind, 'metric': metric, 'goal': goal, 'points': points}
    settings |= {'then': [*then], 'students': [*students]}
    (folder / 'study.yaml').write_text(yaml.safe_dump(settings))
    write_rows(folder, [{**row, 'study': name} for row in rows])
    return folder


def sweep(methods, *, lengths=(2, 4, 8, 16), seeds=(17, 18, 19), noise=0.002):
    """Rows of a sweep whose curves are known: quality rises with the logarithm of the epochs.

    Args:
        methods: Names -> (seconds of an epoch, what is added to the quality, other values of the rows).
    """
    draw = random.Random(0)
    rows = []
    for seed in seeds:
        for length in lengths:
            for method, (seconds, added, *more) in methods.items():
                quality = 0.85 + 0.012 * math.log2(length) + added + draw.uniform(-noise, noise)
                values = dict(more[0]) if more else {}
                settings = {'max_duration': f'{length}ep', **values.pop('settings', {})}
                taken = seconds * length * draw.uniform(1, 1.05)
                if share := values.pop('share', 0):
                    values['teacher_seconds'] = share * taken
                rows.append(row(method.split()[0], seed, quality, taken, settings=settings, **values))
    return rows


def steps(arms, *, kind='search'):
    """Rows of sequences: arms -> (seconds, quality) of each step; a quality of None is a run that was ended early."""
    return [
        row(
            arm,
            17,
            0.1 if quality is None else quality,
            seconds,
            settings={'optimizer.lr': 0.1 * (step + 1)},
            status='pruned' if quality is None else 'finished',
            arm=arm,
            step=step,
            baseline=False,
        )
        for arm, runs in arms.items()
        for step, (seconds, quality) in enumerate(runs)
    ]
