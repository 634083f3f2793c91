"""What it has cost to make a record, over all attempts at it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer_kd.files import write
from composer_kd.recording.errors import RecordError

SUMMARY = 'summary.json'
SO_FAR = '.cost.json'

_COST = {'seconds': float | int, 'teacher_forwards': int}
_ABOUT = {'config': dict, 'views': int, 'teacher_training_seconds': float | int}


class Cost:
    """Seconds and passes through the teacher so far, for the one who writes a record.

    Args:
        folder: The record's folder.

    Attributes:
        seconds: They are those of the attempts before, until `add` is called.
        teacher_forwards: Likewise.

    Raises:
        RecordError: What an attempt before left cannot be read.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        found = self._found()
        self.seconds: float = found.get('seconds', 0.0)
        self.teacher_forwards: int = found.get('teacher_forwards', 0)
        self._before = self.seconds, self.teacher_forwards

    def add(self, seconds: float, teacher_forwards: int) -> None:
        """Note what this attempt has cost up to now, so that it is known even if this process is killed."""
        self.seconds, self.teacher_forwards = self._before[0] + seconds, self._before[1] + teacher_forwards
        write(self._folder / SO_FAR, json.dumps({'seconds': self.seconds, 'teacher_forwards': self.teacher_forwards}))

    def close(self, about: Mapping[str, Any]) -> None:
        """Write `summary.json`, of a record that is whole, and forget the notes.

        Args:
            about: What it is to say beside the cost.
        """
        cost = {'seconds': self.seconds, 'teacher_forwards': self.teacher_forwards}
        write(self._folder / SUMMARY, json.dumps(cost | dict(about), indent=2) + '\n')
        (self._folder / SO_FAR).unlink(missing_ok=True)

    def _found(self) -> dict[str, Any]:
        for path in (self._folder / SO_FAR, self._folder / SUMMARY):
            if path.is_file():
                return _read(path, _COST)
        return {}


def read_summary(path: Path) -> dict[str, Any]:
    """What lies in `summary.json` of a record.

    Raises:
        RecordError: It is damaged.
    """
    return _read(path, _COST | _ABOUT)


def _read(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        raise RecordError(f'{path} is damaged; delete it, and composer-kd record writes it anew')
    return found
