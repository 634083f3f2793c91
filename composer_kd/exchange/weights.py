"""Every so many batches, the teams tell each other their weights, and learn from copies of each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from composer.core import Time, TimeUnit
from composer.utils import dist
from torch import Tensor

from composer_kd.channel import Arrival, Channel
from composer_kd.exchange.copies import Copies
from composer_kd.exchange.exchange import peers_in_launch
from composer_kd.exchange.snapshots import Snapshots
from composer_kd.teachers.peer import PeerTeacher
from composer_kd.teachers.teacher import Signal, TeacherError
from composer_kd.teams import Team

if TYPE_CHECKING:
    from composer.core import Batch, State
    from composer.models import ComposerModel

    from composer_kd.algorithms.knowledge_distillation import KnowledgeDistillation


class WeightsExchange:
    """Snapshots of the weights go to all other teams, which ask copies of their own about their own batches.

    The snapshot that a team takes after batch `k * interval` is in use by the others in the `interval` batches after
    batch `(k + 1) * interval`. It has the time of an interval to arrive, while all go on; only a team that is ahead of
    another by more than that waits for it. The time-out of the teams has to be longer than an interval takes. The first
    snapshot, of `k = 1`, makes distillation begin after batch `2 * interval`. Each process sends its own part of a
    snapshot to the process of equal rank.

    A checkpoint holds the snapshots in use and the one that is on its way, so that a resumed run goes on bit for bit.

    Args:
        interval: Batches between two snapshots, as a time string. Default: ``'50ba'``.
        dtype: Of floating point numbers on their way, such as ``'bfloat16'``. Default: None, as they are.
    """

    name = 'weights'
    in_launch = True

    def __init__(self, interval: str | Time = '50ba', dtype: str | None = None):
        self.interval = batches(interval)
        self.dtype = float_dtype(dtype)
        self._team: Team | None = None
        self._channel: Channel | None = None
        self._student: ComposerModel | None = None
        self._copies: Copies | None = None
        self._own: Tensor | None = None  # on its way; rank 0 alone keeps it, for checkpoints. Taken after this batch:
        self._own_batch = 0
        self._arrival: Arrival | None = None
        self._resumed: dict[str, Any] = {}

    def peers(self, team: Team | None) -> Sequence[PeerTeacher]:
        """A teacher for each of the other teams."""
        self._team, self._peers = team, peers_in_launch(team, self.name)
        return self._peers

    def facts(self, state: State, student: ComposerModel) -> dict[str, Any]:
        """See `Exchange`."""
        refuse_shards(state)
        fingerprint = Snapshots(student, self.dtype).fingerprint
        return {'interval of the exchange': f'{self.interval}ba', 'architecture': fingerprint[:12]}

    def start(self, state: State, student: ComposerModel, distillation: KnowledgeDistillation) -> None:
        """See `Exchange`."""
        assert self._team is not None
        if student is self._student:  # a later `fit` goes on
            return
        self._student, self._own, self._arrival = student, None, None
        self._copies = Copies(self._peers, student, state, self.dtype)
        self._channel = self._team.channel(self.name, 'cpu')
        self._channel.gather(torch.zeros(1))  # now, since the first call waits for all teams
        if self._resumed:
            self._copies.load_state_dict(self._resumed['copies'])
            if self._resumed['own'] is not None:
                self._send(self._resumed['own'], self._resumed['own_batch'])
            self._resumed = {}

    def has_come(self) -> bool:
        """See `Exchange`."""
        return self._copies is not None and self._copies.are_complete

    def tell(self, batch: Batch, logits: Signal) -> None:
        """Nothing: the copies are asked about the batch."""

    def batch_end(self, state: State) -> dict[str, float]:
        """At the end of an interval, take in what was sent at the end of the last one, and send.

        Raises:
            PeerLost: A team did not send in time.
        """
        assert self._student is not None and self._copies is not None
        batch, metrics = state.timestamp.batch.value, {}
        if batch % self.interval == 0:
            self._take_in(self._copies)
            metrics['codistillation/bytes'] = self._send(self._copies.snapshots.of_team(self._student), batch)
        if self._copies.are_complete:
            metrics['codistillation/staleness'] = batch - min(self._copies.in_use.values())
        return metrics

    def release(self) -> None:
        """See `Exchange`."""
        self._own = self._arrival = self._copies = None
        if self._channel is not None:
            self._channel.close()

    def state_dict(self) -> dict[str, Any]:
        """The own snapshot that is on its way, and those of the others that are in use."""
        if self._copies is None:
            return self._resumed
        return {'copies': self._copies.state_dict(), 'own': self._own, 'own_batch': self._own_batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Exchange`."""
        self._resumed = state

    def _send(self, own: Tensor, batch: int) -> int:
        """Send this rank's part of the own snapshot, which was taken after a batch; how large it is."""
        assert self._channel is not None
        ranks, rank = dist.get_world_size(), dist.get_global_rank()
        padded = F.pad(own, (0, -len(own) % ranks))
        if rank == 0:
            padded = padded.cpu()
            self._own = padded[: len(own)]
        self._own_batch = batch
        part = padded.chunk(ranks)[rank].cpu()
        self._arrival = self._channel.post(part)
        return part.nbytes

    def _take_in(self, copies: Copies) -> None:
        """Put the snapshots that were sent last into use, once they have arrived."""
        if self._arrival is None:
            return
        assert self._student is not None
        device = next(self._student.parameters()).device
        parts, self._arrival = self._arrival.wait(), None
        for peer in self._peers:
            part = parts[peer.team].to(device)
            whole = part if dist.get_world_size() == 1 else torch.cat([*dist.all_gather(part)])
            copies.put(peer.team, whole[: copies.snapshots.bytes], self._own_batch)


def batches(interval: str | Time) -> int:
    """How many batches an interval has.

    Raises:
        ValueError: It is no number of batches.
    """
    try:
        time = Time.from_input(interval)
    except (ValueError, TypeError, RuntimeError):
        time = None
    if time is None or time.unit != TimeUnit.BATCH or time.value < 1:
        raise ValueError(f"interval must be a number of batches, such as '50ba', not {interval!r}")
    return time.value


def float_dtype(name: str | None) -> torch.dtype | None:
    """The floating point dtype of a name.

    Raises:
        ValueError: There is none.
    """
    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must name a floating point dtype of torch, such as 'bfloat16', not {name!r}")
    return dtype


def refuse_shards(state: State) -> None:
    """Raise TeacherError if no rank has all of the weights."""
    if state.fsdp_config is not None:
        raise TeacherError(
            'weights that are sharded (FSDP) cannot be exchanged: exchange predictions, or train with DDP'
        )
