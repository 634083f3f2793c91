"""Pixels into what networks are trained on."""

import torch

from composer_kd.normalization import NORMALIZATION


class Normalize:
    """(pixels / peak - mean) / std per channel, as float32.

    Args:
        data_set: a name in `NORMALIZATION`.
        peak: the pixel value that stands for 1. Default: 255.
        channels_last: whether the result lies in memory as (batch, height, width, channels), which convolutions on
            tensor cores prefer; its shape is the same either way. Default: False.
    """

    def __init__(self, data_set: str, peak: float = 255.0, channels_last: bool = False):
        self.data_set, self.peak = data_set, peak
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in NORMALIZATION[data_set])
        self.scale = 1 / (peak * std)
        self.shift = -mean / std
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalize images (batch, channels, height, width), wherever they are; the argument stays as it is."""
        if self.scale.device != images.device:
            self.scale, self.shift = self.scale.to(images.device), self.shift.to(images.device)
        pixels = images.to(torch.float32, memory_format=self.memory_format, copy=True)
        return pixels.mul_(self.scale).add_(self.shift)

    def __repr__(self) -> str:
        return f'Normalize({self.data_set!r}, peak={self.peak})'


class NormalizeBatch:
    """A `Normalize` for the images of a batch (images, labels), as a transform of Composer's `DataSpec`."""

    def __init__(self, normalize: Normalize):
        self.normalize = normalize

    def __call__(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalize the images."""
        images, labels = batch
        return self.normalize(images), labels

    def __repr__(self) -> str:
        return f'NormalizeBatch({self.normalize!r})'
