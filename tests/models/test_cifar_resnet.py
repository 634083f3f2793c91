import pytest
import torch
from torch import nn

from composer_kd import models


# He et al. 2015, table 6, gives the layers and millions of parameters.
@pytest.mark.parametrize(
    ('build', 'layers', 'millions'), [(models.cifar_resnet20, 20, 0.27), (models.cifar_resnet56, 56, 0.85)]
)
def test_size_is_the_papers(build, layers, millions):
    model = build()
    weighted = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(weighted) == layers
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert model.num_classes == 10


def test_trains_from_every_layer_to_the_logits():
    torch.manual_seed(0)
    model = models.cifar_resnet20(num_classes=100, width=4)
    batch = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 98, 99])
    logits = model(batch)
    assert logits.shape == (4, 100)
    model.loss(logits, batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_shortcut_is_option_a():
    """With the residual branch silenced, a block that widens subsamples by two and adds channels of zeros."""
    block = models.cifar_resnet20(width=4).module.blocks[3].eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 6, 6)
    out = block(x)
    assert out.shape == (2, 8, 3, 3)
    torch.testing.assert_close(out[:, :4], x[:, :, ::2, ::2], rtol=0, atol=0)
    assert out[:, 4:].abs().max() == 0


def test_binary_cross_entropy_bias():
    model = models.cifar_resnet20(loss='binary_cross_entropy')
    torch.testing.assert_close(model.module.fc.bias, torch.full((10,), 0.1).log())
