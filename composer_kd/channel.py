"""What the teams of a launch say to each other: tensors by process groups of their own, small values by a store."""

from __future__ import annotations

import atexit
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import PrefixStore, Store

KEEPER = 'team 0 rank 0'  # keeps the store of the launch

_SECONDS_UNTIL_NOTE = 1.0  # of waiting, after which a process writes down where it is
_SECONDS_FOR_NOTES = 2.0  # of looking who has written that, once a call has failed
_SECONDS_FOR_THREADS = 0.1


class PeerLost(RuntimeError):
    """Others did not come to where all teams meet, or are gone; one line says who, where, and what to do."""


def absent(store: Store, expected: Mapping[str, str], seconds: float) -> list[str]:
    """Wait until others have written something.

    Args:
        store: Where they write.
        expected: Keys, and who writes each.
        seconds: How long to wait.

    Returns:
        Who has not. If the store itself is gone, that is the process that kept it.
    """
    has: Any = store  # torch's stubs do not know all of its methods
    end = time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        try:
            # A second at a time, between which Python heeds signals, such as that of a launcher which ends the others.
            store.wait([*expected], timedelta(seconds=max(0.01, min(1.0, left))))
            return []
        except RuntimeError:
            try:
                missing = [who for key, who in expected.items() if not has.check([key])]
            except RuntimeError:
                return [KEEPER]
            if left <= 1.0:
                return missing


def seconds_for_notes(timeout: float) -> float:
    """How long, at the end of a time-out, to look who is missing."""
    return min(_SECONDS_FOR_NOTES, timeout / 8)


def peer_lost(where: str, who: Sequence[str], seconds: float | None = None) -> PeerLost:
    """The error for processes that did not come within some seconds, or, without these, whose connection is lost."""
    if seconds is None:
        what = 'is gone' if len(who) == 1 else 'are gone'
        todo = 'look for what went wrong there first'
    else:
        what = f'did not come within {seconds:g} s'
        todo = 'look for what went wrong there first; if nothing did, allow more time'
    return PeerLost(f'{where}: {", ".join(who)} {what}; {todo}')


