"""What a teacher is: the protocol that networks, and whatever else gives a signal, share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from composer_kd.topk import TopKLogits
from composer_kd.vocabulary import DeferredLogits

if TYPE_CHECKING:
    from composer.core import Batch, State
    from composer.models import ComposerModel

Signal = torch.Tensor | DeferredLogits | TopKLogits


class TeacherError(RuntimeError):
    """A teacher that cannot be used, or that says something no student can learn from."""


@runtime_checkable
class Teacher(Protocol):
    """Where a signal comes from. The losses never know.

    A teacher that has weights may show its network as ``network``, a :class:`torch.nn.Module` or ``None``: a pool that
    keeps them on the host then sees to it that they are on the device whenever the teacher is asked.
    """

    @property
    def name(self) -> str:
        """What errors and checkpoints call it."""
        ...

    @property
    def forwards(self) -> int:
        """Passes through a network since the teacher was made; 0 for ever if it has none."""
        ...

    @property
    def replays(self) -> bool:
        """Whether it must know which samples, in which views, it is asked about.

        It is given their keys then, and nothing may change the inputs after the loader.
        """
        ...

    def check(self, student: ComposerModel) -> None:
        """Raise :class:`TeacherError` if this teacher cannot teach ``student``; costs no forward pass."""
        ...

    def prepare(self, state: State) -> None:
        """Get ready on the device of ``state``; asked once, before the first batch."""
        ...

    def signal(self, batch: Batch, keys: torch.Tensor | None = None) -> Signal:
        """Logits for a microbatch that is on the device: the student's shape, any float dtype, no gradient.

        Args:
            batch: A mapping may hold ``positions``, shape (M,): those of the N L flattened positions whose logits are
                wanted.
            keys: Sample id and view of each sample, int64 on the CPU, shape (N, 2). Default: ``None``, not known.
        """
        ...

    def release(self) -> None:
        """Leave the device for good."""
        ...

    def manifest(self) -> dict[str, Any]:
        """What this teacher is, in plain values: stored in checkpoints in place of its weights."""
        ...


def logits_of(outputs: Any) -> torch.Tensor | DeferredLogits:
    """The logits in what a model's ``forward`` returned: a tensor, or a mapping with ``logits`` (Hugging Face)."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, Mapping) and isinstance(outputs.get('logits'), torch.Tensor | DeferredLogits):
        return outputs['logits']
    raise TeacherError(
        'distillation needs logits: a tensor or a mapping with `logits`, but the model returned '
        f'{type(outputs).__name__}'
    )
