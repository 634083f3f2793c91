"""Launches that know of each other by a folder alone tell each other their weights through it."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from composer.core import Time
from composer.utils import ObjectStoreTransientError, dist, maybe_create_object_store_from_uri, parse_uri
from torch import Tensor

from composer_kd.checkpoints import CheckpointError, read_checkpoint
from composer_kd.exchange.copies import Copies
from composer_kd.exchange.weights import batches, float_dtype, refuse_shards
from composer_kd.files import remove_unfinished, write
from composer_kd.teachers.peer import PeerTeacher
from composer_kd.teachers.rows import on_all_ranks
from composer_kd.teachers.teacher import Signal, TeacherError
from composer_kd.teams import Team

if TYPE_CHECKING:
    from composer.core import Batch, State
    from composer.models import ComposerModel

    from composer_kd.algorithms.knowledge_distillation import KnowledgeDistillation

_NOT_THERE = -1

# What a file says beside the snapshot.
_KINDS = {'run_name': str, 'seed': int, 'teams': int, 'fingerprint': str, 'batch': int}


class FolderExchange:
    """Snapshots of the weights go into a folder, from which others take the latest that is whole.

    Each team is a launch of its own, on a machine of its own if need be, and there is nothing that one has to wait for:
    reading and writing go on beside the training; what fails is tried again an interval later, and ends the run if it
    fails then, too. A team begins to distill once there is a snapshot of every other one; if one ends, or dies, the
    others go on with its last. What a team learns depends on when others are how far, so that no run is like another
    bit for bit.

    Args:
        path: The folder, or the URI of one in an object store that Composer knows (``'s3://bucket/folder'``).
        team: Index of this team, from 0.
        teams: How many there are.
        interval: Batches between two snapshots, and two looks at those of others. Default: ``'50ba'``.
        dtype: Of floating point numbers in snapshots, such as ``'bfloat16'``. Default: None, as they are.
    """

    name = 'folder'
    in_launch = False

    def __init__(
        self, path: str | Path, team: int, teams: int, interval: str | Time = '50ba', dtype: str | None = None
    ):
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in (team, teams)):
            raise ValueError(f'team and teams must be whole numbers, not {team!r} and {teams!r}')
        if teams < 2 or not 0 <= team < teams:
            raise ValueError(f'there must be two teams or more, numbered from 0, not team {team} of {teams}')
        if not isinstance(path, str | Path) or not str(path):
            raise ValueError(f'path must be a folder, or the URI of one, not {path!r}')
        self.interval = batches(interval)
        self.dtype = float_dtype(dtype)
        self._place = _Place(str(path))
        self._team, self._teams = team, teams
        self._peers = [PeerTeacher(index, self.name) for index in range(teams) if index != team]
        self._student: ComposerModel | None = None
        self._copies: Copies | None = None
        self._run: dict[str, Any] = {}
        self._bytes = 0
        self._resumed: dict[str, Any] = {}
        self._seen: dict[int, tuple[object, str]] = {}
        self._failures: Counter[str] = Counter()
        self._threads: ThreadPoolExecutor | None = None
        self._writing: Future | None = None
        self._reading: Future | None = None

    def peers(self, team: Team | None) -> Sequence[PeerTeacher]:
        """A teacher for each of the other teams.

        Raises:
            ValueError: The launch is split into teams itself.
        """
        if team is not None and team.number > 1:
            raise ValueError('a folder joins launches that are one team each: leave out `teams`, or exchange weights')
        return self._peers

    def facts(self, state: State, student: ComposerModel) -> dict[str, Any]:
        """Nothing: there is nobody to ask."""
        return {}

    def start(self, state: State, student: ComposerModel, distillation: KnowledgeDistillation) -> None:
        """See `Exchange`.

        Raises:
            TeacherError: Another run is this team, or the folder cannot be read.
        """
        if student is self._student:  # a later `fit` goes on
            return
        refuse_shards(state)
        self._student = student
        self._copies = Copies(self._peers, student, state, self.dtype)
        self._run = {'run_name': state.run_name, 'seed': state.rank_zero_seed, 'teams': self._teams}
        self._run['fingerprint'] = self._copies.snapshots.fingerprint
        self._bytes = self._copies.snapshots.bytes
        if self._resumed:
            self._copies.load_state_dict(self._resumed['copies'])
            self._resumed = {}
        on_all_ranks(self._begin)

    def has_come(self) -> bool:
        """See `Exchange`."""
        return self._copies is not None and self._copies.are_complete

    def tell(self, batch: Batch, logits: Signal) -> None:
        """Nothing: the copies are asked about the batch."""

    def batch_end(self, state: State) -> dict[str, float]:
        """At the end of an interval, put what was read since into use, and write.

        Raises:
            TeacherError: What is there is of other networks, or reading or writing has failed twice in a row.
        """
        assert self._student is not None and self._copies is not None
        batch, metrics = state.timestamp.batch.value, {}
        if batch % self.interval == 0:
            self._take_in(self._copies)
            own = self._copies.snapshots.of_team(self._student)
            if dist.get_global_rank() == 0:
                metrics['codistillation/bytes'] = self._write(own.cpu(), batch)
        if self._copies.are_complete:
            metrics['codistillation/staleness'] = batch - min(self._copies.in_use.values())
        return metrics

    def release(self) -> None:
        """See `Exchange`."""
        self._copies = None
        if self._threads is not None:
            self._threads.shutdown(wait=False)

    def state_dict(self) -> dict[str, Any]:
        """The snapshots in use."""
        return self._resumed if self._copies is None else {'copies': self._copies.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Exchange`."""
        self._resumed = state

    def _begin(self) -> None:
        """As rank 0, see whether nobody else is this team, and begin to read."""
        if dist.get_global_rank() > 0:
            return
        own = self._outcome(lambda: self._place.read(self._team), 'read', patience=0)
        if own is not None and any(own[what] != self._run[what] for what in ('run_name', 'seed')):
            raise TeacherError(
                f'{self._place} has a snapshot of team {self._team} by another run, {own["run_name"]} (seed '
                f'{own["seed"]}): exchange through another folder, be another team, or delete what is there'
            )
        self._outcome(lambda: self._place.clear_up(self._team), 'written to', patience=0)
        self._threads = ThreadPoolExecutor(2, 'exchange')
        self._reading = self._threads.submit(self._read)

    def _outcome(self, work: Callable[[], Any], what: str, patience: int = 1) -> Any:
        """What came of reading, or of writing; None if it has failed, but not too often in a row.

        Raises:
            TeacherError: It has failed more often than is borne.
        """
        try:
            outcome = work()
        except TeacherError:
            raise
        except Exception as error:  # whatever an object store of anyone's can raise
            self._failures[what] += 1
            if self._failures[what] > patience:
                raise TeacherError(f'{self._place}: cannot be {what}: {error}') from error
            return None
        self._failures[what] = 0
        return outcome

    def _write(self, snapshot: Tensor, batch: int) -> int:
        """Begin to write a snapshot, if the last one is written; a store that is slow gets fewer of them. Its bytes."""
        if self._writing is not None:
            return 0
        assert self._threads is not None
        self._writing = self._threads.submit(self._place.write, self._team, {**self._run, 'batch': batch}, snapshot)
        return snapshot.nbytes

    def _read(self) -> dict[int, tuple[int, Tensor]]:
        """Snapshots of peers that are new: after which batch they were taken, and what they are."""
        found, seen = {}, {}
        for peer in self._peers:
            stamp = self._place.stamp(peer.team)
            last_stamp, last_sha256 = self._seen.get(peer.team, (None, None))
            if stamp is not None and stamp == last_stamp:
                continue
            said = self._place.read(peer.team)
            if said is None or said['sha256'] == last_sha256:
                continue
            self._check(peer, said)
            seen[peer.team] = stamp, said['sha256']
            found[peer.team] = said['batch'], said['snapshot']
        self._seen |= seen
        return found

    def _check(self, peer: PeerTeacher, said: dict[str, Any]) -> None:
        """Raise TeacherError if what a file holds is of no peer to learn from."""
        who = f'{peer.name} (run {said["run_name"]})'
        if said['teams'] != self._run['teams']:
            raise TeacherError(f'{self._place}: {who} has another number of teams')
        if said['seed'] == self._run['seed']:
            raise TeacherError(f'{who} has the same seed, {said["seed"]}: choose another')
        if (said['fingerprint'], said['snapshot'].nbytes) != (self._run['fingerprint'], self._bytes):
            raise TeacherError(f'{self._place}: {who} has another architecture or dtype')

    def _take_in(self, copies: Copies) -> None:
        """Put what rank 0 has read into use, on all ranks, and let it look again."""
        found: dict[int, tuple[int, Tensor]] = {}

        def look() -> None:
            if self._writing is not None and self._writing.done():
                writing, self._writing = self._writing, None
                self._outcome(writing.result, 'written to')
            if self._threads is not None and self._reading is not None and self._reading.done():
                found.update(self._outcome(self._reading.result, 'read') or {})
                self._reading = self._threads.submit(self._read)

        on_all_ranks(look)
        for peer in self._peers:
            after, snapshot = found.get(peer.team, (_NOT_THERE, None))
            device = next(self._student.parameters()).device  # pyright: ignore[reportOptionalMemberAccess]
            batch = torch.tensor([after], device=device)
            dist.broadcast(batch, src=0)
            if int(batch) == _NOT_THERE:
                continue
            if snapshot is None:
                snapshot = torch.empty(copies.snapshots.bytes, dtype=torch.uint8)
            snapshot = snapshot.to(device)
            dist.broadcast(snapshot, src=0)
            copies.put(peer.team, snapshot, int(batch))


