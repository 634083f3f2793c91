"""A network as a teacher: frozen, in eval mode, on the right device, in the right format."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from composer.core import Precision
from composer.devices import DeviceCPU
from composer.models import ComposerClassifier
from torch import nn

from composer_kd import NetworkTeacher, TeacherError
from composer_kd.normalization import NORMALIZATION
from settings import CLASSES, classifier, network

STATE = SimpleNamespace(device=DeviceCPU(), precision=Precision.FP32, precision_config=None)
IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BATCH = (IMAGES, torch.zeros(4, dtype=torch.long))


def ready(*args, **kwargs):
    teacher = NetworkTeacher(*args, **kwargs)
    teacher.prepare(STATE)
    return teacher


@pytest.mark.parametrize('make', [network, classifier])
def test_says_what_the_network_says_in_eval_mode(make):
    model = make(1, dropout=0.5).train()
    expected = copy.deepcopy(model).eval()(IMAGES if make is network else BATCH)
    logits = ready(model).signal(BATCH)
    assert torch.equal(logits, expected) and not logits.requires_grad
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_batch_norm_keeps_its_statistics():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, CLASSES))
    before = copy.deepcopy(model.state_dict())
    teacher = ready(model)
    teacher.signal(BATCH)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_mapping_is_heard_without_its_labels():
    class Words(nn.Module):
        def forward(self, ids, mask):
            return {'logits': (ids * mask).float()}

    batch = {'ids': torch.ones(2, 3), 'mask': torch.ones(2, 3), 'labels': torch.zeros(2)}
    assert torch.equal(ready(Words()).signal(batch), torch.ones(2, 3))
    assert set(batch) == {'ids', 'mask', 'labels'}


def test_outputs_without_logits_are_refused():
    class Boxes(nn.Module):
        def forward(self, images):
            return {'boxes': images}

    with pytest.raises(TeacherError, match='a mapping with `logits`, but the model returned dict'):
        ready(Boxes()).signal(BATCH)


def test_renormalizes_images_for_itself():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64)

    def normalized(mean, std):
        return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    teacher = ready(nn.Identity(), normalization='imagenet', student_normalization=(mean, std))
    batch = (normalized(mean, std).float(), None)
    before = batch[0].clone()
    torch.testing.assert_close(teacher.signal(batch), normalized(*NORMALIZATION['imagenet']).float())
    assert torch.equal(batch[0], before)


def test_dtype_and_channels_last():
    seen = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, CLASSES))
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits = ready(model, dtype='bfloat16', channels_last=True).signal((torch.randn(2, 3, 8, 8), None))
    assert logits.dtype == seen[0].dtype == torch.bfloat16
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('size, shape', [(4, (4, 4)), (12, (12, 12)), ([4, 6], (4, 6)), (8, (8, 8))])
def test_images_of_its_own_size(size, shape):
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1], CLASSES))
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    before = IMAGES.clone()
    assert ready(model, input_size=size).signal(BATCH).shape == (4, CLASSES)
    expected = F.interpolate(IMAGES, shape, mode='bilinear', antialias=True) if shape != (8, 8) else IMAGES
    assert torch.equal(seen[0], expected) and torch.equal(IMAGES, before)


def test_a_size_is_of_images():
    with pytest.raises(TeacherError, match=r'input_size, which is for images .* inputs of shape \[4, 64\]'):
        ready(nn.Linear(64, CLASSES), input_size=8).signal((torch.zeros(4, 64), None))


def test_passes_are_counted():
    teacher = ready(network(1))
    assert teacher.forwards == 0 and teacher.replays is False
    teacher.signal(BATCH)
    teacher.signal(BATCH, torch.zeros(4, 2, dtype=torch.long))
    assert teacher.forwards == 2
    assert isinstance(teacher.network, nn.Module)
    teacher.release()
    assert teacher.forwards == 2 and teacher.network is None


def test_its_own_precision():
    with pytest.raises(ValueError, match='amp_bf17'):
        NetworkTeacher(network(1), precision='amp_bf17')
    teacher = NetworkTeacher(network(1), precision='amp_bf16')
    teacher.prepare(STATE)
    assert teacher.signal(BATCH).dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)


@pytest.mark.filterwarnings('ignore')  # torch.compile's own
def test_compiled():
    model = network(1)
    expected = copy.deepcopy(model).eval()(IMAGES)
    torch.testing.assert_close(ready(model, compile=True).signal(BATCH), expected)


def test_manifest_is_of_the_weights_alone():
    plain, wrapped = NetworkTeacher(network(1)), NetworkTeacher(classifier(1), name='wrapped')
    assert plain.manifest() | {'name': 'wrapped'} == wrapped.manifest()
    assert plain.manifest()['sha256'] != NetworkTeacher(network(2)).manifest()['sha256']
    assert ready(network(1), compile=False, channels_last=True).manifest() == plain.manifest()


MEAN_AND_STD = [0.5], [0.25]


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({}, {}),
        ({'dtype': 'bfloat16'}, {'dtype': 'bfloat16'}),
        ({'precision': 'fp32'}, {'precision': 'fp32'}),
        ({'input_size': 14}, {'input_size': [14, 14]}),
        ({'normalization': MEAN_AND_STD, 'student_normalization': MEAN_AND_STD}, {}),
        (
            {'normalization': MEAN_AND_STD, 'student_normalization': ([0.0], [1.0])},
            {'normalization': [[0.5], [0.25]], 'student_normalization': [[0.0], [1.0]]},
        ),
    ],
)
def test_manifest_has_the_options_that_decide_the_answers(options, expected):
    teacher = ready(network(1), **options)
    assert teacher.manifest()['options'] == expected
    assert {**teacher.manifest(), 'options': {}} == NetworkTeacher(network(1)).manifest()


def test_released_is_released():
    teacher = ready(network(1))
    manifest = teacher.manifest()
    teacher.release()
    teacher.release()
    assert teacher.manifest() == manifest
    with pytest.raises(TeacherError, match='after release'):
        teacher.signal(BATCH)
    with pytest.raises(TeacherError, match='was released when distillation stopped'):
        teacher.prepare(STATE)


def test_class_counts_are_compared():
    teacher = NetworkTeacher(ComposerClassifier(nn.Linear(1, 7), num_classes=7))
    with pytest.raises(TeacherError, match='teacher Linear has 7 classes, the student 5'):
        teacher.check(classifier(1))


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'sha256': 'ab'}, 'sha256 is of a checkpoint'),
        ({'dtype': 'bfloat17'}, 'dtype must name a floating point dtype of torch'),
        ({'dtype': 'int8'}, 'dtype must name a floating point dtype of torch'),
        ({'input_size': 0}, r'input_size is a number of pixels, or \(height, width\), not 0'),
        ({'input_size': (8, 8, 8)}, 'input_size is a number of pixels'),
        ({'input_size': 7.5}, 'input_size is a number of pixels'),
        ({'normalization': 'imagenet'}, 'belong together'),
        ({'normalization': 'imagenette', 'student_normalization': 'imagenet'}, "unknown normalization 'imagenette'"),
        ({'normalization': ([0.5], [0.5]), 'student_normalization': 'imagenet'}, 'has 1 channels'),
        ({'normalization': ([0.5], [0.0]), 'student_normalization': 'imagenet'}, 'std > 0'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NetworkTeacher(network(1), **arguments)
