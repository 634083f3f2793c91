"""Any image classifier of the library timm, an optional extra of this package."""

import difflib
from typing import Any

from composer.models import ComposerClassifier

from composer_kd.download import downloading
from composer_kd.models.classifier import Loss, classifier


def timm(
    model_name: str,
    num_classes: int = 1000,
    pretrained: bool = False,
    in_channels: int = 3,
    loss: Loss = 'cross_entropy',
) -> ComposerClassifier:
    """The timm model `model_name` as a classifier of images (batch, in_channels, height, width).

    Args:
        model_name: timm's name, with or without the tag of its weights (`resnet50`, `resnet50.a1_in1k`).
        num_classes: number of classes. Default: 1000.
        pretrained: whether to load the published weights, downloaded when they are not in the cache. Default: False.
        in_channels: 1 for grey images, 3 for RGB. Default: 3.
        loss: `cross_entropy` or `binary_cross_entropy`; unless pretrained, the latter starts the bias of the logits at
            -log(num_classes). Default: `cross_entropy`.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm knows no such model, or its weights are for another number of classes.
    """
    try:
        import timm as library
    except ImportError as error:
        raise ImportError(f'the model timm/{model_name} needs timm: pip install composer-kd[timm]') from error

    if ':' not in model_name and not library.is_model(model_name):
        near = difflib.get_close_matches(model_name, library.list_models(), n=3)
        hint = f': did you mean {" or ".join(near)}?' if near else ': timm.list_models() lists its names'
        raise ValueError(f'timm {library.__version__} knows no model {model_name!r}{hint}')
    with downloading(pretrained):
        module: Any = library.create_model(
            model_name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels
        )
    if pretrained:
        # timm would replace the head by an untrained one: a teacher that has learned nothing, without a word.
        classes = module.pretrained_cfg['num_classes']
        if classes != num_classes:
            raise ValueError(
                f'the weights of timm/{model_name} have {classes} classes, not num_classes={num_classes}: '
                f'set num_classes={classes}, or pretrained=false to train from nothing'
            )
    return classifier(module, module.get_classifier(), num_classes=num_classes, loss=loss, pretrained=pretrained)
