"""Small sequences for tests, whose runs are made within this process."""

from pathlib import Path
from types import SimpleNamespace

from composer_kd.recipes import RecipeError, run

METRIC = 'metrics/eval/MulticlassAccuracy'
RECIPE = """\
seed: 17
max_duration: 2ep
device: cpu
progress_bar: false
model: {name: small_convnet, num_classes: 10, width: 2}
train_data: {name: digits, split: train, batch_size: 32, subset: 128, shuffle_seed: '${seed}'}
eval_data: {name: digits, split: test, batch_size: 500}
optimizer: {name: sgd, lr: 0.1}
"""
HEAD = {
    kind: f'kind: {kind}\nmetric: {METRIC}\n{more}'
    for kind, more in {
        'search': 'recipe: small.yaml\ntrials: 4\nsearch: {optimizer.lr: {low: 1.0e-3, high: 1.0, log: true}}\n',
        'continual': 'recipe: small.yaml\nstages: {key: train_data.subset, values: [64, 96, 128]}\n',
        'chain': 'recipe: small.yaml\ngenerations: 3\n',
    }.items()
}
TAUGHT = 'arms: {with: {teachers_from: last, record: true}}\n'


def write(text: str, recipe: str = RECIPE, name: str = 's.yaml') -> Path:
    """Write a sequence file, and its recipe beside it."""
    Path('small.yaml').write_text(recipe)
    Path(name).write_text(text)
    return Path(name)


class Jobs:
    """Stands in for `composer_kd.jobs.Jobs`: a run is over as soon as it is started.

    Runs in `broken` fail, and `stopped` is Ctrl-C.
    """

    started: list[list[str]] = []
    broken: set[str] = set()
    stopped: str | None = None

    def __init__(self, *_):
        self._ended: list[SimpleNamespace] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def start(self, arguments, log):
        Jobs.started.append([*arguments])
        if log.stem == Jobs.stopped:
            raise KeyboardInterrupt
        with log.open('a') as file:
            try:
                if log.stem in Jobs.broken:
                    raise RecipeError('there is no room left')
                run(arguments[0], arguments[1:])
            except RecipeError as error:
                file.write(f'{error}\n')
        self._ended = [SimpleNamespace()]
        return self._ended[0]

    def ended(self):
        return self._ended

    @classmethod
    def names(cls) -> list[str]:
        """The runs that were started since this was asked last."""
        found = [item.removeprefix('run_name=') for run in cls.started for item in run if item.startswith('run_name=')]
        cls.started.clear()
        return found


def without_seconds(rows):
    """Rows without what may differ between a sequence that was broken off and one that was not."""
    # A run that goes on asks a teacher only about what it has not said yet.
    aside = ('train_seconds', 'teacher_seconds', 'teacher_training_seconds', 'samples_per_second', 'cumulated_seconds')
    return [{key: value for key, value in row.items() if key not in (*aside, 'teacher_forwards')} for row in rows]
