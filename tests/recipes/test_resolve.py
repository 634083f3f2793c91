from pathlib import Path

import composer.algorithms
import composer.callbacks
import composer.loggers
import composer.optim
import pytest
import torch
from composer.core import Algorithm

import composer_kd
from composer_kd.recipes.load import Recipe, RecipeError
from composer_kd.recipes.resolve import resolve, snake_case
from composer_kd.teachers.recorded import RecordedTeacher

RECIPE = Recipe(Path('x.yaml'), {})

NAMES = {
    ('algorithm', 'ema'): composer.algorithms.EMA,
    ('algorithm', 'sam'): composer.algorithms.SAM,
    ('algorithm', 'swa'): composer.algorithms.SWA,
    ('algorithm', 'cut_mix'): composer.algorithms.CutMix,
    ('algorithm', 'cutmix'): composer.algorithms.CutMix,
    ('algorithm', 'low_precision_layernorm'): composer.algorithms.LowPrecisionLayerNorm,
    ('algorithm', 'knowledge_distillation'): composer_kd.KnowledgeDistillation,
    ('algorithm', 'teacher_sampling'): composer_kd.TeacherSampling,
    ('optimizer', 'decoupled_sgdw'): composer.optim.DecoupledSGDW,
    ('optimizer', 'decoupled_adamw'): composer.optim.DecoupledAdamW,
    ('optimizer', 'adamw'): torch.optim.AdamW,
    ('optimizer', 'sgd'): torch.optim.SGD,
    ('optimizer', 'torch.optim.SGD'): torch.optim.SGD,
    ('scheduler', 'cosine_annealing_with_warmup'): composer.optim.CosineAnnealingWithWarmupScheduler,
    ('scheduler', 'cosine_annealing_with_warmup_scheduler'): composer.optim.CosineAnnealingWithWarmupScheduler,
    ('scheduler', 'multi_step'): composer.optim.MultiStepScheduler,
    ('callback', 'lr_monitor'): composer.callbacks.LRMonitor,
    ('callback', 'nan_monitor'): composer.callbacks.NaNMonitor,
    ('logger', 'wandb'): composer.loggers.WandBLogger,
    ('logger', 'wandb_logger'): composer.loggers.WandBLogger,
    ('logger', 'tensorboard'): composer.loggers.TensorboardLogger,
    ('teacher', 'network'): composer_kd.NetworkTeacher,
    ('teacher', 'recorded'): RecordedTeacher,
}


@pytest.mark.parametrize(('kind', 'name'), NAMES)
def test_name(kind, name):
    assert resolve(RECIPE, (kind,), kind, name) is NAMES[kind, name]


def test_every_algorithm_of_composer_has_a_name():
    for name in composer.algorithms.__all__:
        algorithm = getattr(composer.algorithms, name)
        if issubclass(algorithm, Algorithm):
            assert resolve(RECIPE, (), 'algorithm', snake_case(name)) is algorithm


@pytest.mark.parametrize('kind', ['model', 'data'])
def test_every_builder_has_its_own_name(kind):
    import composer_kd.data
    import composer_kd.models

    module = composer_kd.models if kind == 'model' else composer_kd.data
    assert len(module.__all__) > 3
    for name in module.__all__:
        assert resolve(RECIPE, (), kind, name) is getattr(module, name)


def test_own_module_in_the_current_folder(write):
    write('', 'mine_for_resolve.py', head='def build(): ...\nvalue = 3\n')
    assert resolve(RECIPE, (), 'model', 'mine_for_resolve.build').__name__ == 'build'
    with pytest.raises(RecipeError, match=r"mine_for_resolve has no 'biuld' to call; did you mean 'build'\?"):
        resolve(RECIPE, (), 'model', 'mine_for_resolve.biuld')
    with pytest.raises(RecipeError, match="mine_for_resolve has no 'value' to call"):
        resolve(RECIPE, (), 'model', 'mine_for_resolve.value')


@pytest.mark.parametrize(
    ('kind', 'name', 'message'),
    [
        (
            'algorithm',
            'knowlege_distillation',
            "there is no algorithm 'knowlege_distillation'; did you mean 'knowledge_di",
        ),
        ('model', 'resnet_18x', "there is no model 'resnet_18x'; did you mean 'resnet18'?"),
        ('teacher', 'zzz', "there is no teacher 'zzz'; there are: network, recorded"),
        ('optimizer', 'composer', "there is no optimizer 'composer'; there are: adadelta, "),
        (
            'model',
            'no_such_module.x',
            "cannot import no_such_module: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ('model', 3, 'the name of the model must be a word, not 3'),
        ('model', '', "the name of the model must be a word, not ''"),
    ],
)
def test_unknown_names(kind, name, message):
    with pytest.raises(RecipeError) as error:
        resolve(RECIPE, (kind,), kind, name)
    assert str(error.value).startswith(f'x.yaml:1: {kind}: {message}')


def test_snake_case():
    assert [
        snake_case(name) for name in ('EMA', 'DecoupledSGDW', 'BlurPool', 'LRMonitor', 'KnowledgeDistillation')
    ] == [*('ema', 'decoupled_sgdw', 'blur_pool', 'lr_monitor', 'knowledge_distillation')]
