"""Blocks of a teacher and of a student, of which each learns from the other's: its input is the teacher's, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from composer_kd import losses

BlockLoss = Literal['mse', 'normalized_mse', 'cosine']


class StudentBlock(nn.Module):
    """A block of a student that takes and gives what the teacher's does.

    Args:
        block: The block.
        into: Brings the teacher's channels to those that the block takes. Default: None, it takes as many.
        out: Brings the channels that the block gives to the teacher's. Default: None, it gives as many.
    """

    def __init__(self, block: nn.Module, into: nn.Module | None = None, out: nn.Module | None = None):
        super().__init__()
        self.block, self.into, self.out = block, into, out

    def forward(self, x: Tensor) -> Tensor:
        """What the block makes of the teacher's activations, shape of the teacher's next ones."""
        x = x if self.into is None else self.into(x)
        x = self.block(x)
        return x if self.out is None else self.out(x)


class BlockPairs:
    r"""The blocks of a teacher and of a student, in order.

    With :math:`a_0 = x` and :math:`a_{b+1} = T_b(a_b)`, block :math:`b` of the student learns :math:`a_{b+1}` from
    :math:`a_b`, so that no block waits for another one to have learned anything. The last one gives logits, and learns
    those of the teacher as :func:`.losses.kl` has it, at temperature 1, with the gradient of a cross entropy.

    Where the student has other channels than the teacher between two blocks, each side of the cut has a linear map
    (adapter) between the two, without bias, which learns with the block. :meth:`fold` puts them into the student's own
    weights.

    Args:
        teacher: Its blocks. They are frozen, and put in evaluation mode.
        student: Its blocks, each an :class:`~torch.fx.GraphModule` of :func:`.cut`.
        example: Some inputs, to see what shapes there are.
        loss: Of all blocks but the last: ``'mse'``, the mean squared error; ``'normalized_mse'``, that over the mean
            square of what is to be learned; or ``'cosine'``, one minus the cosine over the channels, mean over
            everything else. Default: ``'mse'``.
        label_weight: Weight of the cross entropy of the labels in the loss of the last block. Default: ``0.0``.
        seed: Of the adapters. Default: ``0``.

    Raises:
        ValueError: The blocks do not pair.
    """

    def __init__(
        self,
        teacher: Sequence[nn.Module],
        student: Sequence[GraphModule],
        example: Tensor,
        *,
        loss: BlockLoss = 'mse',
        label_weight: float = 0.0,
        seed: int = 0,
    ):
        if loss not in get_args(BlockLoss):
            raise ValueError(f'unknown loss of blocks {loss!r}: choose {", ".join(get_args(BlockLoss))}')
        if label_weight < 0:
            raise ValueError(f'label_weight must be 0 or more, not {label_weight}')
        if len(teacher) != len(student):
            raise ValueError(
                f'the teacher is cut into {len(teacher)} blocks, the student into {len(student)}: cut both as often'
            )
        self.teacher = [block.requires_grad_(False).eval() for block in teacher]
        self.loss, self.label_weight = loss, label_weight
        of_teacher, of_student = (_shapes(blocks, example) for blocks in (self.teacher, student))
        for number, block in enumerate(student):
            if not any(True for _ in block.parameters()):
                raise ValueError(f'block {number} of the student has no weights to learn: cut elsewhere')
        into: list[nn.Module | None] = [None]
        out: list[nn.Module | None] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for number, (has, gives) in enumerate(zip(of_teacher, of_student, strict=True)):
                if has == gives:
                    adapters = None, None
                else:
                    follows = student[number + 1] if number + 1 < len(student) else None
                    adapters = _adapters(number, has, gives, follows)
                out.append(adapters[0])
                into.append(adapters[1])
        self.student = [StudentBlock(*each) for each in zip(student, into[:-1], out, strict=True)]

    def __len__(self) -> int:
        return len(self.student)

    def losses(self, number: int, *, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of one block.

        Args:
            number: Of the block.
            student: What the student's block gives.
            teacher: What the teacher's block gives, of the same shape.
            labels: Of the samples, for the last block: classes, or their probabilities. Default: None.
        """
        student, teacher = student.float(), teacher.float()
        if number + 1 < len(self):
            return _LOSSES[self.loss](student, teacher)
        loss = losses.kl(student_logits=student, teacher_logits=teacher, temperature=1.0)
        if self.label_weight:
            assert labels is not None
            loss = loss + self.label_weight * F.cross_entropy(student, labels)
        return loss

    @torch.no_grad()
    def fold(self) -> None:
        """Put the adapters into the student's own weights, once; it is then the network that was cut."""
        for before, after in zip(self.student, self.student[1:], strict=False):
            if before.out is None or after.into is None:
                continue
            both = _matrix(after.into).double() @ _matrix(before.out).double()
            for layer in _readers(after.block) or ():
                weight = layer.weight.double()
                layer.weight.copy_(torch.einsum('oi...,ij->oj...', weight, both))
            before.out = after.into = None


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(student, teacher, dim=_channels(teacher.shape))).mean()


