"""Read a teacher's weights from a file that nobody has to trust."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from composer import algorithms as composer_algorithms
from composer.core import Event
from torch import nn

from composer_kd.checkpoints import CheckpointError, file_sha256, find_checkpoint, read_checkpoint
from composer_kd.teachers.teacher import TeacherError

# Composer's algorithms that change a network so that its weights, or what it computes in eval mode, differ.
_SURGERY = (
    'Alibi',
    'BlurPool',
    'Factorize',
    'GatedLinearUnits',
    'GhostBatchNorm',
    'SqueezeExcite',
    'StochasticDepth',
    'WeightStandardization',
)

# What Composer's model classes put before the keys of the network that they wrap.
_PREFIXES = ('', 'module.', 'model.')


def load_weights(model: nn.Module, path: str | Path, sha256: str | None = None) -> None:
    """Load weights from ``path`` into ``model``, in place.

    The file is a Composer checkpoint or a state dict (plain, or under ``model`` or ``state_dict``). From a Composer
    checkpoint, the surgery that its run lists (BlurPool, SqueezeExcite, ...) is redone on ``model`` first, unless the
    weights fit it already. Weights are loaded all or none. The prefix that a ComposerModel puts before its network's
    keys may be there or not, on either side. Read with ``weights_only``: a file that would run code is refused.

    Args:
        model: A ComposerModel or a bare network, on any device.
        path: The file, or the folder of a run or of Composer checkpoints, for the latest one in it.
        sha256: The SHA-256 of the file in hexadecimal digits, to be verified. Default: ``None``.

    Raises:
        TeacherError: The file is missing, damaged, not the expected one, would run code, or does not fit ``model``.
    """
    file = find_checkpoint(path)
    if file is None:
        lacks = 'no checkpoint in this folder' if Path(path).is_dir() else 'no such file'
        raise TeacherError(f'{path}: {lacks}; the teacher needs a checkpoint or a state dict there')
    path = Path(path) if Path(path).is_file() else file
    if sha256 is not None and (found := file_sha256(path)) != sha256.lower():
        raise TeacherError(f'{path}: is not the expected file: its SHA-256 is {found}, not {sha256.lower()}')

    try:
        saved = read_checkpoint(path)
        weights, surgery = _contents(saved)
        fits = not _misfit(_renamed(weights, model.state_dict()), model.state_dict())
        for name, representation in surgery:
            # If the weights fit it is done already, unless it is the one that leaves no trace in them.
            if not fits or name == 'StochasticDepth':
                _redo_surgery(model, name, representation, path)
    except CheckpointError as error:
        raise TeacherError(str(error)) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TeacherError(f'{path}: damaged, or no checkpoint at all') from error
    expected = model.state_dict()
    renamed = _renamed(weights, expected)
    if misfit := _misfit(renamed, expected):
        raise TeacherError(f'{path}: does not fit the teacher network: {misfit}')
    model.load_state_dict(renamed)


def _contents(saved: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[tuple[str, str]]]:
    """The weights in a file, and the surgery of the run that saved them: name and representation of its algorithms."""
    state = saved.get('state')
    if isinstance(state, Mapping) and 'model' in state:
        surgery = [(name, kept['repr']) for name, kept in state.get('algorithms', []) if name in _SURGERY]
        return state['model'], surgery
    return next((saved[key] for key in ('model', 'state_dict') if isinstance(saved.get(key), Mapping)), saved), []


def _redo_surgery(model: nn.Module, name: str, representation: str, path: Path) -> None:
    """Apply the algorithm that ``representation`` calls, e.g. ``BlurPool(min_channels=16)``, without evaluating it."""
    try:
        call = ast.parse(representation, mode='eval').body
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == name
        # `drop_warmup=Time(...)` matters in training alone.
        arguments = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg and k.arg != 'drop_warmup'}
        state: Any = SimpleNamespace(model=model, optimizers=())
        silent: Any = SimpleNamespace(log_hyperparameters=lambda *_: None, log_metrics=lambda *_: None)
        getattr(composer_algorithms, name)(**arguments).apply(Event.INIT, state, silent)
    except Exception as error:
        raise TeacherError(
            f'{path}: its run changed the network by {representation}, which could not be redone '
            f'({type(error).__name__}); apply it to the network and pass that'
        ) from error


def _renamed(weights: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """``weights`` with the prefix of their keys changed so that most of them are keys of ``expected``."""
    best: dict[str, Any] = {}
    for has, wants in [(has, wants) for has in _PREFIXES for wants in _PREFIXES]:
        renamed = {wants + key[len(has) :]: value for key, value in weights.items() if key.startswith(has)}
        if len(renamed) == len(weights) and (not best or len(renamed.keys() & expected) > len(best.keys() & expected)):
            best = renamed
    return best


def _misfit(weights: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> str:
    """Which keys or shapes of ``weights`` are not those of ``expected``; empty if all are."""
    missing, unexpected = [k for k in expected if k not in weights], [k for k in weights if k not in expected]
    if missing or unexpected:
        parts = [(missing, 'missing'), (unexpected, 'unexpected')]
        return '; '.join(f'{_some(keys)} {what}' for keys, what in parts if keys)
    for key, value in weights.items():
        if not isinstance(value, torch.Tensor) or value.shape != expected[key].shape:
            has = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            return f'{key} is {has} there, {list(expected[key].shape)} in the network'
    return ''


def _some(keys: list[str], most: int = 3) -> str:
    return ', '.join(keys[:most]) + (f' and {len(keys) - most} more' if len(keys) > most else '')
