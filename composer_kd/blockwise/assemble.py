"""The checkpoints of stages -> one student."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from composer_kd.blockwise.pairs import BlockPairs
from composer_kd.checkpoints import CheckpointError, read_checkpoint

_KEY = re.compile(r'blocks\.(\d+)\.(.+)')  # of a weight in the checkpoint of a StageModel


def assemble(pairs: BlockPairs, checkpoints: Sequence[str | Path]) -> None:
    """Give the student that was cut the weights that its blocks have learned, bit for bit, and fold its adapters.

    It gets all of them, or an error and none.

    Args:
        pairs: Of the student and its teacher, made as for the stages.
        checkpoints: Those that the runs of all stages have left.

    Raises:
        CheckpointError: A file cannot be used, or together they are not one student.
    """
    found: dict[int, tuple[Path, dict[str, Tensor]]] = {}
    batches: dict[int, Path] = {}
    for path in map(Path, checkpoints):
        weights, batch = _contents(path)
        batches[batch] = path
        for number, block in weights.items():
            if number in found:
                raise CheckpointError(f'{path}: has block {number}, as {found[number][0]} has; give one of the two')
            found[number] = path, block
    if len(batches) > 1:
        at = ', '.join(f'{path} of batch {batch}' for batch, path in sorted(batches.items()))
        raise CheckpointError(f'the stages are not equally far: {at}; let all of them finish')
    for number, block in enumerate(pairs.student):
        if number not in found:
            raise CheckpointError(f'no checkpoint has block {number}: give those of all stages')
        path, weights = found[number]
        if misfit := _misfit(weights, block.state_dict()):
            raise CheckpointError(f'{path}: block {number} is of another student: {misfit}')
    if unknown := sorted(found.keys() - {*range(len(pairs))}):
        raise CheckpointError(
            f'{found[unknown[0]][0]}: has block {unknown[0]}, but the student has {len(pairs)} blocks'
        )
    for number, block in enumerate(pairs.student):
        block.load_state_dict(found[number][1])
    pairs.fold()


def _contents(path: Path) -> tuple[dict[int, dict[str, Tensor]], int]:
    """The weights of each block in the checkpoint of a stage, and the batch after which it was saved."""
    saved: Any = read_checkpoint(path)
    try:
        model, batch = saved['state']['model'], saved['state']['timestamp']['Timestamp']['batch']
        blocks: dict[int, dict[str, Tensor]] = {}
        for key, tensor in model.items():
            match = _KEY.fullmatch(key)
            if match is None or not isinstance(tensor, Tensor):
                raise KeyError(key)
            blocks.setdefault(int(match[1]), {})[match[2]] = tensor
        return blocks, int(batch)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f'{path}: is no checkpoint of a stage') from error


def _misfit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    if others := sorted(weights.keys() ^ expected.keys()):
        return f'{others[0]} is {"missing" if others[0] in expected else "not in the network"}'
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            return f'{name} is {[*tensor.shape]} there, {[*expected[name].shape]} in the network'
    return ''
