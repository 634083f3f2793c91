"""A model of another team, which learns at the same time, as a teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from composer_kd.teachers.teacher import Signal, TeacherError

if TYPE_CHECKING:
    import torch
    from composer.core import Batch, State
    from composer.models import ComposerModel
    from torch import nn


class PeerTeacher:
    """What an exchange between teams has of one of them.

    Args:
        team: Index of that team.
        exchange: Name of the exchange.

    Attributes:
        answer: Gives the logits for a microbatch; set by the exchange.
        copy: The network that does, if one does; set by the exchange. Its weights change, so that no pool may move it.
        forwards: Passes through that network since the teacher was made.
    """

    replays = False

    def __init__(self, team: int, exchange: str):
        self.name = f'team{team}'
        self.team = team
        self.forwards = 0
        self.answer: Callable[[Batch], Signal] | None = None
        self.copy: nn.Module | None = None
        self._exchange = exchange

    def check(self, student: ComposerModel) -> None:
        """Nothing is known of it before the teams meet."""

    def prepare(self, state: State) -> None:
        """The exchange sees to it."""

    def signal(self, batch: Batch, keys: torch.Tensor | None = None) -> Signal:
        """What the exchange has."""
        if self.answer is None:
            raise TeacherError(f'{self.name} was asked before the teams met, or after release()')
        self.forwards += self.copy is not None
        return self.answer(batch)

    def release(self) -> None:
        """Forget it."""
        self.answer = self.copy = None

    def manifest(self) -> dict[str, Any]:
        """Which team it is: its weights are those of no file."""
        identity = f'{self._exchange} {self.name}'
        return {'name': self.name, 'exchange': self._exchange, 'sha256': hashlib.sha256(identity.encode()).hexdigest()}
