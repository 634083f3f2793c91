import pytest
import torch
from torch import nn

from composer_kd import models

NORMS = {'batch': nn.BatchNorm2d, 'group': nn.GroupNorm, 'none': None}


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize(('in_channels', 'side'), [(1, 8), (1, 28), (3, 32)])
def test_trains_from_every_layer_to_the_logits(norm, in_channels, side):
    torch.manual_seed(0)
    model = models.small_convnet(num_classes=7, in_channels=in_channels, width=6, depth=2, norm=norm)
    batch = torch.randn(8, in_channels, side, side), torch.arange(8) % 7
    logits = model(batch)
    assert logits.shape == (8, 7)
    assert model.num_classes == 7
    model.loss(logits, batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(('norm', 'layer'), NORMS.items())
def test_norm_is_the_one_asked_for(norm, layer):
    found = {type(m) for m in models.small_convnet(norm=norm).modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)}
    assert found == ({layer} if layer else set())


@pytest.mark.parametrize(('norm', 'same'), [('batch', False), ('group', True), ('none', True)])
def test_samples_are_independent_without_batch_norm(norm, same):
    torch.manual_seed(0)
    model = models.small_convnet(norm=norm).train()
    images = torch.randn(8, 1, 8, 8)
    whole = model((images, None))
    alone = torch.cat([model((image, None)) for image in images.split(2)])
    assert torch.allclose(whole, alone, atol=1e-5) == same


def test_width_and_depth():
    convs = [m for m in models.small_convnet(width=8, depth=3).modules() if isinstance(m, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [8] * 3 + [16] * 3 + [32] * 3
    assert [conv.stride[0] for conv in convs] == [2, 1, 1] * 3


def test_refuses_what_it_cannot_build():
    with pytest.raises(ValueError, match="unknown norm 'layer': choose batch, group or none"):
        models.small_convnet(norm='layer')
    with pytest.raises(ValueError, match='must be 1 or more'):
        models.small_convnet(depth=0)
