import inspect

import pytest
import typeguard
from composer.models import ComposerClassifier

from composer_kd import models

TEXT = ['masked_lm', 'text_classifier']


@pytest.mark.parametrize('name', [name for name in models.__all__ if name not in TEXT])
def test_signature_can_check_arguments(name):
    signature = inspect.signature(getattr(models, name))
    assert signature.return_annotation is ComposerClassifier
    assert {'num_classes', 'loss'} <= set(signature.parameters)
    for parameter in signature.parameters.values():
        if parameter.default is not parameter.empty:
            typeguard.check_type(parameter.default, parameter.annotation)
    for argument, value in (('num_classes', 'ten'), ('loss', 'hinge')):
        with pytest.raises(typeguard.TypeCheckError):
            typeguard.check_type(value, signature.parameters[argument].annotation)
