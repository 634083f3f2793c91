"""What tests of records share: what they are of, and rows that say which sample they are of."""

import json
from pathlib import Path

import numpy as np
import torch

from composer_kd.recording import Record

FIELDS = {
    **{'classes': 5, 'k': None, 'dtype': 'float32', 'temperatures': [], 'shard_samples': 4},
    'data': {'samples': 10, 'transform': 'Flip()', 'view_seed': 17, 'content': 'c' * 64},
    'teacher': {'name': 'Net', 'source': 'a.pt', 'sha256': '5' * 64},
    'precision': 'fp32',
}
SAMPLES = FIELDS['data']['samples']


def create(path, **fields):
    return Record.create(path, {**FIELDS, **fields})


def count_of(sample, view):
    """One to three rows a sample, as of masked text."""
    return 1 + (sample + view) % 3


def rows_of(record, sample, view):
    """The rows of a sample: logits that no other sample has."""
    lines = torch.arange(count_of(sample, view))[:, None]
    logits = 100.0 * sample + 10 * view + lines + torch.arange(record.format.classes) / 8
    return record.format.encode(logits).numpy()


def entries_of(record, keys):
    """Keys, counts and rows of some samples, as a journal is given them."""
    counts = np.array([count_of(*key) for key in keys], dtype=np.int64)
    rows = [np.empty((0, record.format.row_bytes), np.uint8), *(rows_of(record, *key) for key in keys)]
    return np.array(keys, dtype=np.int64).reshape(-1, 2), counts, np.concatenate(rows)


def write_shard(record, view, shard, samples=None):
    """Write a shard with all of its samples, or with some."""
    ids = range(shard * record.shard_samples, min((shard + 1) * record.shard_samples, record.samples))
    chosen = [sample for sample in ids if samples is None or sample in samples]
    _, chosen_counts, rows = entries_of(record, [(sample, view) for sample in chosen])
    counts = np.zeros(len(ids), dtype=np.int64)
    counts[[sample - ids[0] for sample in chosen]] = chosen_counts
    record.write(view, shard, counts, rows)


def found(record, views):
    """The keys that a record has, each of which must have the rows of that sample and no other."""
    keys = [(sample, view) for view in range(views) for sample in range(record.samples)]
    rows, counts = record.lookup(np.array(keys))
    ends = counts.cumsum()
    has = []
    for key, end, count in zip(keys, ends, counts, strict=True):
        if count:
            assert np.array_equal(rows[end - count : end], rows_of(record, *key)), key
            has.append(key)
    return has


def every(views):
    return [(sample, view) for view in range(views) for sample in range(SAMPLES)]


def files(path):
    return {file.name: file.read_bytes() for file in sorted(Path(path).iterdir())}


def edit_manifest(path, **changes):
    """Change a manifest as somebody with an editor would."""
    file = Path(path) / 'manifest.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
