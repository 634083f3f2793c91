"""The settings table: every way to distill, and the small run that all of them go through."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer import Algorithm, Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.utils import dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_kd import (
    EarlyStopDistillation,
    KnowledgeDistillation,
    NetworkTeacher,
    RegularizationSchedule,
    TeacherSampling,
)
from composer_kd.data import data_spec

CLASSES, SAMPLES, BATCH, EPOCHS = 5, 128, 32, 2
BATCHES = EPOCHS * SAMPLES // BATCH


def network(seed: int, width: int = 6, dropout: float = 0.0) -> nn.Module:
    """A convolutional network without BatchNorm, for 8 x 8 images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(width, width, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * width, CLASSES),
        )


def classifier(seed: int, **kwargs: Any) -> ComposerClassifier:
    return ComposerClassifier(network(seed, **kwargs), num_classes=CLASSES)


def teachers(number: int) -> list[NetworkTeacher]:
    # Dropout in a teacher would show if it were not in eval mode.
    return [NetworkTeacher(classifier(100 + i, width=8, dropout=0.5), name=f'teacher{i}') for i in range(number)]


def new_folder() -> str:
    """An empty one, the same on all ranks, that is there until the process ends."""
    _folders.append(tempfile.TemporaryDirectory())
    names: list[Any] = [_folders[-1].name]
    dist.broadcast_object_list(names)
    return names[0]


_folders: list[tempfile.TemporaryDirectory] = []

SETTINGS: dict[str, Callable[[], list[Algorithm]]] = {
    'one_teacher': lambda: [KnowledgeDistillation(teachers(1))],
    'average': lambda: [KnowledgeDistillation(teachers(3), temperature=2.0)],
    'mse': lambda: [KnowledgeDistillation(teachers(1), loss='mse', kd_weight=1.0, label_weight=1.0)],
    'cosine': lambda: [KnowledgeDistillation(teachers(1), loss='cosine')],
    'reverse_kl': lambda: [KnowledgeDistillation(teachers(1), loss='reverse_kl')],
    'jsd': lambda: [KnowledgeDistillation(teachers(1), loss='jsd')],
    'interval': lambda: [KnowledgeDistillation(teachers(1), interval=3)],
    'sampled': lambda: [TeacherSampling(), KnowledgeDistillation(teachers(3))],
    'sampled_two': lambda: [KnowledgeDistillation(teachers(3)), TeacherSampling(2, weights=[1, 2, 4])],
    'sampled_per_sample': lambda: [TeacherSampling(per='sample'), KnowledgeDistillation(teachers(3))],
    'sampled_two_per_sample': lambda: [
        KnowledgeDistillation(teachers(3), weights='random', average='probabilities', only_correct=True),
        TeacherSampling(2, weights=[1, 2, 4], per='sample'),
    ],
    'weights': lambda: [KnowledgeDistillation(teachers(3), weights=[1, 2, 4])],
    'random_weights': lambda: [KnowledgeDistillation(teachers(3), weights='random')],
    'probabilities': lambda: [KnowledgeDistillation(teachers(3), average='probabilities', temperature=2.0)],
    'losses': lambda: [KnowledgeDistillation(teachers(3), average='losses', loss='jsd', weights=[1, 2, 4])],
    'losses_per_sample': lambda: [
        KnowledgeDistillation(teachers(3), average='losses'),
        TeacherSampling(2, per='sample'),
    ],
    'only_correct': lambda: [KnowledgeDistillation(teachers(3), only_correct=True)],
    'probability': lambda: [KnowledgeDistillation(teachers(1), probability=0.5, kd_weight=1.0, label_weight=0.0)],
    'host': lambda: [KnowledgeDistillation(teachers(3), residency='host'), TeacherSampling()],
    'record': lambda: [KnowledgeDistillation(teachers(1), record=new_folder())],
    'record_top': lambda: [KnowledgeDistillation(teachers(2), record=new_folder(), record_top=3), TeacherSampling()],
    'record_top_losses': lambda: [
        KnowledgeDistillation(teachers(2), record=new_folder(), record_top=3, average='losses')
    ],
    'early_stop': lambda: [EarlyStopDistillation('0.5dur'), KnowledgeDistillation(teachers(1))],
    'window': lambda: [KnowledgeDistillation(teachers(1)), EarlyStopDistillation('6ba', start='2ba', ramp='3ba')],
    'regularization': lambda: [
        RegularizationSchedule(while_distilling=0.1, groups=[0]),
        KnowledgeDistillation(teachers(1)),
        EarlyStopDistillation('6ba', ramp='4ba'),
    ],
    'all': lambda: [
        KnowledgeDistillation(
            teachers(3), kd_weight=4.0, interval=2, probability=0.9, residency='host', record=new_folder()
        ),
        EarlyStopDistillation('0.75dur', ramp='0.5dur'),
        TeacherSampling(),
    ],
}


def data(batch_size: int = BATCH, channels: int = 1, size: int = 8) -> DataLoader:
    """A training loader that knows which samples are in a batch, and has a view of them for each epoch."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(SAMPLES, channels, size, size, generator=generator)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    dataset = TensorDataset(images, labels)
    return data_spec(dataset, batch_size=batch_size, train=True, views=EPOCHS).dataloader


def trainer(
    algorithms: list[Algorithm] | None = None, model: ComposerClassifier | None = None, **kwargs: Any
) -> Trainer:
    model = model or classifier(1)
    defaults: dict[str, Any] = {
        'train_dataloader': data(),
        'max_duration': f'{EPOCHS}ep',
        'optimizers': torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        'loggers': InMemoryLogger(),
        'progress_bar': False,
        'device': 'cpu',
        'seed': 3,
    }
    return Trainer(model=model, algorithms=algorithms, **{**defaults, **kwargs})


def train(algorithms: list[Algorithm] | None = None, **kwargs: Any) -> Trainer:
    """A whole run; the trainer is closed, its state can be looked at."""
    run = trainer(algorithms, **kwargs)
    try:
        run.fit()
    finally:
        run.close()
    return run


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return copy.deepcopy(run.state.get_model_state_dict())


def logged(run: Trainer, name: str) -> dict[int, float]:
    """What was logged under ``name``, by batch."""
    (memory,) = (logger for logger in run.logger.destinations if isinstance(logger, InMemoryLogger))
    return {int(timestamp.batch): float(value) for timestamp, value in memory.data[name]}


def save_everything(folder: Path) -> None:
    """Train every setting in this world of ranks, and keep the weights."""
    for name, algorithms in SETTINGS.items():
        state = weights(train(algorithms()))
        if dist.get_global_rank() == 0:
            torch.save(state, folder / f'{name}.pt')
