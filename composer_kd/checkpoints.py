"""Read a checkpoint that nobody has to trust."""

from __future__ import annotations

import contextlib
import datetime
import glob
import hashlib
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from composer_kd.files import unfinished

# Beside tensors, a Composer checkpoint holds random states (NumPy arrays), a clock and a version: plain values all.
_PLAIN_VALUES = [
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    np.array(0).__reduce__()[0],
    datetime.timedelta,
    type(torch.__version__),
]

_LATEST = 'latest'  # what one may write behind the folder of a run
_LATEST_CHECKPOINT = 'latest-rank0.pt'
_SAVED = re.compile(r'ep\d+-ba(\d+)-rank0\.pt')  # as Composer names them, unless it is told otherwise


class CheckpointError(RuntimeError):
    """A file of weights that cannot be used."""


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def find_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint that a path means; None if there is none.

    Args:
        path: The file itself; the folder of a run, or `latest` in it; or a folder of Composer checkpoints. A folder
            means the latest one in it.
    """
    path = Path(path)
    if path.name == _LATEST and path.parent.is_dir() and not path.exists():
        path = path.parent
    places = path, path / 'checkpoints' / _LATEST_CHECKPOINT, path / _LATEST_CHECKPOINT
    return next((place.resolve() for place in places if place.is_file()), None)


def kept_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run by their batches, from the first to the latest; none if they have other names.

    If nothing is called the latest, which is so for a moment whenever Composer has saved one, it is the last whole one.

    Args:
        folder: Where it saves them.
    """
    latest = folder / _LATEST_CHECKPOINT
    found = {int(match[1]): path for path in folder.glob('ep*') if (match := _SAVED.fullmatch(path.name))}
    if latest.exists():
        end = _SAVED.fullmatch(latest.resolve().name)
        last = int(end[1]) if end else -1
    else:
        last = max((batch for batch, path in found.items() if zipfile.is_zipfile(path)), default=-1)
    return {batch: found[batch] for batch in sorted(found) if batch <= last}


def link_latest(folder: Path) -> None:
    """Call the latest checkpoint of a run so again, if Composer was killed when nothing was called so."""
    kept = kept_checkpoints(folder)
    if kept and not (folder / _LATEST_CHECKPOINT).exists():
        go_back(folder, max(kept))


def go_back(folder: Path, batch: int) -> None:
    """Make the checkpoint of a batch the latest one of a run, that of batch 0 being none; later ones are removed."""
    kept, latest = kept_checkpoints(folder), folder / _LATEST_CHECKPOINT
    if batch:
        link = unfinished(latest)
        link.symlink_to(kept[batch].name)
        link.replace(latest)
    else:
        latest.unlink(missing_ok=True)
    for later, path in kept.items():
        if later > batch:
            path.unlink()


def find_paths(pattern: str) -> list[Path]:
    """What a pattern matches, sorted, numbers by their size; hidden files, such as locks, are not among it.

    A `latest` at its end is left away if there is nothing of that name.
    """
    if Path(pattern).exists():
        return [Path(pattern)]
    head, _, tail = pattern.rstrip('/').rpartition('/')
    for given in (pattern, *([head] if tail == _LATEST else [])):
        if found := glob.glob(given, recursive=True):  # noqa: PTH207, Path.glob finds hidden files too
            return sorted(map(Path, found), key=_by_number)
    return []


def _by_number(path: Path) -> tuple[list[str | int], Path]:
    parts = re.split(r'([0-9]+)', str(path))
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], path


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Read a checkpoint or a state dict to the CPU, with ``weights_only``.

    Raises:
        CheckpointError: The file is missing, damaged, no mapping, or loading it would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'{path}: no such file; a checkpoint or a state dict is needed there')
    try:
        with torch.serialization.safe_globals(_PLAIN_VALUES):
            saved = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # whatever a damaged file can cause
        if isinstance(error, pickle.UnpicklingError) and (forbidden := _forbidden(path)):
            raise CheckpointError(
                f'{path}: refused, since loading it would run code: it names {", ".join(forbidden)}; '
                'save the weights alone, torch.save(model.state_dict(), path)'
            ) from error
        raise CheckpointError(f'{path}: damaged, or no checkpoint at all') from error
    if not isinstance(saved, Mapping):
        raise CheckpointError(f'{path}: holds {type(saved).__name__}, not a checkpoint or a state dict')
    return saved


def _forbidden(path: Path) -> list[str]:
    """The names of what the file would import and call, beyond plain values."""
    try:
        with torch.serialization.safe_globals(_PLAIN_VALUES):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # damaged, or no zip file: one pickle after another, the format before torch 1.6
        return _names_in_pickles(path)


def _names_in_pickles(path: Path) -> list[str]:
    names, strings = set(), []
    with path.open('rb') as file, contextlib.suppress(Exception):
        while True:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == 'GLOBAL':
                    names.add(str(argument).replace(' ', '.'))
                elif opcode.name == 'STACK_GLOBAL':
                    names.add('.'.join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return sorted(name for name in names if not name.startswith(('torch.', 'collections.')))
