import itertools

import pytest
import torch
from torch import nn

from composer_kd import models
from composer_kd.blockwise.blocks import cut
from composer_kd.blockwise.pairs import BlockPairs


@pytest.mark.parametrize(('separable', 'convolutions'), [(False, 13), (True, 1 + 2 * 12)])
def test_sixteen_layers_less_the_two_large_ones(separable, convolutions):
    model = models.cifar_vgg16(separable=separable)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == convolutions
    widths = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    full = sum(9 * a * b + 2 * b for a, b in zip([3, *widths], widths, strict=False))
    parts = [9 * a + 2 * a + a * b + 2 * b for a, b in itertools.pairwise(widths)]
    expected = 9 * 3 * 64 + 2 * 64 + sum(parts) if separable else full
    assert sum(p.numel() for p in model.parameters()) == expected + 512 * 10 + 10


@pytest.mark.parametrize('separable', [False, True])
def test_trains_from_every_layer_to_the_logits(separable):
    torch.manual_seed(0)
    model = models.cifar_vgg16(num_classes=7, in_channels=1, width=4, separable=separable)
    batch = torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 5, 6])
    logits = model(batch)
    assert logits.shape == (4, 7)
    model.loss(logits, batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_one_can_teach_the_other_stage_by_stage():
    teacher, student = (models.cifar_vgg16(width=4, separable=separable).module for separable in (False, True))
    at = [f'stage{number}' for number in range(1, 6)]
    pairs = BlockPairs(cut(teacher.eval(), at), cut(student, at), torch.randn(2, 3, 32, 32))
    assert len(pairs) == 6 and all(block.into is None and block.out is None for block in pairs.student)


@pytest.mark.parametrize('wrong', [{'width': 0}, {'in_channels': 0}, {'num_classes': 0}])
def test_sizes_that_are_none(wrong):
    with pytest.raises(ValueError, match='cifar_vgg16: num_classes, in_channels and width must be 1 or more'):
        models.cifar_vgg16(**wrong)
