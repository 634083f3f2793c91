import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composer.core import Timestamp

from composer_kd.recipes.metrics_logger import MetricsLogger, read_metrics


class Run:
    """The events of a run, as far as the logger listens to them."""

    def __init__(self, path, checkpoint: dict[str, Any] | None = None, batch: int = 0):
        self.logger: Any = MetricsLogger(path)
        self.state: Any = SimpleNamespace(timestamp=Timestamp(batch=batch))
        if checkpoint:
            self.logger.load_state_dict(checkpoint)
        self.logger.after_load(self.state, None)

    def batch(self, **metrics):
        self.logger.after_dataloader(self.state, None)
        self.logger.log_metrics({'time/batch': 1.0, **metrics})
        self.state.timestamp = self.state.timestamp.to_next_batch()
        self.logger.batch_end(self.state, None)

    def close(self):
        self.logger.close(self.state, None)


def test_one_row_per_batch(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    run = Run(path)
    run.logger.log_metrics({'before': 0.0})
    run.batch(loss=1.0)
    run.logger.log_metrics({'metrics/eval/x': 0.5})
    run.batch(loss=torch.tensor([0.5]))
    run.close()
    run.close()  # Composer closes once more when Python ends
    assert read_metrics(path) == [
        {'batch': 1, 'epoch': 0, 'seconds': 0.0, 'before': 0.0, 'loss': 1.0, 'metrics/eval/x': 0.5},
        {'batch': 2, 'epoch': 0, 'seconds': 0.0, 'loss': 0.5},
    ]


def test_a_reader_sees_an_evaluation_once_the_run_has_gone_on(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    run = Run(path)
    run.batch(loss=1.0)
    run.logger.log_metrics({'metrics/eval/x': 0.5})
    run.logger.eval_end(run.state, None)
    assert read_metrics(path) == []
    run.batch(loss=0.5)
    assert [row.get('metrics/eval/x') for row in read_metrics(path)] == [0.5]
    for _ in range(3):
        run.batch(loss=0.5)
    assert [row['batch'] for row in read_metrics(path)] == [1, 2]
    run.close()


def test_values_are_valid_json(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    run = Run(path)
    run.batch(
        a=float('nan'), b=float('-inf'), c=np.float32(0.5), d='text', e=torch.zeros(3), f=True, g=None, h=np.int64(3)
    )
    run.close()
    row = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))
    assert row == {'batch': 1, 'epoch': 0, 'seconds': 0.0, 'a': 'nan', 'b': '-inf', 'c': 0.5, 'f': True, 'h': 3}


@pytest.mark.parametrize('at', [0, 1, 3])
def test_what_came_after_the_checkpoint_is_dropped(tmp_path, at):
    path, checkpoint = tmp_path / 'metrics.jsonl', None
    run = Run(path)
    for batch in range(5):
        if batch == at:
            checkpoint = run.logger.state_dict()
        run.batch(loss=float(batch))
    assert json.dumps(checkpoint)  # plain values
    run.close()
    whole = read_metrics(path)

    run = Run(path, checkpoint, batch=at)
    for batch in range(at, 5):
        run.batch(loss=float(batch))
    run.close()
    assert read_metrics(path) == whole


def test_a_run_that_begins_anew_begins_with_an_empty_file(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    for _ in range(2):
        run = Run(path)
        run.batch(loss=1.0)
        run.close()
    assert len(read_metrics(path)) == 1


def test_the_checkpoint_of_another_run_says_nothing_of_this_file(tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
    run = Run(tmp_path / 'a' / 'metrics.jsonl')
    run.batch(loss=1.0)
    checkpoint = run.logger.state_dict()
    run.close()
    run = Run(tmp_path / 'b' / 'metrics.jsonl', checkpoint, batch=1)
    run.batch(loss=2.0)
    run.close()
    assert [row['batch'] for row in read_metrics(tmp_path / 'b' / 'metrics.jsonl')] == [2]
