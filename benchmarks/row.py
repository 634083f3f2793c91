"""The line of JSON with which every benchmark ends: its figures, and what one must know to get them again."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from composer_kd import __version__

_PACKAGES = (
    'mosaicml',
    'torch',
    'torchvision',
    'transformers',
    'torchdistill',
    'textbrewer',
    'nvidia-modelopt',
    'timm',
    'liger-kernel',
    'trl',
)


def row(benchmark: str, *, launcher: Sequence[str] = ('python',), **figures: Any) -> str:
    """One line of JSON: the figures, the command, the hardware, the versions, and the commit of this repository."""
    values = {
        'benchmark': benchmark,
        **figures,
        'command': shlex.join([*launcher, *sys.argv]),
        'hardware': {
            'cpu': _cpu(),
            'cores': os.cpu_count(),
            'threads': torch.get_num_threads(),
            'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            'gpus': torch.cuda.device_count(),
        },
        'versions': {
            'python': platform.python_version(),
            'composer-kd': __version__,
            **{name: _version(name) for name in _PACKAGES},
        },
        'git_commit': _git_commit(),
    }
    return json.dumps(values, allow_nan=False)


def _cpu() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the folder of this file, marked where files differ from it; None outside git."""
    git = ['git', '-C', str(Path(__file__).parent)]
    try:
        commit, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (['rev-parse', 'HEAD'], ['status', '--porcelain', '--untracked-files=no'])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f'{commit}-dirty' if changes else commit
