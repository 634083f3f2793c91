"""What a recipe says under `blockwise`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from composer_kd.blockwise.blocks import balanced_cuts, cut, cut_points
from composer_kd.blockwise.pairs import BlockLoss, BlockPairs
from composer_kd.blockwise.plan import Stage
from composer_kd.exchange.weights import float_dtype

Cuts = int | Sequence[str] | Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Blockwise:
    """How a student learns block by block.

    Args:
        cut: After which modules to cut: names that both networks have; or those of each, under `teacher` and `student`;
            or how many blocks, which are then cut by what they cost the teacher, and must have their ends in the
            student, too.
        schedule: `relay`, a pipeline whose stages hand on the teacher's activations; or one of the baselines,
            `data_parallel`, one block after another on all devices, and `layer_split`, blocks dealt out to devices, of
            which each has the teacher's blocks before it. All give the same student.
        loss: Of all blocks but the last, see :class:`.BlockPairs`.
        label_weight: Weight of the labels in the loss of the last block.
        stages: Of a relay: for each stage how many blocks, and how many devices. Default: None, the best plan.
        depth: Buffers between two stages.
        dtype: Of floating point numbers on their way between stages. Default: None, as they are.
        profile: A file by `composer-kd plan --out`, of other hardware. Default: None, it is measured.

    Raises:
        ValueError: An argument is out of range.
    """

    cut: Cuts
    schedule: Literal['relay', 'data_parallel', 'layer_split'] = 'relay'
    loss: BlockLoss = 'mse'
    label_weight: float = 0.0
    stages: Sequence[Sequence[int]] | None = None
    depth: int = 2
    dtype: str | None = None
    profile: str | None = None

    def __post_init__(self):
        if isinstance(self.cut, Mapping) and self.cut.keys() != {'teacher', 'student'}:
            raise ValueError(f'cut has names for `teacher` and for `student`, not for {", ".join(self.cut) or "none"}')
        if isinstance(self.cut, int) and self.cut < 1:
            raise ValueError(f'cut must be 1 block or more, not {self.cut}')
        float_dtype(self.dtype)
        if self.depth < 1:
            raise ValueError(f'depth must be 1 or more buffers, not {self.depth}')
        if self.stages is not None:
            if self.schedule != 'relay':
                raise ValueError(f'stages are for schedule: relay, not for {self.schedule}; leave them out')
            if not self.stages or any(len(stage) != 2 or min(stage) < 1 for stage in self.stages):
                raise ValueError(f'stages must be [[blocks, devices], ...], of each 1 or more, not {self.stages}')

    @property
    def on_the_way(self) -> torch.dtype | None:
        """The dtype of floating point numbers between stages."""
        return float_dtype(self.dtype)

    def pairs(self, teacher: nn.Module, student: nn.Module, example: Tensor, *, seed: int) -> BlockPairs:
        """Cut both networks.

        Raises:
            ValueError: They cannot be cut there, or do not pair.
        """
        at = self._names(teacher.eval(), student.train(), example)
        blocks = {}
        for name, network in (('teacher', teacher), ('student', student)):
            try:
                blocks[name] = cut(network, at[name])
            except ValueError as error:
                raise ValueError(f'cut: {name}: {error}') from error
        return BlockPairs(
            blocks['teacher'],
            blocks['student'],
            example,
            loss=self.loss,
            label_weight=self.label_weight,
            seed=seed,
        )

    def given_stages(self, blocks: int, devices: int) -> list[Stage]:
        """The stages that the recipe gives.

        Raises:
            ValueError: They are not of so many blocks and devices.
        """
        assert self.stages is not None
        sums = [sum(each) for each in zip(*self.stages, strict=True)]
        for what, has, wanted in (('blocks', sums[0], blocks), ('devices', sums[1], devices)):
            if has != wanted:
                todo = 'change them' + (f', or start {has} processes (composer -n {has})' if what == 'devices' else '')
                raise ValueError(f'stages: have {has} {what} together, but there are {wanted}: {todo}')
        ends = [[*itertools.accumulate(each, initial=0)] for each in zip(*self.stages, strict=True)]
        ranges = [[range(*pair) for pair in itertools.pairwise(each)] for each in ends]
        return [Stage(*each) for each in zip(*ranges, strict=True)]

    def _names(self, teacher: nn.Module, student: nn.Module, example: Tensor) -> Mapping[str, Sequence[str]]:
        """After which modules to cut each of the two."""
        if isinstance(self.cut, Mapping):
            return self.cut
        if not isinstance(self.cut, int):
            return {'teacher': self.cut, 'student': self.cut}
        among = {*cut_points(student, all_names=True)}
        names = balanced_cuts(teacher, self.cut, example, among=among)
        return {'teacher': names, 'student': names}
