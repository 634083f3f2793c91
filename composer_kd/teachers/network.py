"""A frozen network as a teacher."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from composer.core import Precision, get_precision_context
from composer.models import ComposerModel
from torch import nn

from composer_kd.normalization import NORMALIZATION
from composer_kd.teachers.teacher import TeacherError, logits_of
from composer_kd.teachers.weights import load_weights
from composer_kd.tokenization import saved_tokenizer, tokenizer_difference
from composer_kd.vocabulary import DeferredLogits

if TYPE_CHECKING:
    from composer.core import Batch, State

Normalization = str | tuple[Sequence[float], Sequence[float]]


class NetworkTeacher:
    """A network that teaches: frozen, in eval mode, on the student's device, in no checkpoint.

    Nothing of it is part of the student: not of its state, its optimizer, DDP, FSDP or its checkpoints, which hold
    the :meth:`manifest` instead. ``model`` is used as it is, not copied: it is frozen and put in eval mode before the
    first batch.

    Args:
        model: A :class:`~composer.models.ComposerModel`, which is given the whole batch (without
            ``labels`` where the batch is a mapping), or any other module, which is given ``batch[0]``, or the mapping
            as keyword arguments. It returns logits, or a mapping that holds them under ``logits``.
        name: What errors and checkpoints call it. Default: the class of the network.
        checkpoint: A Composer checkpoint or a state dict to load, or the folder of a run, for its latest one.
            Default: ``None``.
        sha256: The SHA-256 of that file, to be verified. Default: ``None``.
        precision: Composer's precision for the teacher's forward pass: ``'fp32'``, ``'amp_bf16'``,
            ``'amp_fp16'``. Default: the student's.
        dtype: Convert its weights and floating point inputs, e.g. to ``'bfloat16'``, which halves the
            memory that they take. Default: ``None``, unchanged.
        channels_last: Run in channels_last memory format. Default: ``False``.
        compile: Compile it with :func:`torch.compile`. Default: ``False``.
        normalization: How images are normalized for this teacher: ``(mean, std)``, one value
            per channel of images in [0, 1], or the name of a data set (``'imagenet'``, ``'cifar10'``, ...). To be given
            together with ``student_normalization``. Default: ``None``, as for the student.
        student_normalization: How the loader normalizes them. Default: ``None``.
        input_size: Resize images to this height and width on the device, bilinear and antialiased: one number for both,
            or ``(height, width)``. Default: ``None``, the teacher sees the student's.

    Attributes:
        forwards: Passes through the network since the teacher was made.

    Raises:
        TeacherError: The checkpoint cannot be used, see :func:`~composer_kd.teachers.load_weights`.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str | None = None,
        checkpoint: str | Path | None = None,
        sha256: str | None = None,
        precision: str | None = None,
        dtype: str | None = None,
        channels_last: bool = False,
        compile: bool = False,
        normalization: Normalization | None = None,
        student_normalization: Normalization | None = None,
        input_size: int | Sequence[int] | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f'model must be a torch.nn.Module, not {type(model).__name__}')
        if sha256 is not None and checkpoint is None:
            raise ValueError('sha256 is of a checkpoint: give `checkpoint` too')
        self._dtype = None if dtype is None else getattr(torch, dtype, None)
        if dtype is not None and not (isinstance(self._dtype, torch.dtype) and self._dtype.is_floating_point):
            raise ValueError(f"dtype must name a floating point dtype of torch, such as 'bfloat16', not {dtype!r}")
        self._affine = _renormalize(student_normalization, normalization)
        self._input_size = _height_and_width(input_size)
        self._precision = None if precision is None else Precision(precision)
        self._options = {
            'input_size': self._input_size and list(self._input_size),
            'dtype': None if self._dtype is None else str(self._dtype).removeprefix('torch.'),
            'precision': None if self._precision is None else self._precision.value,
        }
        if self._affine is not None and normalization is not None and student_normalization is not None:
            self._options['normalization'] = _plain(normalization)
            self._options['student_normalization'] = _plain(student_normalization)
        self._options = {name: value for name, value in self._options.items() if value is not None}
        self._channels_last = channels_last
        self._compile = compile
        if checkpoint is not None:
            load_weights(model, checkpoint, sha256)
            _check_tokenizer(model, checkpoint)
        inner = getattr(model, 'module', None)
        self.forwards = 0
        self.replays = False
        self.name = name or type(inner if isinstance(inner, nn.Module) else model).__name__
        self._source = None if checkpoint is None else str(checkpoint)
        self._network: nn.Module | None = model
        self._forward: Any = None
        self._manifest: dict[str, Any] | None = None

    @property
    def network(self) -> nn.Module | None:
        """What is asked; ``None`` once it is released."""
        return self._network

    def check(self, student: ComposerModel) -> None:
        """Raise :class:`TeacherError` if this network is in part ``student``, or knows other classes or words."""
        network = self._live_network()
        own = {id(parameter) for parameter in network.parameters()}
        if any(id(parameter) in own for parameter in student.parameters()):
            raise TeacherError(
                f'teacher {self.name} shares parameters with the student, which freezing would stop from training; '
                'pass a copy (copy.deepcopy)'
            )
        has, wants = (getattr(model, 'num_classes', None) for model in (network, student))
        if isinstance(has, int) and isinstance(wants, int) and has != wants:
            raise TeacherError(f'teacher {self.name} has {has} classes, the student {wants}: they must be the same')
        own, students = (getattr(model, 'tokenizer', None) for model in (network, student))
        if own is not None and students is not None and (difference := tokenizer_difference(own, students)):
            raise TeacherError(
                f"the tokenizer of teacher {self.name} is not the student's ({difference}): the same text must be the "
                'same ids to both'
            )

    def prepare(self, state: State) -> None:
        """Freeze the network, and move it to the student's device, in the chosen dtype and memory format."""
        network = self._live_network()
        self.manifest()  # of the weights as they were given, before their dtype changes
        network = state.device.module_to_device(network.requires_grad_(False).eval())
        if self._dtype is not None:
            network = network.to(self._dtype)
        if self._channels_last:
            network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if self._affine is not None:
            self._affine = state.device.batch_to_device(self._affine)
        precision = self._precision or state.precision
        config = state.precision_config if precision == state.precision else None
        self._context = lambda: get_precision_context(precision, config)
        if self._forward is None:
            self._forward = torch.compile(network) if self._compile else network

    @torch.no_grad()
    def signal(self, batch: Batch, keys: torch.Tensor | None = None) -> torch.Tensor | DeferredLogits:
        """The network's logits for a device microbatch, which stays as it is; for its ``positions``, if it has any."""
        if self._forward is None:
            raise TeacherError(f'teacher {self.name} was asked before prepare(), or after release()')
        with self._context():
            logits = logits_of(self._ask(batch))
        self.forwards += 1
        positions = batch.get('positions') if isinstance(batch, Mapping) else None
        if positions is not None and logits.shape[:-1] == batch['input_ids'].shape:  # it has no eye for positions
            assert isinstance(logits, torch.Tensor)
            return logits.flatten(0, 1)[positions]
        return logits

    def release(self) -> None:
        """Leave the device, and drop the network; whoever else holds it finds it on the CPU."""
        if self._network is not None:
            self.manifest()
            self._network.to('cpu')
        self._network = self._forward = None

    def manifest(self) -> dict[str, Any]:
        """Name, architecture, source, a SHA-256 over names, shapes, dtypes and bytes of the weights, and options.

        The options are those that were given of what the network's answers depend on beside its weights and inputs.
        """
        if self._manifest is None:
            network = self._live_network()
            inner = getattr(network, 'module', network)
            self._manifest = {
                'name': self.name,
                'architecture': type(inner).__name__,
                'source': self._source,
                'parameters': sum(parameter.numel() for parameter in network.parameters()),
                'sha256': _weights_sha256(inner),
                'options': self._options,
            }
        return copy.deepcopy(self._manifest)

    def _live_network(self) -> nn.Module:
        if self._network is None:
            raise TeacherError(
                f'teacher {self.name} was released when distillation stopped; make a new one to distill again'
            )
        return self._network

    def _ask(self, batch: Batch) -> Any:
        if isinstance(batch, Mapping):
            inputs = {key: self._converted(value) for key, value in batch.items() if key != 'labels'}
            if isinstance(self._network, ComposerModel):
                return self._forward(inputs)
            inputs.pop('positions', None)
            return self._forward(**inputs)
        inputs = self._converted(batch[0])
        return self._forward((inputs, *batch[1:]) if isinstance(self._network, ComposerModel) else inputs)

    def _converted(self, inputs: Any) -> Any:
        if not isinstance(inputs, torch.Tensor) or not inputs.is_floating_point():
            return inputs
        if self._affine is not None:
            scale, shift = self._affine
            inputs = inputs * scale + shift
        if self._input_size is not None and tuple(inputs.shape[-2:]) != self._input_size:
            if inputs.ndim != 4:
                raise TeacherError(
                    f'teacher {self.name} has an input_size, which is for images of shape (N, C, H, W), and was given '
                    f'inputs of shape {list(inputs.shape)}: leave input_size out'
                )
            inputs = F.interpolate(inputs, self._input_size, mode='bilinear', antialias=True)
        if self._dtype is not None:
            inputs = inputs.to(self._dtype)
        if self._channels_last and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return inputs


