"""Every row of the translation table in docs/losses.md, checked on the peer itself: value and gradient, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from composer_kd import losses

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings('ignore')]  # A peer's warnings are its own affair.

N, L, C, T = 6, 5, 7, 4.0
LABEL, KD = 0.1, 0.9


class Scores(nn.Module):
    """A network whose output is its one parameter."""

    num_classes, in_chans, pretrained_cfg = C, 3, {'mean': (0.5,) * 3, 'std': (0.5,) * 3}

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, inputs):
        return self.logits


def make(*shape):
    generator = torch.Generator().manual_seed(17)
    student, teacher = 3 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return Scores(student), Scores(teacher), torch.randint(C, shape[:1], generator=generator)


def check(theirs, ours, student, constant=0.0):
    (their_grad,) = torch.autograd.grad(theirs, student.logits)
    (our_grad,) = torch.autograd.grad(ours, student.logits)
    torch.testing.assert_close(theirs, ours + constant, rtol=1e-12, atol=0)
    torch.testing.assert_close(their_grad, our_grad, rtol=1e-10, atol=1e-14)


# torchdistill: losses.mid_level.KDLoss


def torchdistill(student, teacher, labels=None, **options):
    kd_loss = pytest.importorskip('torchdistill.losses.mid_level').KDLoss(
        '.', 'output', '.', 'output', temperature=T, **options
    )
    return kd_loss({'.': {'output': student.logits}}, {'.': {'output': teacher.logits.detach()}}, labels)


def test_torchdistill_with_alpha():
    student, teacher, labels = make(N, C)
    theirs = torchdistill(student, teacher, labels, alpha=LABEL)
    kl = losses.kl(student_logits=student.logits, teacher_logits=teacher.logits, temperature=T)
    check(theirs, LABEL * F.cross_entropy(student.logits, labels) + (1 - LABEL) * kl, student)


def test_torchdistill_with_alpha_and_beta():
    student, teacher, labels = make(N, C)
    theirs = torchdistill(student, teacher, labels, alpha=LABEL, beta=0.5)
    kl = losses.kl(student_logits=student.logits, teacher_logits=teacher.logits, temperature=T)
    check(theirs, LABEL * F.cross_entropy(student.logits, labels) + 0.5 * kl, student)


def test_torchdistill_with_alpha_0_leaves_out_t_squared_and_beta():
    student, teacher, labels = make(N, C)
    theirs = torchdistill(student, teacher, labels, alpha=0, beta=0.5)
    kl = losses.kl(student_logits=student.logits, teacher_logits=teacher.logits, temperature=T)
    check(theirs, kl / T**2, student)


def test_torchdistill_sums_over_pixels():
    student, teacher, _ = make(N, C, L, L)
    theirs = torchdistill(student, teacher, alpha=0)
    kl = losses.kl(student_logits=student.logits, teacher_logits=teacher.logits, temperature=T, axis=1)
    check(theirs, L * L * kl / T**2, student)


# TextBrewer: BasicDistiller


def textbrewer(tmp_path, student, teacher, mask=None, **options):
    module = pytest.importorskip('textbrewer')
    distiller = module.BasicDistiller(
        module.TrainingConfig(device='cpu', output_dir=str(tmp_path)),
        module.DistillationConfig(temperature=T, **options),
        model_T=teacher,
        model_S=student,
        adaptor_T=None,
        adaptor_S=None,
    )
    of_student, of_teacher = {'logits': [student.logits]}, {'logits': [teacher.logits.detach()]}
    if mask is not None:
        of_student['logits_mask'] = of_teacher['logits_mask'] = [mask]
    return distiller, of_student, of_teacher


def test_textbrewer_ce_is_kl_plus_the_teachers_entropy_without_t_squared(tmp_path):
    student, teacher, labels = make(N, C)
    options = {'kd_loss_type': 'ce', 'kd_loss_weight': KD * T**2, 'hard_label_weight': LABEL}
    distiller, of_student, of_teacher = textbrewer(tmp_path, student, teacher, **options)
    of_student['losses'] = [F.cross_entropy(student.logits, labels)]
    theirs, _ = distiller.compute_loss(of_student, of_teacher)
    kl = losses.kl(student_logits=student.logits, teacher_logits=teacher.logits, temperature=T)
    entropy = torch.distributions.Categorical(logits=teacher.logits.detach() / T).entropy().mean()
    ours = LABEL * F.cross_entropy(student.logits, labels) + KD * kl
    check(theirs, ours, student, constant=KD * T**2 * entropy)


def test_textbrewer_mse_divides_logits_by_t(tmp_path):
    student, teacher, _ = make(N, C)
    options = {'kd_loss_type': 'mse', 'kd_loss_weight': KD * T**2}
    distiller, of_student, of_teacher = textbrewer(tmp_path, student, teacher, **options)
    theirs, _ = distiller.compute_loss(of_student, of_teacher)
    check(theirs, KD * losses.mse(student_logits=student.logits, teacher_logits=teacher.logits), student)


def test_textbrewer_logits_mask_is_where(tmp_path):
    student, teacher, _ = make(N, L, C)
    mask = torch.arange(N * L).view(N, L) % 3 == 0
    options = {'kd_loss_type': 'mse', 'kd_loss_weight': T**2}
    distiller, of_student, of_teacher = textbrewer(tmp_path, student, teacher, mask.long(), **options)
    theirs, _ = distiller.compute_loss(of_student, of_teacher)
    check(theirs, losses.mse(student_logits=student.logits, teacher_logits=teacher.logits, where=mask), student)


# ModelOpt: convert, LogitsDistillationLoss, StaticLossBalancer, compute_kd_loss


def modelopt(student, teacher, label_loss=None, kd_loss_weight=None, **options):
    distill = pytest.importorskip('modelopt.torch.distill')
    config = {
        'teacher_model': teacher,
        'criterion': distill.LogitsDistillationLoss(temperature=T, **options),
        'loss_balancer': None if kd_loss_weight is None else distill.StaticLossBalancer(kd_loss_weight),
    }
    model = distill.convert(student, mode=[('kd_loss', config)])
    model.train()
    output = model(torch.zeros(1))
    return model.compute_kd_loss(student_loss=None if label_loss is None else label_loss(output))


def test_modelopt_batchmean():
    student, teacher, labels = make(N, C)
    theirs = modelopt(student, teacher, lambda output: F.cross_entropy(output, labels), KD, reduction='batchmean')
    kl = losses.kl(student_logits=student.logits, teacher_logits=teacher.logits, temperature=T)
    check(theirs, (1 - KD) * F.cross_entropy(student.logits, labels) + KD * kl, student)


def test_modelopt_default_is_a_mean_over_classes_too():
    student, teacher, _ = make(N, C)
    theirs = modelopt(student, teacher)
    kl = losses.kl(student_logits=student.logits, teacher_logits=teacher.logits, temperature=T)
    check(theirs, kl / C, student)


def test_modelopt_batchmean_sums_over_tokens():
    student, teacher, _ = make(N, L, C)
    theirs = modelopt(student, teacher, reduction='batchmean')
    kl = losses.kl(student_logits=student.logits, teacher_logits=teacher.logits, temperature=T)
    check(theirs, L * kl, student)


# timm: task.LogitDistillationTask


@pytest.mark.parametrize(
    ('weights', 'label_weight', 'kd_weight'),
    [
        ({}, 1.0, 1.0),
        ({'task_loss_weight': LABEL}, LABEL, 1 - LABEL),
        ({'distill_loss_weight': KD}, 1.0, KD),
        ({'task_loss_weight': LABEL, 'distill_loss_weight': KD}, LABEL, KD),
    ],
)
def test_timm(weights, label_weight, kd_weight):
    student, teacher, labels = make(N, C)
    task = pytest.importorskip('timm.task').LogitDistillationTask(
        student, teacher, nn.CrossEntropyLoss(), temperature=T, dtype=torch.float64, verbose=False, **weights
    )
    theirs = task(torch.zeros(N, 3, 2, 2, dtype=torch.float64), labels)['loss']
    kl = losses.kl(student_logits=student.logits, teacher_logits=teacher.logits, temperature=T)
    check(theirs, label_weight * F.cross_entropy(student.logits, labels) + kd_weight * kl, student)
