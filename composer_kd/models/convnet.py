"""A small convolutional network for small images: a teacher when wide and deep, a student when narrow."""

import math
from collections import OrderedDict
from typing import Literal

from composer.models import ComposerClassifier
from torch import nn

from composer_kd.models.classifier import Loss, classifier, initialize_convolutions

_STAGES = 3


def _norm(kind: str, channels: int) -> list[nn.Module]:
    match kind:
        case 'batch':
            return [nn.BatchNorm2d(channels)]
        case 'group':
            return [nn.GroupNorm(math.gcd(8, channels), channels)]
        case 'none':
            return []
    raise ValueError(f'unknown norm {kind!r}: choose batch, group or none')


def small_convnet(
    num_classes: int = 10,
    in_channels: int = 1,
    width: int = 16,
    depth: int = 1,
    norm: Literal['batch', 'group', 'none'] = 'batch',
    loss: Loss = 'cross_entropy',
) -> ComposerClassifier:
    """Three stages of 3x3 convolutions, each of which halves the resolution, mean over the image, a linear head.

    Made for 8x8 to 32x32 images on a CPU. A single sample's result depends on nothing else in its batch with `norm`
    `group` or `none`, nor in evaluation mode.

    Args:
        num_classes: number of classes. Default: 10.
        in_channels: 1 for grey images, 3 for RGB. Default: 1.
        width: channels of the first stage; the next two have twice and four times as many. Default: 16.
        depth: convolutions in each stage. Default: 1.
        norm: what follows each convolution: `batch` normalization, `group` normalization in up to eight groups, or
            `none`. Default: `batch`.
        loss: `cross_entropy` or `binary_cross_entropy`. Default: `cross_entropy`.
    """
    if min(num_classes, in_channels, width, depth) < 1:
        raise ValueError('small_convnet: num_classes, in_channels, width and depth must be 1 or more')
    stages = OrderedDict()
    channels = in_channels
    for stage in range(_STAGES):
        layers: list[nn.Module] = []
        for conv in range(depth):
            out_channels = width * 2**stage
            stride = 2 if conv == 0 else 1
            layers += [
                nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=norm == 'none'),
                *_norm(norm, out_channels),
                nn.ReLU(),
            ]
            channels = out_channels
        stages[f'stage{stage + 1}'] = nn.Sequential(*layers)
    stages['pool'] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stages['fc'] = nn.Linear(channels, num_classes)
    module = nn.Sequential(stages)
    initialize_convolutions(module)
    return classifier(module, stages['fc'], num_classes=num_classes, loss=loss)
