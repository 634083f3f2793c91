"""Writers that are killed."""

import os
import random
import signal
import time

import numpy as np
import pytest
from record_parts import create, entries_of, files, found, write_shard

from composer_kd.recording import Journal, Record, RecordLock, seal

FIELDS = {'data': {'samples': 24}, 'shard_samples': 8}
KILLS = 20


def record_views(path, views):
    """What a job does that records on the way, in one view, or in a pass over the data set, in the next."""
    with RecordLock(path):
        record = create(path, **FIELDS)
        seal(record)
        for view in range(views):
            if view % 2:
                for _, shard in (todo for todo in record.missing(view + 1) if todo[0] == view):
                    write_shard(record, view, shard)
            else:
                record_on_the_way(record, view)


def record_on_the_way(record, view):
    journals = [Journal(record, rank) for rank in range(2)]
    order = random.Random(view).sample(range(24), 24)
    for begin in range(0, 24, 4):
        keys = [(sample, view) for sample in order[begin : begin + 4]]
        missing = [key for key, count in zip(keys, record.lookup(np.array(keys))[1], strict=True) if not count]
        journals[begin // 4 % 2].append(*entries_of(record, missing))
    for journal in journals:
        journal.close()
    seal(record)


def fork(function, *arguments):
    child = os.fork()
    if not child:
        try:
            function(*arguments)
        finally:
            os._exit(1)
    return child


@pytest.mark.filterwarnings('ignore:This process .* is multi-threaded:DeprecationWarning')
def test_writers_that_are_killed_at_random_moments(tmp_path):
    path, lots = tmp_path / 'record', random.Random(0)
    begin = time.perf_counter()
    record_views(tmp_path / 'timed', 4)
    seconds_of_four_views = time.perf_counter() - begin
    for _ in range(KILLS):
        child = fork(record_views, path, 10**6)
        time.sleep(lots.uniform(0, seconds_of_four_views))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        if (path / 'manifest.json').exists():
            reader = Record.open(path)
            assert reader.damaged() == []
            found(reader, max(reader.views(), default=0) + 1)
    record_views(path, 0)  # which seals what was said last
    views = max(Record.open(path).views()) + 1
    assert views > 2
    record_views(path, views)
    record_views(tmp_path / 'unbroken', views)
    assert files(path) == files(tmp_path / 'unbroken')
    assert Record.open(path).missing(views) == []
