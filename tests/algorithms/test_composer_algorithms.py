"""Beside every algorithm of Composer that runs on a CPU: the teacher hears what the student hears."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from composer import Algorithm, Callback
from composer import algorithms as ca
from composer.loss import soft_cross_entropy
from composer.models import ComposerClassifier, HuggingFaceModel
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import VisionDataset
from torchvision.models.resnet import Bottleneck

from composer_kd import KnowledgeDistillation, NetworkTeacher
from composer_kd.algorithms.inputs import changes_inputs
from composer_kd.losses import kl
from settings import CLASSES, train, trainer


class Remembers(DataLoader):
    """Knows the inputs that it gave last."""

    def __iter__(self):
        for batch in super().__iter__():
            self.inputs = inputs_of(batch).clone()
            yield batch


def inputs_of(batch):
    return batch['input_ids'] if isinstance(batch, dict) else batch[0]


class Witness(Callback):
    """Recomputes the distillation loss of every microbatch from what the student saw and said."""

    def __init__(self, teacher):
        self.teacher = copy.deepcopy(teacher).eval()
        self.batches = 0
        self.saw_other_inputs = False

    def before_backward(self, state, logger):
        self.saw_other_inputs |= not torch.equal(inputs_of(state.batch), state.dataloader.inputs)
        with torch.no_grad():
            logits = self.teacher(state.batch[0]) if isinstance(state.batch, (tuple, list)) else self.ask(state.batch)
        said = state.outputs if isinstance(state.outputs, torch.Tensor) else state.outputs.logits
        where = None if isinstance(state.batch, (tuple, list)) else state.batch['labels'] != -100
        expected = kl(student_logits=said, teacher_logits=logits, temperature=4.0, where=where)
        assert torch.equal(state.loss['kd'], expected)
        assert torch.equal(state.loss['total'], 0.1 * state.loss['label'] + 0.9 * expected)
        self.batches += 1

    def ask(self, batch):
        return self.teacher.model(**{k: v for k, v in batch.items() if k != 'labels'}).logits


def resnet(seed):
    """A small one, with a stem and blocks as those of ResNet-50."""

    def block(channels, planes, stride):
        downsample = nn.Sequential(nn.Conv2d(channels, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes))
        return Bottleneck(channels, planes, stride, downsample)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
            *(block(16, 8, 1), block(32, 16, 2)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, CLASSES)),
        )


class Pictures(VisionDataset):
    """48 images of PIL, 3 x 32 x 32, of noise."""

    def __init__(self):
        super().__init__('', transform=transforms.ToTensor())
        self.images = np.random.default_rng(3).integers(0, 256, (48, 32, 32, 3), dtype=np.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), index % CLASSES


def images():
    return Remembers(Pictures(), batch_size=16, drop_last=True)


VISION = {
    'augmix': lambda: ca.AugMix(augmentation_set='safe'),
    'blurpool': lambda: ca.BlurPool(min_channels=0),
    'channels_last': lambda: ca.ChannelsLast(),
    'colout': lambda: ca.ColOut(p_row=0.2, p_col=0.2, batch=False),
    'colout_batch': lambda: ca.ColOut(p_row=0.2, p_col=0.2, batch=True),
    'cutmix': lambda: ca.CutMix(alpha=1.0),
    'cutmix_interpolate_loss': lambda: ca.CutMix(alpha=1.0, interpolate_loss=True),
    'cutout': lambda: ca.CutOut(),
    'ema': lambda: ca.EMA(half_life='2ba'),
    'factorize': lambda: ca.Factorize(min_channels=8, min_features=8, latent_channels=4, latent_features=4),
    'ghost_batchnorm': lambda: ca.GhostBatchNorm(ghost_batch_size=8),
    'gradient_clipping': lambda: ca.GradientClipping('norm', 0.1),
    'gyro_dropout': lambda: ca.GyroDropout(sigma=4, tau=2),
    'label_smoothing': lambda: ca.LabelSmoothing(0.1),
    'layer_freezing': lambda: ca.LayerFreezing(freeze_start=0.0, freeze_level=0.5),
    'low_precision_groupnorm': lambda: ca.LowPrecisionGroupNorm(),
    'low_precision_layernorm': lambda: ca.LowPrecisionLayerNorm(),
    'mixup': lambda: ca.MixUp(alpha=0.2),
    'mixup_interpolate_loss': lambda: ca.MixUp(alpha=0.2, interpolate_loss=True),
    'progressive_resizing': lambda: ca.ProgressiveResizing(
        initial_scale=0.5, finetune_fraction=0.2, delay_fraction=0.2, size_increment=4
    ),
    'progressive_cropping': lambda: ca.ProgressiveResizing(mode='crop', initial_scale=0.5, size_increment=4),
    'randaugment': lambda: ca.RandAugment(severity=2, depth=2),
    'sam': lambda: ca.SAM(rho=0.05, interval=2),
    'selective_backprop': lambda: ca.SelectiveBackprop(start=0.3, end=0.9, keep=0.5, interrupt=2),
    'squeeze_excite': lambda: ca.SqueezeExcite(min_channels=8),
    'stochastic_depth': lambda: ca.StochasticDepth(target_layer_name='ResNetBottleneck', drop_rate=0.3),
    'swa': lambda: ca.SWA(swa_start='0.5dur', swa_end='0.9dur', update_interval='1ba', schedule_swa_lr=False),
    'weight_standardization': lambda: ca.WeightStandardization(),
}


# Composer's algorithms warn of what they cannot do on a CPU or after a resume; one passes PIL an argument of old.
that_warn = pytest.mark.filterwarnings(
    'ignore::UserWarning',
    'ignore::composer.algorithms.warnings.NoEffectWarning',
    "ignore:'mode' parameter is deprecated:DeprecationWarning",
)


@that_warn
@pytest.mark.parametrize('order', ['before', 'after'])
@pytest.mark.parametrize('name', VISION)
def test_vision(name, order):
    teacher = resnet(2)
    witness = Witness(teacher)
    distillation = KnowledgeDistillation(NetworkTeacher(ComposerClassifier(teacher, num_classes=CLASSES)))
    algorithms = [algorithm := VISION[name](), distillation]
    run = train(
        algorithms if order == 'before' else algorithms[::-1],
        model=ComposerClassifier(resnet(1), num_classes=CLASSES),
        train_dataloader=images(),
        max_duration='2ep',
        callbacks=witness,
    )
    passes = 9 if name == 'sam' else 6  # every second of SAM's steps goes through the batch twice
    assert witness.batches == distillation.pool.forwards == passes
    assert math.isfinite(run.state.total_loss_dict['loss/train/total'])
    assert run.state.algorithms[-1] is distillation
    assert changes_inputs(algorithm) == witness.saw_other_inputs


class Interpolated(Callback):
    """Recomputes the label loss that MixUp or CutMix make of two sets of labels."""

    def __init__(self, mixing):
        self.mixing = mixing
        self.batches = 0

    def before_backward(self, state, logger):
        share = self.mixing.mixing if isinstance(self.mixing, ca.MixUp) else 1 - self.mixing._adjusted_lambda
        permuted = self.mixing.permuted_target if isinstance(self.mixing, ca.MixUp) else self.mixing._permuted_target
        outputs, labels = state.outputs, state.batch[1]
        if self.mixing.interpolate_loss:
            expected = (1 - share) * F.cross_entropy(outputs, labels) + share * F.cross_entropy(outputs, permuted)
        else:
            expected = soft_cross_entropy(outputs, labels)
        torch.testing.assert_close(state.loss['label'], expected)
        self.batches += 1


@pytest.mark.parametrize('interpolate_loss', [False, True])
@pytest.mark.parametrize('algorithm', [ca.MixUp, ca.CutMix])
@pytest.mark.parametrize('order', [1, -1])
def test_labels_are_mixed_before_losses_are_blended(algorithm, interpolate_loss, order):
    mixing = algorithm(alpha=1.0, interpolate_loss=interpolate_loss)
    witness = Interpolated(mixing)
    train(
        [mixing, KnowledgeDistillation(NetworkTeacher(resnet(2)))][::order],
        model=ComposerClassifier(resnet(1), num_classes=CLASSES),
        train_dataloader=images(),
        callbacks=witness,
    )
    assert witness.batches == 6


def bert(seed):
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.BertForMaskedLM(config)


def sentences():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(40, (48, 16), generator=generator)
    labels = ids.masked_fill(torch.rand(48, 16, generator=generator) > 0.3, -100)
    rows = [{'input_ids': row, 'attention_mask': row * 0 + 1, 'labels': label} for row, label in zip(ids, labels)]
    return Remembers(rows, batch_size=16)


LANGUAGE = {
    'alone': lambda: [],
    'alibi': lambda: [ca.Alibi(max_sequence_length=16, train_sequence_length_scaling=1.0)],
    'gated_linear_units': lambda: [ca.GatedLinearUnits()],
    'low_precision_layernorm': lambda: [ca.LowPrecisionLayerNorm()],
    'seq_length_warmup': lambda: [ca.SeqLengthWarmup(duration=0.8, min_seq_length=8, max_seq_length=16)],
    'gradient_clipping': lambda: [ca.GradientClipping('value', 0.1)],
    'ema': lambda: [ca.EMA('1ba')],
}


@pytest.mark.filterwarnings('ignore::composer.algorithms.warnings.NoEffectWarning')
@pytest.mark.parametrize('name', LANGUAGE)
def test_language(name):
    teacher = HuggingFaceModel(bert(2), use_logits=False)
    witness = Witness(teacher)
    distillation = KnowledgeDistillation(NetworkTeacher(teacher))
    algorithms = LANGUAGE[name]()
    train(
        [distillation, *algorithms],
        model=HuggingFaceModel(bert(1), use_logits=False),
        train_dataloader=sentences(),
        callbacks=witness,
    )
    assert witness.batches == distillation.pool.forwards == 6
    assert any(map(changes_inputs, algorithms)) == witness.saw_other_inputs


@that_warn
def test_these_are_all_algorithms_of_composer():
    known = {type(algorithm) for make in LANGUAGE.values() for algorithm in make()}
    known |= {type(make()) for make in VISION.values()}
    known.add(ca.NoOpModel)  # which puts a model of no parameters in place of the student
    there_are = {x for x in vars(ca).values() if isinstance(x, type) and issubclass(x, Algorithm)}
    assert known == there_are and not changes_inputs(ca.NoOpModel())


class Recorded:
    """Speaks of samples by their names, as a record does."""

    name, forwards, replays = 'stored', 0, True

    def check(self, student): ...

    prepare = release = check

    def manifest(self):
        return {'sha256': ''}

    def signal(self, batch, keys=None):
        return torch.zeros(len(keys), CLASSES)


@that_warn
@pytest.mark.parametrize('name', VISION)
def test_a_record_is_of_what_the_loader_gives(name):
    algorithms = [VISION[name](), KnowledgeDistillation(Recorded())]
    model = ComposerClassifier(resnet(1), num_classes=CLASSES)
    if not any(map(changes_inputs, algorithms)):
        trainer(algorithms, model=model).close()
        return
    changing = type(VISION[name]()).__name__
    with pytest.raises(ValueError, match=f'^{changing} changes inputs .* of teacher stored .*: leave {changing} out'):
        trainer(algorithms, model=model)


class CausalWitness(Callback):
    """Recomputes the distillation loss of a causal model, whose logits are for the label of the next position."""

    def __init__(self, teacher):
        self.teacher = copy.deepcopy(teacher).eval()
        self.batches = 0

    def before_backward(self, state, logger):
        inputs = {name: value for name, value in state.batch.items() if name != 'labels'}
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits[:, :-1]
        counts = state.batch['labels'][:, 1:] != -100
        student_logits = state.outputs.logits[:, :-1]
        expected = kl(student_logits=student_logits, teacher_logits=teacher_logits, temperature=4.0, where=counts)
        torch.testing.assert_close(state.loss['kd'], expected)
        self.batches += 1


def test_causal_language_model():
    def gpt(seed):
        config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return transformers.GPT2LMHeadModel(config)

    teacher = gpt(2)
    witness = CausalWitness(teacher)
    train(
        [KnowledgeDistillation(NetworkTeacher(teacher))],
        model=HuggingFaceModel(gpt(1), use_logits=False, shift_labels=True),
        train_dataloader=sentences(),
        callbacks=witness,
    )
    assert witness.batches == 6
