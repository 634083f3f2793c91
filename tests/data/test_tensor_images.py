import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_kd.data.tensor_images import TensorImages, crop_and_flip, random_images
from composer_kd.data.views import BatchRandom, as_keys


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_every_image_is_a_crop_of_its_padded_self(batch, channels, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)
    out = crop_and_flip(images, BatchRandom(seed, as_keys([*range(batch)])))
    assert out.dtype == torch.uint8
    padded = F.pad(images, (4, 4, 4, 4))
    for source, image in zip(padded, out, strict=True):
        crops = [source[:, y : y + height, x : x + width] for y in range(9) for x in range(9)]
        assert any(torch.equal(image, crop) or torch.equal(image, crop.flip(2)) for crop in crops)


def test_shifts_and_mirrors_are_uniform_and_one_per_image():
    """One bright pixel per image tells the shift and whether it was mirrored."""
    images = torch.zeros(20_000, 2, 11, 11, dtype=torch.uint8)
    images[:, :, 5, 4] = 1  # moves to column 4 - shift, or mirrored to 6 + shift
    out = crop_and_flip(images, BatchRandom(0, as_keys([*range(20_000)])))
    assert torch.equal(out[:, 0], out[:, 1])
    _, rows, columns = out[:, 0].nonzero(as_tuple=True)
    counts = torch.zeros(11, 11).index_put((rows, columns), torch.ones(len(rows)), accumulate=True)
    vertical = counts.sum(dim=1)[1:10]
    assert vertical.sum() == 20_000
    assert (vertical / 20_000 - 1 / 9).abs().max() < 0.007
    # Shifts -4..4 put the pixel in columns 0..8 as it is and in 2..10 mirrored, half of the images each.
    expected = torch.tensor([1, 1, 2, 2, 2, 2, 2, 2, 2, 1, 1]) / 18
    assert (counts.sum(dim=0) / 20_000 - expected).abs().max() < 0.007


def test_a_batch_is_its_samples():
    images, labels = random_images((3, 6, 6), 10)
    dataset = TensorImages(images, labels, normalize=lambda pixels: pixels / 255)
    batch, batch_labels = dataset.__getitems__([5, 0, 5])
    for row, index in enumerate((5, 0, 5)):
        image, label = dataset[index]
        assert torch.equal(batch[row], image)
        assert torch.equal(image, images[index] / 255)
        assert batch_labels[row] == label == labels[index]


def test_an_image_is_augmented_alike_in_every_batch():
    images, labels = random_images((3, 6, 6), 10)
    dataset = TensorImages(images, labels, augment=crop_and_flip, seed=2)
    state = torch.get_rng_state()
    batch, _ = dataset.__getitems__([(index, 4) for index in range(64)])
    for index in (63, 5):
        assert torch.equal(batch[index], dataset[index, 4][0])
    for other in (
        dataset.__getitems__([(index, 5) for index in range(64)]),
        dataset.__getitems__([*range(64)]),
        TensorImages(images, labels, augment=crop_and_flip).__getitems__([(index, 4) for index in range(64)]),
    ):
        assert sum(torch.equal(*pair) for pair in zip(batch, other[0], strict=True)) < 8
    assert torch.equal(dataset[5][0], dataset[5, 0][0])
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_of_one_image_are_augmented_each_in_its_own_way():
    images, labels = random_images((3, 6, 6), 10)
    dataset = TensorImages(images, labels, augment=crop_and_flip, length=5120)
    batch, _ = dataset.__getitems__([(index, 0) for index in range(7, 5120, 512)])
    assert len({image.numpy().tobytes() for image in batch}) > 5


def test_a_pool_returns_in_turn():
    images, labels = random_images((1, 2, 2), 10)
    dataset = TensorImages(images, labels, length=3000)
    assert len(dataset) == 3000
    batch, batch_labels = dataset.__getitems__([0, 512, 2999])
    assert torch.equal(batch, images[[0, 0, 2999 % 512]])
    assert torch.equal(batch_labels, labels[[0, 0, 2999 % 512]])


def test_noise_is_the_same_everywhere_and_leaves_the_random_state_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = random_images((3, 4, 4), 10)
    torch.rand(1)
    second = random_images((3, 4, 4), 10)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.set_rng_state(state)
    random_images((3, 4, 4), 10)
    assert torch.equal(torch.get_rng_state(), state)