class _Place:
    """A folder, or one in an object store, with a file for each team, which is always whole."""

    def __init__(self, path: str):
        self._path = path
        self._is_remote = bool(parse_uri(path)[0])
        self._store: Any = None

    def __str__(self) -> str:
        return self._path

    def write(self, team: int, about: dict[str, Any], snapshot: Tensor) -> None:
        """Replace the file of a team."""
        buffer = io.BytesIO()
        torch.save({**about, 'snapshot': snapshot, 'sha256': _sha256(about, snapshot)}, buffer)
        if not self._is_remote:
            Path(self._path).mkdir(parents=True, exist_ok=True)
            write(self._file(team), buffer.getbuffer())
            return
        with tempfile.NamedTemporaryFile() as file:
            file.write(buffer.getbuffer())
            file.flush()
            self._object_store().upload_object(self._object(team), file.name)

    def clear_up(self, team: int) -> None:
        """Remove what was left of the file of a team when its process was killed."""
        if not self._is_remote and Path(self._path).is_dir():
            remove_unfinished(Path(self._path), f'team{team}.pt')

    def stamp(self, team: int) -> object:
        """What tells the file of a team from the one before without reading it; None if nothing does."""
        if self._is_remote or not self._file(team).exists():
            return None
        found = self._file(team).stat()
        return found.st_ino, found.st_mtime_ns, found.st_size

    def read(self, team: int) -> dict[str, Any] | None:
        """What is in the file of a team; None if there is none, or none that is whole."""
        if not self._is_remote:
            return _whole(self._file(team))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, 'snapshot.pt')
            try:
                self._object_store().download_object(self._object(team), str(file))
            except (OSError, ObjectStoreTransientError):
                return None  # there is none, or not now
            return _whole(file)

    def _file(self, team: int) -> Path:
        return Path(self._path, f'team{team}.pt')

    def _object(self, team: int) -> str:
        return f'{parse_uri(self._path)[2].rstrip("/")}/team{team}.pt'.lstrip('/')

    def _object_store(self) -> Any:
        if self._store is None:
            try:
                self._store = maybe_create_object_store_from_uri(self._path)
            except (NotImplementedError, ImportError) as error:  # a scheme that Composer has no store for
                raise TeacherError(f'{self._path}: {error}') from error
        return self._store


def _whole(file: Path) -> dict[str, Any] | None:
    """What is in a file, if it is there and whole."""
    try:
        said = read_checkpoint(file)
    except (CheckpointError, OSError):
        return None
    about, snapshot = {name: said.get(name) for name in _KINDS}, said.get('snapshot')
    if not all(isinstance(about[name], kind) for name, kind in _KINDS.items()):
        return None
    if not isinstance(snapshot, Tensor) or snapshot.dtype != torch.uint8 or snapshot.ndim != 1:
        return None
    sha256 = _sha256(about, snapshot)
    return {**about, 'snapshot': snapshot, 'sha256': sha256} if said.get('sha256') == sha256 else None


def _sha256(about: dict[str, Any], snapshot: Tensor) -> str:
    content: Any = snapshot.numpy()
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    digest.update(content)
    return digest.hexdigest()
