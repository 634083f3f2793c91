"""Builders of data sets: each returns a `composer.core.DataSpec`; `batch_size` is over all ranks."""

from composer_kd.data.image_folder import imagenet
from composer_kd.data.sklearn_digits import digits
from composer_kd.data.torchvision_sets import cifar10, cifar100, fashion_mnist

__all__ = ['cifar10', 'cifar100', 'digits', 'fashion_mnist', 'imagenet']
