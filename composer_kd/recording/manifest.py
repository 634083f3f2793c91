"""What a record is of: a file beside its shards, written once, and how two of them differ."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from composer_kd import __version__
from composer_kd.files import write
from composer_kd.recording.errors import RecordError
from composer_kd.recording.formats import RowFormat

FORMAT = 1
NAME = 'manifest.json'

#: What must be the same for what is recorded to be the same.
PARTS = ('data', 'teacher', 'classes', 'k', 'dtype', 'temperatures', 'precision')

_TYPES: dict[str, Any] = {
    **{'classes': int, 'k': int | None, 'dtype': str, 'temperatures': list, 'shard_samples': int},
    **{'data': dict, 'teacher': dict, 'precision': str | None, 'versions': dict},
}
_MOST_SAMPLES = 2**15
_SHARDS = 16
_EXCERPT = 40

# What a teacher may be called, and where it may lie, without saying anything else.
_NAMES_OF_A_TEACHER = ('name', 'source')


def shard_samples(samples: int, batch_size: int = 1) -> int:
    """How many samples a shard is of where nobody says: a sixteenth of all, up to 32768, in whole batches.

    Args:
        samples: How many there are.
        batch_size: How many are recorded at once. Default: 1.
    """
    wanted = min(_MOST_SAMPLES, -(-samples // _SHARDS))
    return max(1, -(-wanted // batch_size)) * batch_size


def complete(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest of `fields`, with what they leave to us; as it will be when it is read again.

    Raises:
        RecordError: One of them is out of range.
    """
    ours = {
        'format': FORMAT,
        'shard_samples': shard_samples(fields['data']['samples']),
        'versions': {'composer-kd': __version__, 'torch': torch.__version__},
    }
    manifest = json.loads(json.dumps({**ours, **fields}))
    manifest['checksum'] = _checksum(manifest)
    if fault := _fault(manifest):
        raise RecordError(f'no record can be made: {fault}')
    return manifest


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of the record in a folder, None if there is none.

    Raises:
        RecordError: It is damaged, or of a format that is not known here.
    """
    path = folder / NAME
    todo = f'put one back that is whole, or delete {folder} and record again'
    try:
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest, dict) or manifest.get('checksum') != _checksum(manifest):
            raise ValueError('its checksum is wrong')
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RecordError(f'cannot read {path}: {error.strerror}') from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f'{path} is damaged; {todo}') from error
    if manifest.get('format') != FORMAT:
        raise RecordError(f'{path} is of format {manifest.get("format")}, known is {FORMAT}: use a newer composer-kd')
    if fault := _fault(manifest):
        raise RecordError(f'{path} is damaged: {fault}; {todo}')
    return manifest


def save(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / NAME, json.dumps(manifest, indent=2) + '\n')


def row_format(manifest: Mapping[str, Any]) -> RowFormat:
    """The format of the rows of a record."""
    temperatures = tuple(float(temperature) for temperature in manifest['temperatures'])
    return RowFormat(manifest['classes'], manifest['k'], manifest['dtype'], temperatures)


def identity(manifest: Mapping[str, Any]) -> int:
    """A number that shards and journals of a record carry, and those of others do not."""
    return int(manifest['checksum'][:8], 16)


def differences(manifest: Mapping[str, Any], fields: Mapping[str, Any], parts: Iterable[str] = PARTS) -> list[str]:
    """What of a record is other than it should be: a phrase for each, such as 'samples: 60000 there, 59904 here'.

    Versions do not count, nor what a teacher is called and where it lies.

    Args:
        manifest: That of the record, 'there'.
        fields: What is wanted 'here', as in a manifest; of those that are compared, one that is missing is null.
        parts: What to compare. Default: all of `PARTS`, as a writer must; a reader may ask for `['data']` alone.
    """
    here = json.loads(json.dumps({part: fields.get(part) for part in parts}))
    found = []
    for part, wanted in here.items():
        has = manifest.get(part)
        if isinstance(has, dict) and isinstance(wanted, dict):
            found += _differences_within(part, has, wanted)
        elif has != wanted:
            found.append(_phrase(part, has, wanted))
    return found


def _differences_within(part: str, there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    names = [name for name in here | there if there.get(name) != here.get(name)]
    if part == 'teacher':
        names = [name for name in names if name not in _NAMES_OF_A_TEACHER]
    if part == 'data' and names != ['content']:
        names = [name for name in names if name != 'content']  # which follows from the others
    words = {'content': 'content of the data set'}
    before = 'teacher ' if part == 'teacher' else ''
    return [_phrase(words.get(name, before + name), there.get(name), here.get(name)) for name in names]


def _phrase(name: str, there: Any, here: Any) -> str:
    one, other = ('none' if x is None else x if isinstance(x, str) else json.dumps(x) for x in (there, here))
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f'{name}: {_excerpt(one, same)} there, {_excerpt(other, same)} here'


def _excerpt(text: str, at: int) -> str:
    """Some of a text, in one line, with what is at a place in it."""
    begin = max(0, at - _EXCERPT // 2) if len(text) > _EXCERPT else 0
    end = begin + _EXCERPT
    excerpt = ('...' if begin else '') + text[begin:end] + ('...' if end < len(text) else '')
    return ' '.join(excerpt.split())


def _checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all that counts in a manifest."""
    counts = {name: value for name, value in manifest.items() if name not in ('checksum', 'versions')}
    return hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()


def _fault(manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with the values of a manifest, if anything."""
    for name, kind in _TYPES.items():
        if name not in manifest or not isinstance(manifest[name], kind) or isinstance(manifest[name], bool):
            return f'{name} is missing, or of a wrong type'
    samples = manifest['data'].get('samples')
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1 or manifest['shard_samples'] < 1:
        return 'samples and shard_samples must be positive'
    temperatures = manifest['temperatures']
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in temperatures):
        return 'temperatures must be numbers'
    try:
        row_format(manifest)
    except RecordError as error:
        return str(error)
    return None
