"""What tests of several packages share."""

import gzip
import os
import shutil
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
