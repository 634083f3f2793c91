import pytest
import torch
from sklearn.datasets import load_digits

from composer_kd import data


def test_splits_are_fixed_stratified_and_all_of_the_digits():
    train = data.digits('train', 64).dataloader.dataset
    test = data.digits('test', 64).dataloader.dataset
    assert (len(train), len(test)) == (1297, 500)
    assert test.labels.bincount().tolist() == [50, 51, 49, 51, 50, 51, 50, 50, 48, 50]
    assert test.labels[:20].tolist() == [4, 8, 8, 3, 9, 0, 6, 3, 9, 8, 4, 5, 6, 7, 3, 7, 6, 5, 4, 2]
    pixels = torch.cat([train.images, test.images]).flatten(1)
    everything = torch.as_tensor(load_digits().data, dtype=torch.uint8)
    assert torch.equal(pixels.unique(dim=0), everything.unique(dim=0))


def test_batches_are_normalized_images():
    images, labels = next(iter(data.digits('test', 64).dataloader))
    assert images.shape == (64, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    # From black to white, at the mean 0.3052 and standard deviation 0.3760 of the training split.
    torch.testing.assert_close(images.min(), torch.tensor(-0.3052 / 0.3760))
    torch.testing.assert_close(images.max(), torch.tensor((1 - 0.3052) / 0.3760))


@pytest.mark.parametrize(('subset', 'samples'), [(100, 100), (5000, 1297), (0.25, 324), (1.0, 1297), (1e-9, 1)])
def test_a_subset_is_the_first_of_them_and_mixed(subset, samples):
    spec = data.digits('train', 1, subset=subset)
    assert spec.num_samples == samples
    drawn = torch.cat([labels for _, labels in spec.dataloader])
    assert torch.equal(drawn.sort().values, spec.dataloader.dataset.labels[:samples].sort().values)
    assert samples == 1 or len(drawn.unique()) == 10


@pytest.mark.parametrize('subset', [0, -5, 1, 1.5, 0.0])
def test_a_subset_that_is_none(subset):
    with pytest.raises(ValueError, match=r'^subset') as caught:
        data.digits('train', 1, subset=subset)
    assert str(subset) in str(caught.value)
