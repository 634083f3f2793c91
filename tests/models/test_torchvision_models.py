import hashlib
import inspect
import math
import pickle

import pytest
import torch
import torchvision
from composer.models import ComposerClassifier

from composer_kd import models
from composer_kd.models import torchvision_models

NAMES = [name for name in models.__all__ if name.startswith(('resne', 'wide_', 'vgg'))]


@pytest.mark.parametrize('name', NAMES)
def test_has_the_published_number_of_parameters(name):
    build = getattr(models, name)
    with torch.device('meta'):
        model = build()
    published = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta
    assert isinstance(model, ComposerClassifier)
    assert model.num_classes == 1000
    assert sum(p.numel() for p in model.parameters()) == published['num_params']


@pytest.mark.parametrize('name', NAMES)
def test_is_a_function_of_its_own(name):
    build = getattr(models, name)
    assert build.__name__ == name
    assert f'`{name}`' in build.__doc__
    assert '`IMAGENET1K_V1`' in build.__doc__
    assert list(inspect.signature(build).parameters) == ['num_classes', 'weights', 'loss']
    assert pickle.loads(pickle.dumps(build)) is build


def test_names_are_all_of_both_families():
    families = torchvision.models.list_models(module=torchvision.models, include=['*resne*t*', 'vgg*'])
    assert set(NAMES) == set(families)


@pytest.mark.parametrize('name', ['resnet18', 'vgg11'])
def test_binary_cross_entropy_starts_at_one_in_num_classes(name):
    with torch.device('meta'):
        model = getattr(models, name)(num_classes=20, loss='binary_cross_entropy')
    head = model.module.fc if name == 'resnet18' else model.module.classifier[-1]
    assert head.bias.shape == (20,)

    model = models.resnet18(num_classes=20, loss='binary_cross_entropy').eval()
    batch = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    with torch.no_grad():
        model.module.fc.weight.zero_()
        logits = model(batch)
    torch.testing.assert_close(logits.sigmoid(), torch.full((2, 20), 1 / 21))
    expected = -(math.log(1 / 21) + 19 * math.log(20 / 21))
    assert model.loss(logits, batch).item() == pytest.approx(expected, rel=1e-5)


def test_unknown_weights_name_the_known_ones():
    with pytest.raises(
        ValueError, match=r"resnet50 has no published weights 'IMAGENET': .*IMAGENET1K_V1, IMAGENET1K_V2"
    ):
        models.resnet50(weights='IMAGENET')
    # Features without trained logits, and a name that stands for another file in the next release, are no weights here.
    for weights in ('IMAGENET1K_FEATURES', 'DEFAULT'):
        with pytest.raises(ValueError, match=r'known are IMAGENET1K_V1$'):
            models.vgg16(weights=weights)


def test_weights_for_another_number_of_classes():
    with pytest.raises(ValueError, match='has 1000 classes, not num_classes=10'):
        models.resnet18(num_classes=10, weights='IMAGENET1K_V1')


def test_unknown_loss():
    with torch.device('meta'), pytest.raises(ValueError, match="unknown loss 'hinge': choose cross_entropy or binary"):
        models.resnet18(loss='hinge')


def test_loads_published_weights_by_name(tmp_path, monkeypatch):
    torch.manual_seed(1)
    source = torchvision.models.resnet18()
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    digest = hashlib.sha256((tmp_path / 'weights.pth').read_bytes()).hexdigest()[:8]
    file = (tmp_path / 'weights.pth').rename(tmp_path / f'resnet18-{digest}.pth')
    published = torchvision_models._published('resnet18')['IMAGENET1K_V1']
    monkeypatch.setattr(published.value, 'url', file.as_uri())
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))

    model = models.resnet18(weights='IMAGENET1K_V1', loss='binary_cross_entropy')

    loaded = model.module.state_dict()
    for key, value in source.state_dict().items():
        torch.testing.assert_close(loaded[key], value, rtol=0, atol=0)
