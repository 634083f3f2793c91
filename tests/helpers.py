"""What tests of several packages share."""

import gzip
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


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


def unpack_fashion_mnist(path):
    """Unpack the real Fashion-MNIST under `path`, where torchvision looks for it; skip the test if it is not there."""
    shared = os.environ.get('COMPOSER_KD_DATA', Path(__file__).parents[2] / 'shared' / 'data')
    packed = Path(shared) / 'FashionMNIST' / 'raw'
    if not packed.is_dir():
        pytest.skip(f'no Fashion-MNIST in {packed}: set COMPOSER_KD_DATA to a folder with FashionMNIST/raw/*.gz')
    raw = Path(path) / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    for file in packed.glob('*.gz'):
        with gzip.open(file) as source, (raw / file.stem).open('wb') as target:
            shutil.copyfileobj(source, target)
    return Path(path)


def on_two_ranks(code, folder):
    """Run Python code on two ranks that are joined already, in `folder`; what each printed."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    world = {'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'NODE_RANK': '0', 'MASTER_ADDR': '127.0.0.1'}
    join = "from composer.utils import dist\ndist.initialize_dist('cpu', timeout=60)\n"
    ranks = [
        subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-c', join + code],
            cwd=folder,
            env={**os.environ, **world, 'MASTER_PORT': port, 'RANK': rank, 'LOCAL_RANK': rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in '01'
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    return [out for out, _ in said]
