"""One launch, several Composer worlds: teams of processes, each with its own DDP, samplers, metrics and checkpoints."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed
from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from composer_kd.channel import KEEPER, Channel, absent, peer_lost, seconds_for_notes


@dataclass(frozen=True)
class Place:
    """Where a process stands, as Composer's launcher tells it.

    Args:
        rank: Of the process, from 0 to `world_size - 1`.
        world_size: How many there are.
        local_rank: Of the process on its node.
        local_world_size: How many there are on its node.
        node_rank: Of its node.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        """From environment variables; without any, it is that of the only process."""
        rank, local_rank = (int(environment.get(name, 0)) for name in ('RANK', 'LOCAL_RANK'))
        world_size, local_world_size = (int(environment.get(name, 1)) for name in ('WORLD_SIZE', 'LOCAL_WORLD_SIZE'))
        node_rank = environment.get('NODE_RANK', rank // local_world_size)  # not every launcher says
        return cls(rank, world_size, local_rank, local_world_size, int(node_rank))

    def variables(self) -> dict[str, str]:
        """The environment variables that say so."""
        names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'NODE_RANK')
        values = (self.rank, self.world_size, self.local_rank, self.local_world_size, self.node_rank)
        return {name: str(value) for name, value in zip(names, values, strict=True)}


@dataclass(frozen=True)
class Team:
    """The team that this process is in. Made by `split`.

    Args:
        index: Of the team, from 0.
        sizes: How many processes are in each team.
        rank: Of this process in its team.
        processes_here: How many processes of all teams are on this machine.
        store: What all processes of the launch meet at. Process 0 keeps it for as long as that lives.
        timeout: Seconds, after which whoever waits for another team gives up.
    """

    index: int
    sizes: tuple[int, ...]
    rank: int
    processes_here: int
    store: Store
    timeout: float
    _channels: Counter[str] = field(default_factory=Counter)

    @property
    def number(self) -> int:
        """How many teams there are."""
        return len(self.sizes)

    @property
    def size(self) -> int:
        """How many processes are in this team."""
        return self.sizes[self.index]

    @property
    def launch_rank(self) -> int:
        """The rank of this process in the launch."""
        return sum(self.sizes[: self.index]) + self.rank

    def channel(self, name: str, device: str | torch.device) -> Channel:
        """A channel to the processes of equal rank in the other teams, all of which have to have one.

        Args:
            name: What errors call it. All teams make the same channels, and those of one name in the same order.
            device: The device of the tensors that are sent, in all teams a device of the same kind.
        """
        self._channels[name] += 1
        number = self._channels[name]
        return Channel(
            name if number == 1 else f'{name} {number}',
            PrefixStore('channels', self.store),
            team=self.index,
            teams=self.number,
            rank=self.rank,
            device=device,
            timeout=self.timeout,
        )


_team: Team | None = None
_met: Store | None = None


def split(teams: int | Sequence[int], *, timeout: float = 300.0) -> Team:
    """Split the processes of this launch into teams, each of which becomes a Composer world of its own.

    To be called by all processes before a Trainer is made, and before anything asks for CUDA. The first so many ranks
    are team 0, the next so many team 1, and so on. What Composer's launcher has put into the environment (`RANK`,
    `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `NODE_RANK`, `MASTER_ADDR`, `MASTER_PORT`) is rewritten, so that
    Composer knows nothing of other teams.

    Local ranks are counted anew within a team, because Composer lets local rank 0 go first (it downloads for the others
    and clears up behind them) and takes it for the device. So that each process keeps its own GPU, it sees from now on
    only those of its team-mates (`CUDA_VISIBLE_DEVICES`). With fewer GPUs than processes on a machine it sees all of
    them, and teams share them.

    Teams that are larger than a node are made of whole nodes; a team whose first process is on another node than
    process 0 meets at the address from which that one reaches process 0.

    Args:
        teams: How many, all of one size; or the size of each. With one team, nothing is changed.
        timeout: Seconds, after which whoever waits for another team, now or later, gives up. Default: 300.

    Returns:
        The team of this process.

    Raises:
        ValueError: The processes cannot be so many teams, were split already, are joined already, or use CUDA already;
            or no launcher has said where they meet, or they cannot meet there.
        PeerLost: Others did not come.
    """
    global _team
    if _team is not None:
        raise ValueError('this launch is split into teams already; split it once')
    place = Place.of(os.environ)
    sizes = sizes_of(place, teams)
    own = within(place, sizes)
    if torch.distributed.is_initialized():
        todo = 'split before a Trainer is made, and before composer.utils.dist.initialize_dist'
        raise ValueError(f'torch.distributed is initialized already; {todo}')
    if len(sizes) == 1:
        _team = undivided(timeout)
        return _team
    _keep_own_devices(place, own)
    store = meet(timeout)
    os.environ.update(own.variables() | _meeting_point(store, place, sizes, timeout))
    index, _ = _team_of(place.rank, sizes)
    _team = Team(index, sizes, own.rank, place.local_world_size, store, timeout)
    return _team


