"""Records: what a teacher says, on disk, to be said again without it."""

from composer_kd.recording.errors import RecordError
from composer_kd.recording.formats import RowFormat
from composer_kd.recording.journal import Journal, locked_journals, merge, remove, seal
from composer_kd.recording.lock import RecordLock
from composer_kd.recording.manifest import differences
from composer_kd.recording.record import Record

__all__ = [
    'Journal',
    'Record',
    'RecordError',
    'RecordLock',
    'RowFormat',
    'differences',
    'locked_journals',
    'merge',
    'remove',
    'seal',
]
