"""What every vision builder here ends with: a network wrapped as a Composer classifier with its loss."""

import math
from typing import Literal

import torch
from composer.loss import binary_cross_entropy_with_logits, soft_cross_entropy
from composer.models import ComposerClassifier
from torch import nn

Loss = Literal['cross_entropy', 'binary_cross_entropy']

_LOSSES = {'cross_entropy': soft_cross_entropy, 'binary_cross_entropy': binary_cross_entropy_with_logits}


def initialize_convolutions(module: nn.Module) -> None:
    """Draw the weights of all convolutions for ReLUs behind them, by their outputs (arXiv 1502.01852)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')


def classifier(
    module: nn.Module, head: nn.Module, *, num_classes: int, loss: Loss, pretrained: bool = False
) -> ComposerClassifier:
    """Wrap `module` as a classifier that is trained with `loss`.

    With binary cross entropy every class is a yes/no question of its own, and one in `num_classes` answers is yes. An
    untrained head therefore starts its bias at -log(num_classes), where the sigmoid is 1 / (1 + num_classes): otherwise
    the first steps only learn to say no.

    Args:
        module: network from images (batch, channels, height, width) to logits (batch, num_classes).
        head: the layer of `module` that gives the logits; it has a bias.
        num_classes: number of classes.
        loss: `cross_entropy` or `binary_cross_entropy`; both take class indices and class probabilities.
        pretrained: whether the head is trained already, and its bias stays as it is. Default: False.

    Raises:
        ValueError: `loss` is neither of the two, or the head's bias is to be set and it has none.
    """
    if loss not in _LOSSES:
        raise ValueError(f'unknown loss {loss!r}: choose {" or ".join(_LOSSES)}')
    if loss == 'binary_cross_entropy' and not pretrained:
        bias = getattr(head, 'bias', None)
        if not isinstance(bias, torch.Tensor):
            raise ValueError(
                f'{type(module).__name__} has no bias at its logits to start at -log(num_classes), as '
                'loss=binary_cross_entropy needs: use loss=cross_entropy'
            )
        nn.init.constant_(bias, -math.log(num_classes))
    return ComposerClassifier(module, num_classes=num_classes, loss_fn=_LOSSES[loss])
