"""What a run logged, as lines of JSON, each batch once however often the run was interrupted."""

import json
import math
import re
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

_CLOCK = re.compile(r'time/(epoch|batch|sample|token)(_in_epoch)?|trainer/.*')  # in every row, or the same in all


class MetricsLogger(LoggerDestination):
    """Writes one JSON object per batch: `{"batch": batches done, "epoch": ..., "seconds": ..., name: value, ...}`.

    `seconds` is Composer's wall clock of training, without evaluation. Values that are not finite are written as text.
    How much of the file belongs to a checkpoint is kept in it: a run that resumes drops what was written later.

    Args:
        path: The file. Written by rank 0 alone.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: TextIO | None = None
        self._row: dict[str, Any] = {}
        self._size = 0
        self._rows_to_show = 0

    def after_load(self, state: State, logger: Logger) -> None:
        """Open the file where the run goes on."""
        if dist.get_global_rank() == 0:
            self.path.touch()
            self._file = self.path.open('r+', encoding='utf-8')
            self._file.truncate(min(self._size, self.path.stat().st_size))
            self._file.seek(0, 2)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add to the row of this batch."""
        self._row |= {name: value for name, value in metrics.items() if not _CLOCK.fullmatch(name)}

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """The batch before is over, with all that was logged after its end."""
        self._write_row()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Close the account of this batch, to which evaluation may still add."""
        time = state.timestamp
        seconds = round(time.total_wct.total_seconds(), 3)
        self._row |= {'batch': time.batch.value, 'epoch': time.epoch.value, 'seconds': seconds}

    def eval_end(self, state: State, logger: Logger) -> None:
        """Let a reader see what was found, in the row that is written next, and that the run has gone on since."""
        self._rows_to_show = 2

    def state_dict(self) -> dict[str, Any]:
        """The size of the file, and the row that is not in it yet."""
        size = 0
        if self._file:
            self._file.flush()
            size = self._file.tell()
        return {'run': self.path.parent.name, 'size': size, 'row': _plain(self._row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the last row of the checkpoint, if it is one of this run."""
        if state['run'] == self.path.parent.name:
            self._size, self._row = state['size'], dict(state['row'])

    def close(self, state: State, logger: Logger) -> None:
        """Write the last row."""
        self._write_row()
        if self._file:
            self._file.close()
            self._file = None

    def _write_row(self) -> None:
        if 'batch' not in self._row:
            return  # logged before the first batch, of which it becomes a part
        row, self._row = _plain(self._row), {}
        if self._file:
            head = {name: row.pop(name) for name in ('batch', 'epoch', 'seconds')}
            self._file.write(json.dumps(head | row) + '\n')
            if self._rows_to_show:
                self._rows_to_show -= 1
                self._file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def _plain(row: dict[str, Any]) -> dict[str, float | str]:
    """The numbers of a row, as JSON has them."""
    numbers = {}
    for name, value in row.items():
        if isinstance(value, (torch.Tensor, np.generic)) and math.prod(value.shape) == 1:
            value = value.item()
        if isinstance(value, (int, float)):
            numbers[name] = value if math.isfinite(value) else str(float(value))
    return numbers
