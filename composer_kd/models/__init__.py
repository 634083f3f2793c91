"""Builders of networks: each returns a `composer.models.ComposerModel`."""

from composer_kd.models.cifar_resnet import cifar_resnet20, cifar_resnet56
from composer_kd.models.cifar_vgg import cifar_vgg16
from composer_kd.models.convnet import small_convnet
from composer_kd.models.text_models import masked_lm, text_classifier
from composer_kd.models.timm_models import timm
from composer_kd.models.torchvision_models import (
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    vgg11,
    vgg11_bn,
    vgg13,
    vgg13_bn,
    vgg16,
    vgg16_bn,
    vgg19,
    vgg19_bn,
    wide_resnet50_2,
    wide_resnet101_2,
)

__all__ = [
    'cifar_resnet20',
    'cifar_resnet56',
    'cifar_vgg16',
    'masked_lm',
    'resnet18',
    'resnet34',
    'resnet50',
    'resnet101',
    'resnet152',
    'resnext50_32x4d',
    'resnext101_32x8d',
    'resnext101_64x4d',
    'small_convnet',
    'text_classifier',
    'timm',
    'vgg11',
    'vgg11_bn',
    'vgg13',
    'vgg13_bn',
    'vgg16',
    'vgg16_bn',
    'vgg19',
    'vgg19_bn',
    'wide_resnet50_2',
    'wide_resnet101_2',
]
