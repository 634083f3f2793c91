"""One launch, several Composer worlds: teams of processes, each with its own DDP, samplers, metrics and checkpoints."""

from __future__ import annotations

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
        number: How many teams there are.
        rank: Of this process in its team.
        size: How many processes are in each team.
        processes_here: How many processes of all teams are on this machine.
        store: What all processes of the launch meet at. Process 0 keeps it for as long as that lives.
        timeout: Seconds, after which whoever waits for another team gives up.
    """

    index: int
    number: int
    rank: int
    size: int
    processes_here: int
    store: Store
    timeout: float
    _channels: Counter[str] = field(default_factory=Counter)

    def channel(self, name: str, device: str | torch.device) -> Channel:
        """A channel to the processes of equal rank in the other teams.

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


def split(teams: int, *, timeout: float = 300.0) -> Team:
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
        teams: How many. With 1, nothing is changed.
        timeout: Seconds, after which whoever waits for another team, now or later, gives up. Default: 300.

    Returns:
        The team of this process.

    Raises:
        ValueError: The processes cannot be so many teams, were split already, are joined already, or use CUDA already.
        PeerLost: Others did not come.
    """
    global _team
    if _team is not None:
        raise ValueError('this launch is split into teams already; split it once')
    place = Place.of(os.environ)
    own = within(place, teams)
    if torch.distributed.is_initialized():
        todo = 'split before a Trainer is made, and before composer.utils.dist.initialize_dist'
        raise ValueError(f'torch.distributed is initialized already; {todo}')
    store: Store = HashStore()
    if teams > 1:
        _keep_own_devices(place, own)
        store = _launch_store(place, timeout)
        os.environ.update(own.variables() | _meeting_point(store, place, own, timeout))
    _team = Team(place.rank // own.world_size, teams, own.rank, own.world_size, place.local_world_size, store, timeout)
    return _team


def current() -> Team | None:
    """The team of this process; None if its launch is not split."""
    return _team


def within(place: Place, teams: int) -> Place:
    """Where a process stands within its team.

    Args:
        place: Where it stands in the launch.
        teams: How many teams there are.

    Raises:
        ValueError: The processes cannot be so many teams.
    """
    world, here = place.world_size, place.local_world_size
    if teams == 1:
        return place
    if not _fits(place, teams):
        processes = f'{world} process{"es" if world > 1 else ""}{f" on nodes of {here}" if world > here else ""}'
        fitting = ' or '.join(str(number) for number in range(1, world + 1) if number == 1 or _fits(place, number))
        rule = 'teams are of one size, each a part of a node or whole nodes'
        todo = 'give another number of teams, or of processes (composer -n)'
        raise ValueError(f'{processes} cannot be {teams} teams, but {fitting}: {rule}; {todo}')
    size = world // teams
    if size <= here:
        return Place(place.rank % size, size, place.local_rank % size, size, 0)
    return Place(place.rank % size, size, place.local_rank, here, place.node_rank % (size // here))


def own_devices(devices: Sequence[str], place: Place, own: Place) -> Sequence[str]:
    """Of the devices of a node, those of a process and its team-mates there.

    Args:
        devices: One for each process of the node.
        place: Where the process stands in the launch.
        own: Where it stands within its team.
    """
    first = place.local_rank - own.local_rank
    return devices[first : first + own.local_world_size]


def _fits(place: Place, teams: int) -> bool:
    world, here, first = place.world_size, place.local_world_size, place.rank - place.local_rank
    if teams < 1 or world % teams:
        return False
    size = world // teams
    return (here % size == 0 and first % size == 0) or (size % here == 0 and first % here == 0)


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
    try:
        store = TCPStore(
            os.environ['MASTER_ADDR'],
            int(os.environ['MASTER_PORT']),
            is_master=place.rank == 0 and not is_kept,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        if place.rank == 0:
            raise
        raise peer_lost('splitting into teams', [KEEPER], timeout) from error
    return PrefixStore(f'composer_kd/{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)


def _meeting_point(store: Store, place: Place, own: Place, timeout: float) -> dict[str, str]:
    """Where this process's team is to meet: at its first process, which names a free port."""
    size = own.world_size
    with socket.socket() as port:  # held until all have one, so that no two leaders of a machine are given the same
        port.bind(('', 0))
        said = f'{_own_address(place, timeout)}:{port.getsockname()[1]}' if own.rank == 0 else ''
        store.set(f'meeting/{place.rank}', said)
        everyone = {f'meeting/{rank}': f'team {rank // size} rank {rank % size}' for rank in range(place.world_size)}
        if missing := absent(store, everyone, timeout - seconds_for_notes(timeout)):
            if place.rank == 0:  # whose end is that of the store, in which the others look who is missing
                time.sleep(seconds_for_notes(timeout))
            raise peer_lost('splitting into teams', missing, timeout)
    leader = store.get(f'meeting/{place.rank - own.rank}').decode()
    address, _, number = leader.rpartition(':')
    return {'MASTER_ADDR': address, 'MASTER_PORT': number, 'TORCHELASTIC_USE_AGENT_STORE': 'False'}


def _own_address(place: Place, timeout: float) -> str:
    """The address of this process for others of the launch."""
    address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    if place.rank == place.local_rank:  # on the node of process 0
        return address
    with socket.create_connection((address, port), timeout) as connection:
        return connection.getsockname()[0]