class Channel:
    """Joins the processes of equal rank of all teams. Made by `Team.channel`, with the same arguments in all teams.

    All teams make the same calls in the same order. Nothing but the tensors themselves is sent for a call that takes
    less than a second, so they are to have the same shape and dtype in all teams, about which `agree` can be asked
    before. The first call waits until all teams have come to it.

    Tensors travel as bytes, whatever their dtype: by NCCL if the channel is for a CUDA device; by Gloo otherwise, and
    between teams that share a GPU, which NCCL does not join. Gloo has tensors of a GPU copied to the host and
    back. What is posted there and waited for much later, such as weights, leaves the GPU alone meanwhile, while NCCL
    would keep a part of it busy until the last team has posted.

    Args:
        name: Its name, of which errors speak.
        store: What the processes meet at.
        team: The index of this process's team.
        teams: How many there are.
        rank: Of this process in its team.
        device: The device of the tensors that are sent.
        timeout: Seconds, after which a call of which a team does not come raises PeerLost.
    """

    def __init__(
        self, name: str, store: Store, *, team: int, teams: int, rank: int, device: str | torch.device, timeout: float
    ):
        self.name = name
        self._store = PrefixStore(f'{name}/{rank}', store)
        self._team, self._rank = team, rank
        self._who = [f'team {index} rank {rank}' for index in range(teams)]
        self._device, self._timeout = torch.device(device), timeout
        self._is_keeper = team == rank == 0
        self._seconds_until_note = min(_SECONDS_UNTIL_NOTE, timeout / 16)
        self._seconds_for_notes = seconds_for_notes(timeout)
        self._patience = timeout - 2 * self._seconds_for_notes
        self._group: Any = None
        self._is_nccl = self._is_lost = self._is_closed = False
        self._calls = 0
        self._pending: list[Arrival] = []
        self._topics: set[str] = set()
        atexit.register(self.close)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all teams, by team, on the device of this one. Blocks until they are here.

        Raises:
            PeerLost: A team did not come within the time-out, or the connection to it is lost.
        """
        return self.post(tensor).wait()

    def post(self, tensor: Tensor) -> Arrival:
        """Send a tensor, and go on; it must not change until it has arrived.

        Returns:
            Where the tensors of all teams arrive.

        Raises:
            ValueError: The channel is closed.
            PeerLost: At the first call, as `gather`.
        """
        if self._is_closed:
            raise ValueError(f'the channel {self.name!r} is closed')
        sent = tensor.detach().contiguous()
        if len(self._who) == 1:
            return Arrival(self, 0, None, sent, [sent.clone()], tensor.device)
        group = self._joined()
        if not self._is_nccl:
            sent = sent.cpu()
        self._calls += 1
        self._pending = [arrival for arrival in self._pending if not arrival.done()]
        received = [torch.empty_like(sent) for _ in self._who]
        begin = time.monotonic()
        try:
            work = group.allgather([[_bytes(one) for one in received]], [_bytes(sent)])
        except RuntimeError as error:
            raise self._lost(self._calls, begin) from error
        arrival = Arrival(self, self._calls, work, sent, received, tensor.device)
        self._pending.append(arrival)
        return arrival

    def agree(self, topic: str, value: Any) -> list[Any]:
        """What all teams say about a topic, by team. For checks before training, since it goes through the store.

        Args:
            topic: What it is about; each topic once.
            value: A small value that JSON can hold; it comes back as JSON has it.

        Raises:
            ValueError: The topic was there already.
            PeerLost: As `gather`.
        """
        if topic in self._topics:
            raise ValueError(f'the channel {self.name!r} has had the topic {topic!r} already; choose another one')
        self._topics.add(topic)
        return [json.loads(said) for said in self._say(f'agree/{topic}', json.dumps(value), f'topic {topic!r}')]

    def close(self) -> None:
        """Leave, once what was posted has gone out; happens by itself when Python ends."""
        atexit.unregister(self.close)
        for arrival in [] if self._is_lost else self._pending:
            with suppress(PeerLost):
                arrival.wait()
        self._pending, self._is_closed = [], True
        if self._group is not None:
            # A thread of the group may be about to free tensors, for which it needs Python's lock; the group keeps that
            # while it waits for its threads to end. So they get it now.
            time.sleep(_SECONDS_FOR_THREADS)
            if self._is_nccl:
                leave = self._group.abort if self._is_lost else self._group.shutdown
                leave()
            self._group = None

    def _joined(self) -> Any:
        """The group; before the first call it waits for the other teams, and makes it."""
        if self._group is not None:
            return self._group
        is_cuda = self._device.type == 'cuda'
        own = str(torch.cuda.get_device_properties(self._device).uuid) if is_cuda else ''
        devices = self._say('here', own, 'the first call')
        meeting, teams = PrefixStore('group', self._store), len(self._who)
        self._is_nccl = is_cuda and len({*devices}) == teams
        begin = time.monotonic()
        try:
            if self._is_nccl:
                options = torch.distributed.ProcessGroupNCCL.Options()
                options._timeout = timedelta(seconds=2 * self._timeout + 60)  # then it would end the process: after us
                self._group = torch.distributed.ProcessGroupNCCL(meeting, self._team, teams, options)
            else:
                patience = timedelta(seconds=self._patience)
                self._group = torch.distributed.ProcessGroupGloo(meeting, self._team, teams, patience)
        except RuntimeError as error:
            raise self._lost(0, begin) from error
        return self._group

    def _say(self, key: str, value: str, where: str) -> list[str]:
        """Write something into the store, and read what all teams have written there."""
        where, begin = f'channel {self.name!r}, {where}', time.monotonic()
        keys = {f'{key}/{team}': who for team, who in enumerate(self._who)}
        try:
            self._store.set(f'{key}/{self._team}', value)
            missing = absent(self._store, keys, self._patience)
            said = [] if missing else [self._store.get(key).decode() for key in keys]
        except RuntimeError as error:
            raise peer_lost(where, [KEEPER]) from error
        if missing:
            is_late = _is_over(self._patience, begin)
            self._keep_store()
            raise peer_lost(where, missing, self._timeout if is_late else None)
        return said

    def _await(self, work: Any, call: int, begin: float) -> None:
        """Wait until a call is done."""
        try:
            if not self._is_done(work, self._seconds_until_note):
                self._note(call)
                if not self._is_done(work, begin + self._patience - time.monotonic()):
                    raise self._lost(call, begin)
            work.wait()  # raises what went wrong; on a GPU, the streams that use what came wait for it
        except PeerLost:
            raise
        except RuntimeError as error:
            raise self._lost(call, begin) from error

    def _is_done(self, work: Any, seconds: float) -> bool:
        """Whether a call comes to its end, good or bad, within some seconds."""
        if self._is_nccl:  # whose own wait does not block, or ends the process
            end = time.monotonic() + seconds
            while not work.is_completed() and time.monotonic() < end:
                time.sleep(0)
            return work.is_completed()
        while seconds > 0 and not work.is_completed():
            with suppress(RuntimeError):
                work.wait(timedelta(seconds=min(seconds, _SECONDS_UNTIL_NOTE)))  # between which Python heeds signals
            seconds -= _SECONDS_UNTIL_NOTE
        return work.is_completed()

    def _note(self, call: int) -> None:
        """Write down that this process is at a call, for others to whom this call is lost."""
        with suppress(RuntimeError):  # the store may be gone, its process being done: no reason for this call to fail
            self._store.set(f'at/{call}/{self._team}', '')

    def _keep_store(self) -> None:
        """Let the others look who is missing, too, before the store may end with this process."""
        if self._is_keeper:
            time.sleep(self._seconds_for_notes)

    def _lost(self, call: int, begin: float) -> PeerLost:
        """The error for a call that failed: whoever is alive and at it notes so within a second."""
        is_late = _is_over(self._patience, begin)
        self._is_lost = True
        self._note(call)
        others = {f'at/{call}/{team}': who for team, who in enumerate(self._who) if team != self._team}
        missing = absent(self._store, others, self._seconds_for_notes)
        self._keep_store()
        where = f'channel {self.name!r}, call {call}'
        if not missing:
            todo = 'look for what went wrong there first'
            return PeerLost(f'{where}: {", ".join(others.values())} came, but the connection broke; {todo}')
        return peer_lost(where, missing, self._timeout if is_late else None)


class Arrival:
    """A tensor that was posted, and those of the other teams, which are on their way. Made by `Channel.post`."""

    def __init__(
        self, channel: Channel, call: int, work: Any, sent: Tensor, received: list[Tensor], device: torch.device
    ):
        self._channel, self._call, self._work = channel, call, work
        self._sent: Tensor | None = sent
        self._received, self._device = received, device
        self._begin = time.monotonic()

    def done(self) -> bool:
        """Whether `wait` would return, or raise, without waiting for other teams."""
        is_late = time.monotonic() - self._begin > self._channel._patience
        return self._work is None or is_late or self._work.is_completed()

    def wait(self) -> list[Tensor]:
        """The tensors of all teams, by team, on the device of the one that was sent.

        Raises:
            PeerLost: A team did not come within the time-out, counted from `post`, or the connection to it is lost.
        """
        if self._work is not None:
            self._channel._await(self._work, self._call, self._begin)
            self._work = None
            self._received = [one.to(self._device) for one in self._received]
        self._sent = None
        return self._received


def _is_over(seconds: float, begin: float) -> bool:
    """Whether a time-out is what ended a call, which other clocks than ours have watched, too."""
    return time.monotonic() - begin > 0.9 * seconds


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor: Gloo does not know all dtypes, but bytes."""
    return tensor.view(-1).view(torch.uint8)
