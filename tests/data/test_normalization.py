import pytest
import torch

from composer_kd import data
from composer_kd.data.normalization import NORMALIZATION, Normalize
from helpers import unpack_fashion_mnist


@pytest.mark.parametrize('name', NORMALIZATION)
@pytest.mark.parametrize('channels_last', [False, True])
def test_matches_the_formula(name, channels_last):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in NORMALIZATION[name])
    pixels = torch.randint(256, (2, mean.numel(), 5, 4), dtype=torch.uint8)
    expected = (pixels.double() / 255 - mean) / std

    out = Normalize(name, channels_last=channels_last)(pixels)

    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=memory_format)


def test_leaves_its_argument_alone():
    pixels = torch.rand(2, 3, 4, 4) * 255
    before = pixels.clone()
    Normalize('imagenet')(pixels)
    assert torch.equal(pixels, before)


def test_constants_are_those_of_the_digits():
    spec = data.digits('train', 1297)
    images, _ = next(iter(spec.dataloader))
    assert images.mean().abs() < 1e-3
    assert (images.std(correction=0) - 1).abs() < 1e-3


def test_constants_are_those_of_fashion_mnist(tmp_path):
    dataset = data.fashion_mnist('train', 60_000, data_dir=unpack_fashion_mnist(tmp_path)).dataloader.dataset
    pixels = dataset.images.double() / 255
    (mean,), (std,) = NORMALIZATION['fashion_mnist']
    assert pixels.mean().item() == pytest.approx(mean, abs=5e-5)
    assert pixels.std(correction=0).item() == pytest.approx(std, abs=5e-5)
