"""Warnings are errors in these tests, but for those that Composer's dependencies give while they are imported."""

import gc
import multiprocessing
import signal
import warnings

import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    import composer  # noqa: F401

from composer_kd.memory import free_closed_runs


def pytest_collection_finish() -> None:
    """Whatever is imported is there to stay: to look whether it is garbage, again and again, would take minutes."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope='module', autouse=True)
def closed_runs_are_freed():
    yield
    free_closed_runs()


@pytest.fixture(autouse=True)
def workers_are_ended():
    """Those of loaders that nobody has any more: torch waits seconds for each, once Python finds out."""
    yield
    if multiprocessing.active_children():
        for thing in gc.get_objects():
            if type(thing) is _MultiProcessingDataLoaderIter:
                thing._shutdown_workers()


@pytest.fixture
def heeded():
    """Has a signal heeded, which whoever started the tests may have ignored; the handler."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def heed(number):
        signal.signal(number, signal.default_int_handler)
        return signal.getsignal(number)

    yield heed
    for number, handler in handlers.items():
        signal.signal(number, handler)
