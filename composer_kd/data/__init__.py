"""Builders of data sets: each returns a `composer.core.DataSpec`, or evaluators; `batch_size` is over all ranks."""

from composer_kd.data.classification import text_classification
from composer_kd.data.glue import glue
from composer_kd.data.image_folder import imagenet
from composer_kd.data.loader import data_spec as data_spec  # for data sets of one's own; no name for recipes
from composer_kd.data.masked_text import c4, python_docs, text
from composer_kd.data.sklearn_digits import digits
from composer_kd.data.torchvision_sets import cifar10, cifar100, fashion_mnist

__all__ = [
    'c4',
    'cifar10',
    'cifar100',
    'digits',
    'fashion_mnist',
    'glue',
    'imagenet',
    'python_docs',
    'text',
    'text_classification',
]