def _normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp_min(torch.finfo(torch.float32).tiny)


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    'mse': F.mse_loss,
    'normalized_mse': _normalized_mse,
    'cosine': _cosine,
}


@torch.no_grad()
def _shapes(blocks: Sequence[nn.Module], x: Tensor) -> list[torch.Size]:
    """Shapes of what a network gives after each of its blocks; nothing of it changes."""
    modes = [(module, module.training) for block in blocks for module in block.modules()]
    shapes = []
    try:
        for block in blocks:
            block.eval()
            x = block(x)
            shapes.append(x.shape)
    finally:
        for module, mode in modes:
            module.training = mode
    return shapes


def _channels(shape: torch.Size) -> int:
    """The dimension of the channels: the second of images, else the last."""
    return 1 if len(shape) == 4 else -1


def _adapters(
    number: int, has: torch.Size, gives: torch.Size, follows: nn.Module | None
) -> tuple[nn.Module, nn.Module]:
    """From the student's channels after a block to the teacher's, and from these to what its next block takes."""
    what = f'after block {number} the teacher has samples of shape {[*has[1:]]}, the student {[*gives[1:]]}'
    if follows is None:
        raise ValueError(f'{what}: both must know the same classes')
    wide, own, channels = [*has], [*gives], _channels(has)
    if len(wide) != len(own) or (wide[:channels], wide[channels:][1:]) != (own[:channels], own[channels:][1:]):
        raise ValueError(f'{what}: these may differ in their channels alone, so cut elsewhere')
    if not _readers(follows):
        raise ValueError(
            f'{what}: a map between the two would be put into the convolutions or linear layers that come next in the '
            'student, but something else does: cut elsewhere'
        )
    if len(has) == 4:
        return nn.Conv2d(own[1], wide[1], 1, bias=False), nn.Conv2d(wide[1], own[1], 1, bias=False)
    return nn.Linear(own[-1], wide[-1], bias=False), nn.Linear(wide[-1], own[-1], bias=False)


def _readers(block: nn.Module) -> list[nn.Conv2d | nn.Linear] | None:
    """The layers that take the input of a block, if they can take in a linear map of its channels; else None."""
    assert isinstance(block, GraphModule)
    (source,) = (node for node in block.graph.nodes if node.op == 'placeholder')
    layers = [block.get_submodule(str(user.target)) for user in source.users if user.op == 'call_module']
    linear = [layer for layer in layers if isinstance(layer, nn.Linear) or _mixes_channels(layer)]
    return linear if len(linear) == len(source.users) else None  # pyright: ignore[reportReturnType]


def _mixes_channels(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == 'zeros'


def _matrix(adapter: nn.Module) -> Tensor:
    """Of an adapter, shape (channels out, channels in)."""
    assert isinstance(adapter, nn.Conv2d | nn.Linear)
    return adapter.weight.flatten(1)