def undivided(timeout: float) -> Team:
    """The one team of a launch that is not split.

    Args:
        timeout: Seconds, after which whoever waits for another team would give up.
    """
    place = Place.of(os.environ)
    return Team(0, (place.world_size,), place.rank, place.local_world_size, HashStore(), timeout)


def meet(timeout: float) -> Store:
    """What all processes of this launch meet at, before it is split: where one can say what the others are to know.

    Args:
        timeout: Seconds, after which whoever waits there gives up.

    Raises:
        ValueError: No launcher has said where they meet, or they cannot meet there.
        PeerLost: The process that keeps it did not come.
    """
    global _met
    if _met is None:
        _met = _launch_store(Place.of(os.environ), timeout)
    return _met


def current() -> Team | None:
    """The team of this process; None if its launch is not split."""
    return _team


def sizes_of(place: Place, teams: int | Sequence[int]) -> tuple[int, ...]:
    """How many processes are in each team.

    Args:
        place: Where a process stands in the launch.
        teams: How many teams there are, all of one size; or the size of each.

    Raises:
        ValueError: The processes cannot be these teams.
    """
    world, here = place.world_size, place.local_world_size
    processes = f'{world} process{"es" if world > 1 else ""}{f" on nodes of {here}" if world > here else ""}'
    rule = 'each a part of a node or whole nodes'
    if isinstance(teams, int):
        equal = {number: (world // number,) * number for number in range(1, world + 1) if world % number == 0}
        fitting = {number: sizes for number, sizes in equal.items() if _fits(place, sizes)}
        if teams in fitting:
            return fitting[teams]
        todo = 'give another number of teams, or of processes (composer -n)'
        known = ' or '.join(map(str, fitting))
        raise ValueError(f'{processes} cannot be {teams} teams, but {known}: teams are of one size, {rule}; {todo}')
    if all(size > 0 for size in teams) and sum(teams) == world and _fits(place, teams):
        return (*teams,)
    todo = 'give other sizes, or another number of processes (composer -n)'
    raise ValueError(f'{processes} cannot be teams of {", ".join(map(str, teams))}: teams are {rule}; {todo}')


def within(place: Place, sizes: Sequence[int]) -> Place:
    """Where a process stands within its team.

    Args:
        place: Where it stands in the launch.
        sizes: Of the teams, as `sizes_of` has them.
    """
    here, (index, rank) = place.local_world_size, _team_of(place.rank, sizes)
    size = sizes[index]
    if size <= here:
        return Place(rank, size, rank, size, 0)
    return Place(rank, size, place.local_rank, here, (rank - place.local_rank) // here)


def own_devices(devices: Sequence[str], place: Place, own: Place) -> Sequence[str]:
    """Of the devices of a node, those of a process and its team-mates there.

    Args:
        devices: One for each process of the node.
        place: Where the process stands in the launch.
        own: Where it stands within its team.
    """
    first = place.local_rank - own.local_rank
    return devices[first : first + own.local_world_size]


def _team_of(rank: int, sizes: Sequence[int]) -> tuple[int, int]:
    """The team of a process of the launch, and its rank there."""
    index = next(index for index in range(len(sizes)) if rank < sum(sizes[: index + 1]))
    return index, rank - sum(sizes[:index])


def _fits(place: Place, sizes: Sequence[int]) -> bool:
    """Whether each team that has a process on this node is a part of it, or made of whole nodes, this one too."""
    here, first = place.local_world_size, place.rank - place.local_rank
    ends = [*itertools.accumulate(sizes, initial=0)]
    on_node = [(begin, end) for begin, end in itertools.pairwise(ends) if begin < first + here and first < end]
    return len(sizes) == 1 or all(
        (first <= begin and end <= first + here) or ((first - begin) % here == 0 and (end - begin) % here == 0)
        for begin, end in on_node
    )


def _keep_own_devices(place: Place, own: Place) -> None:
    """Let CUDA know only the GPUs of this team's processes, if there is one for each process of this node."""
    count = torch.cuda.device_count()  # which asks the driver's library, not CUDA
    if own.local_world_size == place.local_world_size or count < place.local_world_size:
        return
    visible = [name for name in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if name.strip()]
    devices = own_devices(visible[:count] if visible else [*map(str, range(count))], place, own)
    os.environ['CUDA_VISIBLE_DEVICES'] = ','.join(devices)
    if torch._C._cuda_getDeviceCount() != len(devices):
        todo = 'split before anything asks for it, torch.cuda.is_available() too'
        raise ValueError(f'CUDA is in use already, and would not keep to the GPUs of this team; {todo}')


def _launch_store(place: Place, timeout: float) -> Store:
    """What all processes of the launch meet at: where Composer would have met, which it now does elsewhere."""
    is_kept = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'  # by torchrun
    for name in ('MASTER_ADDR', 'MASTER_PORT'):
        if name not in os.environ:
            raise ValueError(f'{name} is not set: start the processes by a launcher, such as composer -n')
    address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    try:
        store = TCPStore(
            address,
            port,
            is_master=place.rank == 0 and not is_kept,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,  # a launch that is not split after all meets here once more, as Composer's world
        )
    except RuntimeError as error:
        if place.rank == 0:
            raise ValueError(f'the processes cannot meet at {address}:{port}: {error}') from error
        raise peer_lost('splitting into teams', [KEEPER], timeout) from error
    return PrefixStore(f'composer_kd/{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)


def _meeting_point(store: Store, place: Place, sizes: Sequence[int], timeout: float) -> dict[str, str]:
    """Where this process's team is to meet: at its first process, which names a free port."""
    rank = _team_of(place.rank, sizes)[1]
    everyone = {f'meeting/{each}': 'team {} rank {}'.format(*_team_of(each, sizes)) for each in range(place.world_size)}
    with socket.socket() as port:  # held until all have one, so that no two leaders of a machine are given the same
        port.bind(('', 0))
        try:
            said = f'{_own_address(place, timeout)}:{port.getsockname()[1]}' if rank == 0 else ''
            store.set(f'meeting/{place.rank}', said)
            missing = absent(store, everyone, timeout - seconds_for_notes(timeout))
            leader = '' if missing else store.get(f'meeting/{place.rank - rank}').decode()
        except (RuntimeError, OSError) as error:
            raise peer_lost('splitting into teams', [KEEPER]) from error
        if missing:
            if place.rank == 0:  # whose end is that of the store, in which the others look who is missing
                time.sleep(seconds_for_notes(timeout))
            raise peer_lost('splitting into teams', missing, timeout)
    address, _, number = leader.rpartition(':')
    return {'MASTER_ADDR': address, 'MASTER_PORT': number, 'TORCHELASTIC_USE_AGENT_STORE': 'False'}


def _own_address(place: Place, timeout: float) -> str:
    """The address of this process for others of the launch."""
    address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    if place.rank == place.local_rank:  # on the node of process 0
        return address
    with socket.create_connection((address, port), timeout) as connection:
        return connection.getsockname()[0]
