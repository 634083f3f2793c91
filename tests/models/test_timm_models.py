import sys

import pytest
import torch

from composer_kd import models

library = pytest.importorskip('timm', reason='the optional extra `timm` is not installed')


def test_builds_a_classifier():
    model = models.timm('resnet10t', num_classes=5, in_channels=1, loss='binary_cross_entropy')
    assert model.num_classes == 5
    assert model((torch.randn(2, 1, 32, 32), None)).shape == (2, 5)
    torch.testing.assert_close(model.module.fc.bias, torch.full((5,), 0.2).log())


def test_loads_weights_and_refuses_them_for_other_classes(tmp_path):
    torch.manual_seed(1)
    source = library.create_model('resnet10t', num_classes=5)
    library.models._hub.save_for_hf(source, tmp_path, safe_serialization=False)
    name = f'local-dir:{tmp_path}'

    model = models.timm(name, num_classes=5, pretrained=True, loss='binary_cross_entropy')
    loaded = model.module.state_dict()
    for key, value in source.state_dict().items():
        torch.testing.assert_close(loaded[key], value, rtol=0, atol=0)

    with pytest.raises(ValueError, match='have 5 classes, not num_classes=10'):
        models.timm(name, num_classes=10, pretrained=True)


def test_unknown_name_suggests_near_ones():
    with pytest.raises(ValueError, match=r"knows no model 'resnet5O': did you mean .*resnet50"):
        models.timm('resnet5O')


def test_bias_that_is_not_there():
    with pytest.raises(ValueError, match='ResNet has no bias at its logits'):
        models.timm('resnet10t', num_classes=0, loss='binary_cross_entropy')


def test_without_timm_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ImportError, match=r'pip install composer-kd\[timm\]'):
        models.timm('resnet10t')
