"""What tests of several packages share."""

import gc
import gzip
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from composer import Trainer
from composer.utils import dist
from PIL import Image

from composer_kd import teams as composer_teams


def make_imagefolder(path, classes=2, per_class=4, size=64):
    """Write `train/` and `val/`, each with `classes` folders of `per_class` JPEG images, a noisy colour per class."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (classes, 1, 1, 3))
    for split in ('train', 'val'):
        for label, colour in enumerate(colours):
            folder = Path(path) / split / f'class{label:03d}'
            folder.mkdir(parents=True)
            for number in range(per_class):
                pixels = colour + rng.integers(-40, 40, (size, size + 8, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{number}.jpeg')
    return Path(path)


def shared_data(folder):
    """A folder of real data; skip the test if it is not there."""
    found = Path(os.environ.get('COMPOSER_KD_DATA', Path(__file__).parents[2] / 'shared' / 'data')) / folder
    if not found.is_dir():
        pytest.skip(f'no data in {found}: set COMPOSER_KD_DATA to a folder that has {folder}')
    return found


def unpack_fashion_mnist(path):
    """Unpack the real Fashion-MNIST under `path`, where torchvision looks for it; skip the test if it is not there."""
    packed = shared_data('FashionMNIST/raw')
    raw = Path(path) / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    for file in packed.glob('*.gz'):
        with gzip.open(file) as source, (raw / file.stem).open('wb') as target:
            shutil.copyfileobj(source, target)
    return Path(path)


TINY_BERT = {
    **{'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 32},
    **{'max_position_embeddings': 64},
}

_LETTERS = 'abcdefghijklmnopqrstuvwxyz'


def make_vocabulary(path):
    """Write a `vocab.txt` of word pieces: what is special, digits and letters."""
    pieces = [piece for letter in _LETTERS + '0123456789' for piece in (letter, f'##{letter}')]
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *pieces]
    Path(path).write_text(''.join(f'{word}\n' for word in words), encoding='utf-8')
    return str(path)


# Columns of the files in GLUE's own layout; A and B are texts, L is the label.
_GLUE = {
    'CoLA': ('', 'src L x A', '01'),
    'SST-2': ('sentence label', 'A L', '01'),
    'MRPC': ('Quality,#1 ID,#2 ID,#1 String,#2 String', 'L 1 2 A B', '01'),
    'STS-B': (
        'index genre filename year old_index source1 source2 sentence1 sentence2 score',
        '0 g f y 0 s s A B L',
        '',
    ),
    'QQP': ('id qid1 qid2 question1 question2 is_duplicate', '0 1 2 A B L', '01'),
    'MNLI': (
        'index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse '
        'sentence1 sentence2 label1 gold_label',
        '0 1 2 g p p p p A B l L',
        ('entailment', 'neutral', 'contradiction'),
    ),
    'QNLI': ('index question sentence label', '0 A B L', ('entailment', 'not_entailment')),
    'RTE': ('index sentence1 sentence2 label', '0 A B L', ('entailment', 'not_entailment')),
}


def make_glue(path, train=96, validation=10):
    """Write the files of all tasks of GLUE in its own layout, with a few examples each, whose label is easy to see."""
    rng = np.random.default_rng(0)
    for task, (header, row, labels) in _GLUE.items():
        (Path(path) / task).mkdir(parents=True)
        splits = ('dev_matched', 'dev_mismatched') if task == 'MNLI' else ('dev',)
        for split in ('train', *splits):
            lines = ['\t'.join(header.split(',' if ',' in header else ' '))] if header else []
            for number in range(train if split == 'train' else validation):
                words = [''.join(rng.choice([*_LETTERS], 3)) for _ in range(rng.integers(2, 8))]
                kind = number % (len(labels) or 5)
                values = {
                    'A': f'{kind} ' + ' '.join(words),
                    'B': f'"{words[0]}',
                    'L': str(labels[kind] if labels else kind / 2),
                }
                lines.append('\t'.join(values.get(field, field) for field in row.split()))
            (Path(path) / task / f'{split}.tsv').write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
    return Path(path)


def train_one_batch(model, input_ids, labels, folder):
    """Train a text model on one batch; the checkpoint is in `folder`."""
    rows = [
        {'input_ids': ids, 'attention_mask': torch.ones_like(ids), 'labels': label}
        for ids, label in zip(input_ids, labels, strict=True)
    ]
    trainer = Trainer(
        model=model,
        train_dataloader=torch.utils.data.DataLoader(rows, batch_size=len(rows)),
        optimizers=torch.optim.AdamW(model.parameters(), lr=0.01),
        max_duration='1ba',
        save_folder=str(folder),
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()


@contextmanager
def another_writer(record):
    """Another process, which has the lock of a record."""
    code = 'import fcntl, sys; f = open(sys.argv[1], "w"); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()'
    command = [sys.executable, '-S', '-c', code, str(Path(record, '.lock'))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield
        process.communicate(b'\n')


# Composer takes seconds to import: once, by a process that does nothing else, whose forks have it at once.
_forks = multiprocessing.get_context('forkserver')
_forks.set_forkserver_preload(
    [
        *('composer_kd.glue', 'composer_kd.record', 'composer_kd.data', 'composer_kd.models'),
        *('sklearn.datasets', 'sklearn.model_selection', 'matplotlib.backends.backend_agg'),  # imported when needed
        'pytest',  # which multiprocessing imports in each
    ]
)


def in_forks(work, calls, environments, seconds=300, codes=None, meanwhile=lambda forks: None):
    """Do some work in processes of their own at the same time; what each printed, on stdout alone.

    Args:
        work: A function of a module.
        calls: Its arguments, for each process.
        environments: The variables of each process.
        seconds: For all of it.
        codes: With which each has to end, or a function that says whether they may end so. Default: 0, all of them.
        meanwhile: Is given the processes, once all have been started.
    """
    with tempfile.TemporaryDirectory() as logs:
        files = [(f'{logs}/out{number}', f'{logs}/err{number}') for number in range(len(calls))]
        forks = [
            _forks.Process(target=_in_fork, args=(work, *given))
            for given in zip(calls, environments, files, strict=True)
        ]
        for fork in forks:
            fork.start()
        patience = time.monotonic() + seconds
        meanwhile(forks)
        for fork in forks:
            fork.join(max(0, patience - time.monotonic()))
        ended = [fork.exitcode for fork in forks]
        for fork in forks:
            fork.kill()
            fork.join()
            fork.close()
        said = [[Path(file).read_text() for file in pair] for pair in files]
    is_right = codes(ended) if callable(codes) else ended == (codes or [0] * len(forks))
    assert is_right, (ended, said)
    return [out for out, _ in said]


@contextmanager
def in_a_fork(work, *arguments, out=os.devnull):
    """Another process, which does some work meanwhile. It is killed where it is still at it at the end.

    Args:
        work: A function of a module.
        arguments: Its arguments.
        out: A file, for what it prints on stdout. Default: it is thrown away.
    """
    fork = _forks.Process(target=_in_fork, args=(work, arguments, {**os.environ}, (out, os.devnull)))
    fork.start()
    try:
        yield fork
    finally:
        fork.kill()
        fork.join()


def _in_fork(work, arguments, environment, files):
    gc.freeze()  # what has been imported, at which `free_closed_runs` would look for a second after each run
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get('OMP_NUM_THREADS'):
        torch.set_num_threads(int(threads))
    multiprocessing.set_start_method('fork', force=True)  # of the workers of loaders, as everywhere
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    work(*arguments)


def launched(ranks, nodes=1):
    """The environments of so many ranks, with what Composer's launcher puts there."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    here = ranks // nodes
    return [
        {
            **os.environ,
            **{'WORLD_SIZE': str(ranks), 'LOCAL_WORLD_SIZE': str(here)},
            **{'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port},
            **{'RANK': str(rank), 'LOCAL_RANK': str(rank % here), 'NODE_RANK': str(rank // here)},
            'OMP_NUM_THREADS': '1',
        }
        for rank in range(ranks)
    ]


def on_two_ranks(code, folder):
    """Run Python code, for which `dist` is there, on two ranks that are joined, in `folder`; what each printed."""
    return in_forks(_be_rank, 2 * [(code, folder)], launched(2), seconds=120)


def in_teams(teams, code, ranks, nodes=1, timeout=20, codes=None):
    """Run Python code, for which their `team` is there, on ranks that are split into teams; what each printed."""
    return in_forks(_be_in_team, ranks * [(teams, code, timeout)], launched(ranks, nodes), 120, codes)


def _be_in_team(teams, code, timeout):
    team = composer_teams.split(teams, timeout=timeout)
    exec(code, {'__name__': '__main__', 'team': team})


def _be_rank(code, folder):
    os.chdir(folder)
    warnings.simplefilter('ignore')
    dist.initialize_dist('cpu', timeout=60)
    exec(code, {'__name__': '__main__', 'dist': dist})