def _check_tokenizer(model: nn.Module, checkpoint: str | Path) -> None:
    """See whether a network reads with the tokenizer that its weights were trained with, where both are known."""
    reads = getattr(model, 'tokenizer', None)
    learned = None if reads is None else saved_tokenizer(checkpoint)
    if reads is not None and learned is not None and (difference := tokenizer_difference(reads, learned)):
        raise TeacherError(
            f'{checkpoint}: was trained with another tokenizer than the one that is given ({difference}); if that one '
            'is made from text, the text has changed since: train the teacher anew, under another name'
        )


def _renormalize(student: Normalization | None, teacher: Normalization | None) -> list[torch.Tensor] | None:
    """Scale and shift, (C, 1, 1) each, that turn images normalized for the student into the teacher's."""
    if (student is None) != (teacher is None):
        raise ValueError('normalization and student_normalization belong together: give both or neither')
    if student is None or teacher is None or student == teacher:
        return None
    (student_mean, student_std), (mean, std) = (_mean_and_std(n) for n in (student, teacher))
    if student_mean.shape != mean.shape:
        raise ValueError(f'normalization has {len(mean)} channels, student_normalization {len(student_mean)}')
    # x = image * student_std + student_mean undoes the student's; (x - mean) / std does the teacher's.
    return [(student_std / std).float().view(-1, 1, 1), ((student_mean - mean) / std).float().view(-1, 1, 1)]


def _height_and_width(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pixels = (size, size) if not isinstance(size, Sequence) else tuple(size)
    if len(pixels) != 2 or not all(isinstance(number, int) and number > 0 for number in pixels):
        raise ValueError(f'input_size is a number of pixels, or (height, width), not {size!r}')
    return pixels


def _mean_and_std(normalization: Normalization) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(normalization, str):
        if normalization not in NORMALIZATION:
            raise ValueError(f'unknown normalization {normalization!r}; known: {", ".join(sorted(NORMALIZATION))}')
        normalization = NORMALIZATION[normalization]
    mean, std = (torch.as_tensor(values, dtype=torch.float64) for values in normalization)
    if mean.ndim != 1 or mean.shape != std.shape or not bool((std > 0).all()):
        raise ValueError('normalization is (mean, std): one value per channel each, std > 0')
    return mean, std


def _plain(normalization: Normalization) -> list[list[float]]:
    return [values.tolist() for values in _mean_and_std(normalization)]


def _weights_sha256(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in network.state_dict().items():
        digest.update(f'{key} {tuple(value.shape)} {value.dtype}'.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
