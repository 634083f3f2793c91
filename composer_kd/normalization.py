"""Mean and standard deviation of each image data set's channels."""

NORMALIZATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    'cifar10': ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    'cifar100': ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    'fashion_mnist': ((0.2860,), (0.3530,)),
    'digits': ((0.3052,), (0.3760,)),
}
"""Data set -> (mean, std) of each channel over its training split, of pixels between 0 and 1.

The values for ImageNet are those that torchvision's published networks were trained with; a test measures those of
Fashion-MNIST and of the digits.
"""
