import atexit
import gc
import weakref

from composer.core import Engine

from composer_kd.memory import free_closed_runs
from settings import train, trainer


def test_closed_trainers_are_freed_and_open_ones_are_closed_at_exit(monkeypatch, tmp_path):
    closed = weakref.ref(train([], save_folder=str(tmp_path), max_duration='1ba').state)
    open_one = trainer([])
    gc.collect()
    assert closed() is not None  # though nobody has it any more
    registered = []
    monkeypatch.setattr(atexit, 'register', lambda *call: registered.append(call))
    free_closed_runs()
    assert closed() is None
    assert registered == [(Engine._close, open_one.state, open_one.logger)]
    open_one.close()
