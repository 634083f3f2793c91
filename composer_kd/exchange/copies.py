"""Copies of a student that have the weights of its peers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from composer_kd.exchange.snapshots import Snapshots
from composer_kd.teachers.network import NetworkTeacher
from composer_kd.teachers.peer import PeerTeacher
from composer_kd.teachers.teacher import TeacherError

if TYPE_CHECKING:
    from composer.core import State
    from composer.models import ComposerModel


class Copies:
    """A copy of the student for each peer, which answers for it.

    Args:
        peers: The peers.
        student: The student, from which the copies are made.
        state: Of its run, on whose device and in whose precision the copies answer.
        dtype: Of floating point numbers in a snapshot. Default: None, their own.

    Attributes:
        snapshots: Takes those of the student.
        in_use: For each team whose weights its copy has, the batch after which these were taken.
    """

    def __init__(self, peers: Sequence[PeerTeacher], student: ComposerModel, state: State, dtype: torch.dtype | None):
        self.snapshots = Snapshots(student, dtype)
        self.in_use: dict[int, int] = {}
        self._device = next(student.parameters()).device
        self._networks = {}
        for peer in peers:
            network = copy.deepcopy(student)
            vars(network).pop('forward', None)  # a compiled one would be that of the student
            teacher = NetworkTeacher(network, name=peer.name)
            teacher.prepare(state)
            peer.copy, peer.answer = network, teacher.signal
            self._networks[peer.team] = network

    @property
    def are_complete(self) -> bool:
        """Whether each has weights of its peer."""
        return self.in_use.keys() == self._networks.keys()

    def put(self, team: int, snapshot: Tensor, batch: int) -> None:
        """Give the copy of a team the weights of a snapshot that was taken after a batch."""
        self.snapshots.put(snapshot.to(self._device), self._networks[team])
        self.in_use[team] = batch

    def state_dict(self) -> dict[str, Any]:
        """What the copies have."""
        of_teams = {str(team): self.snapshots.of(self._networks[team]).cpu() for team in self.in_use}
        in_use = {str(team): batch for team, batch in self.in_use.items()}
        return {'fingerprint': self.snapshots.fingerprint, 'in_use': in_use, 'snapshots': of_teams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the copies what they had.

        Raises:
            TeacherError: They were of another architecture.
        """
        if state['fingerprint'] != self.snapshots.fingerprint:
            raise TeacherError('the run to be resumed had another architecture, or its exchange another dtype')
        for team, snapshot in state['snapshots'].items():
            self.put(int(team), snapshot, state['in_use'][team])
