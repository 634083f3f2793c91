"""VGG-16 for small images, of full or of depthwise-separable convolutions."""

from collections import OrderedDict
from collections.abc import Sequence

from composer.models import ComposerClassifier
from torch import nn

from composer_kd.models.classifier import Loss, classifier, initialize_convolutions

_STAGES: tuple[Sequence[int], ...] = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))  # channels, in widths


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


def _separable(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def cifar_vgg16(
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 64,
    separable: bool = False,
    loss: Loss = 'cross_entropy',
) -> ComposerClassifier:
    """VGG-16 (arXiv 1409.1556) with BatchNorm, for 32x32 images: 13 convolutions in five stages, one linear layer.

    Each stage ends with a pooling that halves the resolution. Stages have the same shapes with full and with separable
    convolutions, so that the one network can teach the other stage by stage.

    Args:
        num_classes: number of classes. Default: 10.
        in_channels: 1 for grey images, 3 for RGB. Default: 3.
        width: channels of the first stage; the others have 2, 4, 8 and 8 times as many. Default: 64, the paper's.
        separable: whether each convolution but the first is a depthwise one of 3x3 and a pointwise one, as MobileNet
            has them (arXiv 1704.04861). Default: False.
        loss: `cross_entropy` or `binary_cross_entropy`. Default: `cross_entropy`.
    """
    if min(num_classes, in_channels, width) < 1:
        raise ValueError('cifar_vgg16: num_classes, in_channels and width must be 1 or more')
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for number, widths in enumerate(_STAGES, 1):
        layers: list[nn.Module] = []
        for times in widths:
            is_first = not layers and number == 1
            convolution = _separable if separable and not is_first else _convolution
            layers.append(convolution(channels, times * width))
            channels = times * width
        stages[f'stage{number}'] = nn.Sequential(*layers, nn.MaxPool2d(2))
    stages['pool'] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stages['fc'] = nn.Linear(channels, num_classes)
    module = nn.Sequential(stages)
    initialize_convolutions(module)
    return classifier(module, stages['fc'], num_classes=num_classes, loss=loss)
