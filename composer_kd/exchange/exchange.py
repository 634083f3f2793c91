"""What an exchange between teams is: the protocol that all share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from composer_kd.teachers.peer import PeerTeacher
from composer_kd.teachers.teacher import Signal
from composer_kd.teams import Team

if TYPE_CHECKING:
    from composer.core import Batch, State
    from composer.models import ComposerModel

    from composer_kd.algorithms.knowledge_distillation import KnowledgeDistillation


class Exchange(Protocol):
    """How the models of other teams become teachers. Made before there is a Trainer; joins nobody before `start`."""

    @property
    def name(self) -> str:
        """What recipes and errors call it."""
        ...

    @property
    def in_launch(self) -> bool:
        """Whether the other teams are those of this launch, who can be asked before training."""
        ...

    def peers(self, team: Team | None) -> Sequence[PeerTeacher]:
        """A teacher for each of the other teams.

        Args:
            team: That of this process, if its launch is split.

        Raises:
            ValueError: There are no other teams.
        """
        ...

    def facts(self, state: State, student: ComposerModel) -> dict[str, Any]:
        """What all teams must have alike, beside what `Codistillation` compares: plain values under people's names.

        Raises:
            TeacherError: The run cannot take part.
        """
        ...

    def start(self, state: State, student: ComposerModel, distillation: KnowledgeDistillation) -> None:
        """Get ready for the batches to come; the teams have met."""
        ...

    def has_come(self) -> bool:
        """Whether there is something of all peers to learn from."""
        ...

    def tell(self, batch: Batch, logits: Signal) -> None:
        """Take what the student says of a microbatch in which peers are asked, before these are."""
        ...

    def batch_end(self, state: State) -> dict[str, float]:
        """Do what is due at the end of a batch, by `state.timestamp`, which has counted it; what is to be logged."""
        ...

    def release(self) -> None:
        """Forget all: distillation is over for good, in all teams."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What goes on from a checkpoint."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; `start` comes later."""
        ...


def peers_in_launch(team: Team | None, exchange: str) -> list[PeerTeacher]:
    """A teacher for each of the other teams of a launch.

    Raises:
        ValueError: There are none.
    """
    if team is None or team.number == 1:
        raise ValueError(
            'codistillation needs two teams or more: give a recipe `teams: 2`, or call composer_kd.teams.split(2) '
            'before the Trainer is made'
        )
    return [PeerTeacher(index, exchange) for index in range(team.number) if index != team.index]
