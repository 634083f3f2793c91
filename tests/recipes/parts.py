"""Callbacks and models that recipes in these tests name by dotted path."""

import os
import signal
import time
import weakref
from pathlib import Path

import torch
from composer.core import Callback, DataSpec, State
from composer.models import ComposerClassifier

from composer_kd import teams
from composer_kd.models import small_convnet


class Interrupt(Callback):
    """Raises at the end of a batch, once in the life of this process."""

    batch = -1

    def batch_end(self, state: State, logger) -> None:
        if state.timestamp.batch == Interrupt.batch:
            Interrupt.batch = -1
            raise KeyboardInterrupt


class Gate(Callback):
    """Stops at the end of the second batch until there is a file `go`, and says so by a file `stopped`."""

    def batch_end(self, state: State, logger) -> None:
        if state.timestamp.batch == 2:
            Path('stopped').touch()
            while not Path('go').exists():
                time.sleep(0.01)


class KilledOnce(Callback):
    """Kills its process at the end of a batch, if that is in team 1 and there is no file `killed` yet."""

    def batch_end(self, state: State, logger) -> None:
        team = teams.current()
        if team and team.index == 1 and state.timestamp.batch == 12 and not Path('killed').exists():
            Path('killed').touch()
            os.kill(os.getpid(), signal.SIGKILL)


class MeetsUntilOneFails(Callback):
    """The teams meet at the end of each batch, until one raises."""

    def fit_start(self, state: State, logger) -> None:
        team = teams.current()
        assert team
        self.channel, self.index = team.channel('test', 'cpu'), team.index

    def batch_end(self, state: State, logger) -> None:
        if self.index == 1 and state.timestamp.batch == 3:
            raise ZeroDivisionError('team 1 has had enough')
        self.channel.gather(torch.zeros(1))


class RememberState(Callback):
    """Keeps a weak reference to the state of a run."""

    state = None

    def fit_start(self, state: State, logger) -> None:
        RememberState.state = weakref.ref(state)


class LookForState(Callback):
    """Notes whether the state that was remembered is still in memory as another run begins."""

    found = None

    def fit_start(self, state: State, logger) -> None:
        assert RememberState.state is not None
        LookForState.found = RememberState.state() is not None


class InitialWeights(Callback):
    """Keeps what the student's weights were before its first batch."""

    weights: list[dict[str, torch.Tensor]] = []

    def fit_start(self, state: State, logger) -> None:
        InitialWeights.weights.append({k: v.clone() for k, v in state.model.state_dict().items()})


def says_nan(num_classes: int = 10) -> ComposerClassifier:
    class Nan(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((1,), torch.nan))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.weight.expand(len(images), num_classes)

    return ComposerClassifier(Nan(), num_classes=num_classes)


def hides_its_classes(num_classes: int) -> ComposerClassifier:
    """A teacher that fits any student until it is asked."""
    model = small_convnet(num_classes, width=2)
    model.num_classes = None
    return model


def bare_network() -> torch.nn.Module:
    return torch.nn.Linear(1, 1)


def without_keys() -> DataSpec:
    """Training data of a loader that does not say which samples are in a batch."""
    return DataSpec(torch.utils.data.DataLoader([(torch.zeros(1, 8, 8), 0)] * 4, batch_size=2))
