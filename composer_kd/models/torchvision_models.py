"""torchvision's ResNet and VGG families as Composer classifiers, each under torchvision's own name."""

from composer.models import ComposerClassifier
from composer.utils import dist
from torchvision.models import VGG, ResNet, WeightsEnum, get_model, get_model_weights

from composer_kd.download import downloading
from composer_kd.models.classifier import Loss, classifier

_DOC = """torchvision's `{name}` as a classifier of RGB images, shape (batch, 3, height, width).

    Args:
        num_classes: number of classes. Default: 1000.
        weights: name of published weights, downloaded when they are not in torch's cache: {weights}.
            Default: None, a network that has learned nothing yet.
        loss: `cross_entropy` or `binary_cross_entropy`; without weights, the latter starts the bias of the logits at
            -log(num_classes). Default: `cross_entropy`.

    Raises:
        ValueError: no published weights have that name, or they are for another number of classes.
    """


def _published(name: str) -> dict[str, WeightsEnum]:
    """Published weights of a model that end in trained logits, by name: features alone are not a classifier."""
    return {entry.name: entry for entry in get_model_weights(name) if entry.meta['categories']}


def _builder(name: str):
    """Make the function that builds the torchvision model `name`."""

    def build(num_classes: int = 1000, weights: str | None = None, loss: Loss = 'cross_entropy') -> ComposerClassifier:
        entry = None
        if weights is not None:
            published = _published(name)
            if weights not in published:
                raise ValueError(f'{name} has no published weights {weights!r}: known are {", ".join(published)}')
            entry = published[weights]
            classes = len(entry.meta['categories'])
            if num_classes != classes:
                raise ValueError(
                    f'{name} with weights={weights} has {classes} classes, not num_classes={num_classes}: '
                    f'set num_classes={classes}, or leave weights out to train from nothing'
                )
        with downloading(weights):
            module = get_model(name, weights=entry, num_classes=num_classes, progress=dist.get_local_rank() == 0)
        assert isinstance(module, ResNet | VGG)
        head = module.fc if isinstance(module, ResNet) else module.classifier[-1]
        return classifier(module, head, num_classes=num_classes, loss=loss, pretrained=weights is not None)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = _DOC.format(name=name, weights=', '.join(f'`{entry}`' for entry in _published(name)))
    return build


resnet18 = _builder('resnet18')
resnet34 = _builder('resnet34')
resnet50 = _builder('resnet50')
resnet101 = _builder('resnet101')
resnet152 = _builder('resnet152')
resnext50_32x4d = _builder('resnext50_32x4d')
resnext101_32x8d = _builder('resnext101_32x8d')
resnext101_64x4d = _builder('resnext101_64x4d')
wide_resnet50_2 = _builder('wide_resnet50_2')
wide_resnet101_2 = _builder('wide_resnet101_2')
vgg11 = _builder('vgg11')
vgg11_bn = _builder('vgg11_bn')
vgg13 = _builder('vgg13')
vgg13_bn = _builder('vgg13_bn')
vgg16 = _builder('vgg16')
vgg16_bn = _builder('vgg16_bn')
vgg19 = _builder('vgg19')
vgg19_bn = _builder('vgg19_bn')
