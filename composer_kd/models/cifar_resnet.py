"""The small ResNets for 32x32 images of He et al. 2015 (arXiv 1512.03385), section 4.2."""

import itertools

import torch
import torch.nn.functional as F
from composer.models import ComposerClassifier
from torch import nn

from composer_kd.models.classifier import Loss, classifier, initialize_convolutions


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (the paper's option A)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.stride = 1 if in_channels == out_channels else 2
        self.new_channels = out_channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in, h, w) to (batch, out, h / stride, w / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels)))


class _CifarResNet(nn.Module):
    """A 3x3 convolution, three stages of `blocks` blocks with 1, 2 and 4 times `width` channels, mean, linear head."""

    def __init__(self, blocks: int, num_classes: int, width: int):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        channels = [width] * (blocks + 1) + [2 * width] * blocks + [4 * width] * blocks
        self.blocks = nn.Sequential(*(_Block(*pair) for pair in itertools.pairwise(channels)))
        self.fc = nn.Linear(4 * width, num_classes)
        initialize_convolutions(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, 3, h, w) to logits (batch, num_classes)."""
        out = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.fc(out.mean(dim=(2, 3)))


def _cifar_resnet(blocks: int, num_classes: int, width: int, loss: Loss) -> ComposerClassifier:
    module = _CifarResNet(blocks, num_classes, width)
    return classifier(module, module.fc, num_classes=num_classes, loss=loss)


def cifar_resnet20(num_classes: int = 10, width: int = 16, loss: Loss = 'cross_entropy') -> ComposerClassifier:
    """ResNet-20 for 32x32 RGB images: three blocks a stage, 0.27 million parameters as it stands.

    Args:
        num_classes: number of classes. Default: 10.
        width: channels of the first stage; the next two have twice and four times as many. Default: 16, the paper's.
        loss: `cross_entropy` or `binary_cross_entropy`. Default: `cross_entropy`.
    """
    return _cifar_resnet(3, num_classes, width, loss)


def cifar_resnet56(num_classes: int = 10, width: int = 16, loss: Loss = 'cross_entropy') -> ComposerClassifier:
    """ResNet-56 for 32x32 RGB images: nine blocks a stage, 0.85 million parameters as it stands.

    Args:
        num_classes: number of classes. Default: 10.
        width: channels of the first stage; the next two have twice and four times as many. Default: 16, the paper's.
        loss: `cross_entropy` or `binary_cross_entropy`. Default: `cross_entropy`.
    """
    return _cifar_resnet(9, num_classes, width, loss)
