"""What is left of a run for people: its summary, its curves, a few lines at the end."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from composer_kd import __version__
from composer_kd.algorithms.knowledge_distillation import distillers
from composer_kd.checkpoints import file_sha256
from composer_kd.files import write
from composer_kd.recipes.check import Plan
from composer_kd.recipes.metrics_logger import read_metrics
from composer_kd.teachers import TeacherPool
from composer_kd.teams import current


def say(text: str, once: bool = False) -> None:
    """Print something as rank 0. Of several teams, all but the first say who speaks.

    Args:
        text: One or more lines.
        once: It is the same for all teams, so that the first alone says it.
    """
    team = current()
    index = team.index if team else 0
    if dist.get_global_rank() == 0 and not (once and index):
        print('\n'.join(f'team{index}: {line}' if index else line for line in text.split('\n')), flush=True)


class EvaluationLines(LoggerDestination):
    """Prints one line after each evaluation, for runs that no terminal shows a progress bar of."""

    def __init__(self):
        self._values: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep what evaluation found."""
        self._values |= {name: float(value) for name, value in metrics.items() if is_evaluation(name)}

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Print it."""
        values = ''.join(f'  {name.removeprefix("metrics/")} {value:.4f}' for name, value in self._values.items())
        say(f'epoch {state.timestamp.epoch.value}  batch {state.timestamp.batch.value}{values}')
        self._values = {}


def is_evaluation(name: str) -> bool:
    """Whether a metric of this name comes from evaluation, not from training."""
    return name.startswith('metrics/') and not name.startswith('metrics/train/')


def summarize(plan: Plan, trainer: Trainer, folder: Path, teacher_training_seconds: float) -> dict[str, Any]:
    """Write `curves.png` and, last of all, `summary.json` of a finished run; returns the summary."""
    rows = read_metrics(folder / 'metrics.jsonl')
    found = {name: value for row in rows for name, value in row.items() if is_evaluation(name)}
    losses = {name: value for name, value in rows[-1].items() if name.startswith('loss/')} if rows else {}
    state = trainer.state
    seconds = state.timestamp.total_wct.total_seconds()
    pools = [distiller.pool for distiller in distillers(state.algorithms)]
    summary = {
        'run_name': state.run_name,
        'recipe': str(plan.recipe.path),
        'metrics': found | losses,
        'train_seconds': seconds,
        'teacher_seconds': sum(pool.seconds for pool in pools),
        'teacher_forwards': sum(pool.forwards for pool in pools),
        'teacher_share': teacher_share(pools[0], state) if pools else None,
        'teacher_training_seconds': teacher_training_seconds,
        'epochs': _epochs(state),
        'batches': state.timestamp.batch.value,
        'samples': state.timestamp.sample.value,
        'samples_per_second': state.timestamp.sample.value / seconds if seconds else None,
        **circumstances(state),
        'parameters': sum(parameter.numel() for parameter in state.model.parameters()),
        'checkpoint': None,
        'checkpoint_sha256': None,
    }
    checkpoint = Path(trainer.saved_checkpoints[-1]) if trainer.saved_checkpoints else folder
    if checkpoint.is_file():
        summary['checkpoint'] = str(
            checkpoint.relative_to(folder) if checkpoint.is_relative_to(folder) else checkpoint.absolute()
        )
        summary['checkpoint_sha256'] = file_sha256(checkpoint)
    plot(rows, folder / 'curves.png', state.run_name)
    write(folder / 'summary.json', json.dumps(summary, indent=2) + '\n')
    return summary


def _epochs(state: State) -> int:
    """Epochs that are done; one that ended with the run is, whether or not Composer came to count it."""
    batches, time = state.dataloader_len, state.timestamp
    return time.epoch.value + int(batches is not None and time.batch_in_epoch == batches)


def circumstances(state: State) -> dict[str, Any]:
    """Hardware and versions."""
    on_gpu = state.device.name == 'gpu'
    return {
        'world_size': dist.get_world_size(),
        'device': torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        'precision': state.precision.value,
        'versions': {
            'composer-kd': __version__,
            **{name: version(name) for name in ('mosaicml', 'torch', 'torchvision')},
            'python': platform.python_version(),
        },
        'git_commit': _git_commit(),
    }


def teacher_share(pool: TeacherPool, state: State) -> float | None:
    """What the teachers heard, of what they hear in a full run: each of them every sample that is trained on."""
    samples = state.timestamp.sample.value
    return pool.samples_heard * dist.get_world_size() / (samples * len(pool)) if samples else None


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the losses in training, and what evaluation found, against batches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = {name: None for row in rows for name in row}
    panels = {
        'training loss': [name for name in names if name.startswith('loss/train/')],
        'evaluation': [name for name in names if is_evaluation(name)],
    }
    figure = Figure(figsize=(10, 4), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (label, curves) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name in curves:
            points = [(row['batch'], row[name]) for row in rows if isinstance(row.get(name), int | float)]
            step = max(1, len(points) // 400)  # a mean of every so many, where there are more than can be told apart
            groups = [points[start : start + step] for start in range(0, len(points), step)]
            x = [group[-1][0] for group in groups]
            y = [sum(value for _, value in group) / len(group) for group in groups]
            marker = '.' if len(x) < 100 else None
            axes.plot(x, y, label=name.split('/')[-1], linewidth=1.2, marker=marker)
        axes.set(xlabel='batches', title=label)
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
        if curves:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def lines(summary: dict[str, Any], folder: Path) -> str:
    """The end of a run on a screen."""
    seconds, teacher = summary['train_seconds'], summary['teacher_seconds']
    of_them = f', {teacher:.1f} s ({teacher / seconds:.0%}) of them the teachers' if teacher and seconds else ''
    share = summary['teacher_share']
    heard = (
        [f'  teachers    heard {share:.1%} of what a full run hears'] if share is not None and share < 0.9995 else []
    )
    table = [f'  {name:<40} {float(value):.4f}' for name, value in summary['metrics'].items()]
    return '\n'.join(
        [
            f'{summary["run_name"]}: {summary["epochs"]} epochs, {summary["batches"]} batches, '
            f'{seconds:.1f} s of training{of_them}',
            *table,
            *heard,
            f'  checkpoint  {folder / summary["checkpoint"] if summary["checkpoint"] else "none"}',
            f'  curves      {folder / "curves.png"}',
        ]
    )


def _git_commit() -> str | None:
    """The commit of the current folder's repository, marked where files differ from it."""
    try:
        git = [
            subprocess.run(['git', *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (['rev-parse', 'HEAD'], ['status', '--porcelain', '--untracked-files=no'])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return f'{git[0]}-dirty' if git[1] else git[0]
