"""Pairs of blocks: what each learns, and adapters where widths differ."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from composer_kd.blockwise.blocks import cut
from composer_kd.blockwise.pairs import BlockPairs


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(17)


def convnet(width, *, last=3, padding_mode='zeros'):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, padding_mode=padding_mode),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, last),
    )


X = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)


def pairs_of(teacher, student, at, **options):
    return BlockPairs(cut(teacher, at), cut(student, at), X, **options)


def test_blocks_learn_what_the_teacher_makes_of_its_own_activations():
    teacher, student = convnet(4), convnet(4)
    pairs = pairs_of(teacher, student, ['1', '3'], label_weight=0.5)
    a = [X]
    for block in pairs.teacher:
        a.append(block(a[-1]))
    labels = torch.tensor([0, 2])
    given = [block(x) for block, x in zip(pairs.student, a, strict=False)]
    of = [pairs.losses(n, student=given[n], teacher=a[n + 1], labels=labels) for n in range(3)]
    first = student[1](student[0](X))
    assert torch.equal(of[0], F.mse_loss(first, teacher[1](teacher[0](X))))
    soft = a[3].softmax(1)
    expected = F.cross_entropy(given[2], soft) - F.cross_entropy(a[3], soft) + 0.5 * F.cross_entropy(given[2], labels)
    torch.testing.assert_close(of[2], expected)
    gradient = torch.autograd.grad(of[2], given[2], retain_graph=True)[0]
    of_both = F.cross_entropy(given[2], soft) + 0.5 * F.cross_entropy(given[2], labels)
    torch.testing.assert_close(gradient, torch.autograd.grad(of_both, given[2])[0])


def test_no_gradient_reaches_the_teacher_or_another_block():
    teacher, student = convnet(4), convnet(4)
    pairs = pairs_of(teacher, student, ['1', '3'])
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    x = teacher[1](teacher[0](X))
    pairs.losses(1, student=pairs.student[1](x), teacher=teacher[3](teacher[2](x))).backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is not None] == [
        '2.weight',
        '2.bias',
    ]


def test_normalized_and_cosine():
    student, teacher = torch.randn(4, 5, 3, 3), torch.randn(4, 5, 3, 3)
    given = {'student': student, 'teacher': teacher}
    normalized = pairs_of(convnet(4), convnet(4), ['1'], loss='normalized_mse').losses(0, **given)
    torch.testing.assert_close(normalized, ((student - teacher) ** 2).sum() / (teacher**2).sum())
    cosine = pairs_of(convnet(4), convnet(4), ['1'], loss='cosine').losses(0, **given)
    by_hand = (student * teacher).sum(1) / (student.norm(dim=1) * teacher.norm(dim=1))
    torch.testing.assert_close(cosine, 1 - by_hand.mean())
    flat = pairs_of(convnet(4), convnet(4), ['1'], loss='cosine').losses(
        0, student=student[:, :, 0, 0], teacher=teacher[:, :, 0, 0]
    )
    torch.testing.assert_close(flat, 1 - by_hand[:, 0, 0].mean())


def test_a_target_of_zeros_is_no_reason_for_nan():
    pairs = pairs_of(convnet(4), convnet(4), ['1'], loss='normalized_mse')
    assert pairs.losses(0, student=torch.zeros(2, 3), teacher=torch.zeros(2, 3)) == 0


def test_adapters_are_folded_into_the_student():
    """The student's own layers then give what they gave with the adapters in between, in float64."""
    teacher, student = convnet(6).double(), convnet(4).double()
    untouched = copy.deepcopy(student)
    pairs = BlockPairs(cut(teacher, ['1', '3']), cut(student, ['1', '3']), X.double())
    for block in pairs.student:
        block.double()
        for adapter in (block.into, block.out):
            if adapter is not None:
                nn.init.normal_(adapter.weight)
    x = X.double()
    assert [block(x).shape[1] for block in pairs.student[:1]] == [6]
    expected = x
    for block in pairs.student:
        expected = block(expected)
    pairs.fold()
    assert all(block.into is None and block.out is None for block in pairs.student)
    torch.testing.assert_close(student(x), expected, rtol=1e-12, atol=1e-12)
    assert {name: tensor.shape for name, tensor in student.state_dict().items()} == {
        name: tensor.shape for name, tensor in untouched.state_dict().items()
    }
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    pairs.fold()
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_adapters_of_flat_activations():
    teacher, student = (nn.Sequential(nn.Linear(5, w), nn.ReLU(), nn.Linear(w, 3)).double() for w in (7, 4))
    x = torch.randn(6, 5, dtype=torch.float64)
    pairs = BlockPairs(cut(teacher, ['1']), cut(student, ['1']), x)
    for block in pairs.student:
        block.double()
    expected = pairs.student[1](pairs.student[0](x))
    pairs.fold()
    torch.testing.assert_close(student(x), expected, rtol=1e-12, atol=1e-12)


def test_adapters_are_a_function_of_their_seed():
    weights = [pairs_of(convnet(6), convnet(4), ['1'], seed=seed).student[0].out.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_student_and_the_generators_stay_as_they_are():
    teacher, student = convnet(6), convnet(4)
    before, state = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    student.train()
    pairs_of(teacher, student, ['1'])
    assert torch.equal(torch.get_rng_state(), state) and student.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


BAD = {
    'other numbers of blocks': (convnet(4), ['1', '3'], convnet(4), ['1'], r'cut into 3 blocks, the student into 2'),
    'other shapes': (
        *(convnet(4), ['1'], nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(6, 3)), ['0']),
        r'after block 0 the teacher has samples of shape \[4, 8, 8\], the student \[4, 6, 6\]: these may differ in',
    ),
    'other classes': (
        *(convnet(4), ['1'], convnet(4, last=5), ['1']),
        r'after block 1 the teacher has samples of shape \[3\], the student \[5\]: both must know the same classes',
    ),
    'no layer to fold into': (
        *(convnet(6), ['2'], convnet(4), ['2']),
        r'after block 0 .* put into the convolutions or linear layers that come next in the student, but something',
    ),
    'padding that is not of zeros': (
        *(convnet(6), ['1'], convnet(4, padding_mode='reflect'), ['1']),
        r'put into the convolutions',
    ),
    'nothing to learn': (
        convnet(4),
        ['1', '2', '3'],
        convnet(4),
        ['1', '2', '3'],
        r'block 2 of the student has no weights',
    ),
}


@pytest.mark.parametrize(('teacher', 'at', 'student', 'of_student', 'message'), BAD.values(), ids=BAD)
def test_blocks_that_do_not_pair(teacher, at, student, of_student, message):
    with pytest.raises(ValueError, match=message):
        BlockPairs(cut(teacher, at), cut(student, of_student), X)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'loss': 'l1'}, "unknown loss of blocks 'l1': choose mse"),
        ({'label_weight': -1.0}, 'must be 0 or more, not -1'),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        pairs_of(convnet(4), convnet(4), ['1'], **options)
