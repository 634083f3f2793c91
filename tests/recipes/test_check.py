import pytest

from composer_kd.recipes import RecipeError, check, load

KD = """\
teachers: [{name: network, model: {name: small_convnet, num_classes: 10}}]
algorithms:
  knowledge_distillation: {}
"""


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch):
    """Checking builds no network and reads no data."""
    import torch

    def refuse(*args, **kwargs):
        raise AssertionError('checking must not build this')

    monkeypatch.setattr(torch.nn.Module, '__init__', refuse)
    monkeypatch.setattr(torch.utils.data.DataLoader, '__init__', refuse)
    monkeypatch.setattr(torch.optim.Optimizer, '__init__', refuse)


def test_a_full_recipe(write):
    write('seed: 1\n', 'teacher.yaml')
    plan = check(
        load(
            write(
                'eval_data: {name: digits, split: test, batch_size: 64}\n'
                'teachers:\n'
                '- {name: network, recipe: teacher.yaml, precision: fp32}\n'
                '- {name: network, model: {name: resnet18, num_classes: 10}, checkpoint: t.pt, sha256: abc}\n'
                'optimizer: {name: decoupled_sgdw, lr: 0.1}\n'
                'schedulers: {cosine_annealing_with_warmup: {t_warmup: 1ep}}\n'
                'algorithms: {knowledge_distillation: {temperature: 2}, teacher_sampling: , ema: {half_life: 10ba}}\n'
                'callbacks: {lr_monitor: }\n'
                'loggers: {in_memory: {}}\n'
                'eval_interval: 10ba\n'
            ),
            ['seed=3', 'device=cpu'],
        )
    )
    assert plan.model.arguments == {'num_classes': 10, 'width': 4}
    assert plan.eval_data is not None and plan.eval_data.arguments['split'] == 'test'
    assert plan.teachers[0].recipe is not None and plan.teachers[0].recipe.trainer['seed'] == 1
    assert plan.teachers[0].recipe.trainer['device'] == 'cpu'  # one launch, one device
    assert plan.teachers[0].call.arguments == {'precision': 'fp32'}
    assert plan.teachers[1].model is not None and plan.teachers[1].model.arguments == {'num_classes': 10}
    assert [call.target.__name__ for call in plan.algorithms] == ['KnowledgeDistillation', 'TeacherSampling', 'EMA']
    assert plan.trainer == {
        **{
            'max_duration': '1ep',
            'eval_interval': '10ba',
            'seed': 3,
            'device': 'cpu',
            'save_num_checkpoints_to_keep': 1,
        }
    }


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        ('max_durration: 3ep\n', "4: max_durration: a recipe has no 'max_durration'; did you mean 'max_duration'?"),
        ('eval_dat: {}\n', "4: eval_dat: a recipe has no 'eval_dat'; did you mean 'eval_data'?"),
        ('profiler: x\n', "4: profiler: a recipe has no 'profiler'; "),
        ('seed: many\n', "4: seed: must be Optional[int], not 'many'"),
        ('seed: -1\n', '4: seed: must be from 0 to 2**32 - 2, not -1'),
        ('precision: fp8\n', "4: precision: there is no Precision 'fp8'; "),
        ('save_interval: 1e\n', "4: save_interval: '1e' is no time; "),
        ('run_name: a/b\n', "4: run_name: must be the name of a folder, not 'a/b'"),
        ('runs_dir: 3\n', '4: runs_dir: must be the path of a folder, not 3'),
        (
            'optimizer: decoupled_sgdw\n',
            "4: optimizer: must be a mapping with the name of the optimizer, not 'decoupled",
        ),
        ('optimizer: {lr: 0.1}\n', '4: optimizer: must be a mapping with the name of the optimizer, not '),
        ('optimizer: {name: sdg}\n', "4: optimizer.name: there is no optimizer 'sdg'; did you mean 'sgd'?"),
        (
            'eval_data: {name: digits, split: tset, batch_size: 2}\n',
            "4: eval_data.split: must be Literal['train', 'test'], ",
        ),
        ('algorithms: [ema]\n', "4: algorithms: must be a mapping of names to arguments, not ['ema']"),
        (
            'algorithms:\n  cutmix: {}\n  cut_mix: {}\n',
            "6: algorithms.cut_mix: is there already, as 'cutmix'; remove one",
        ),
        (
            'algorithms:\n  ema: {half_live: 1ba}\n',
            "5: algorithms.ema.half_live: EMA has no argument 'half_live'; did you me",
        ),
        (
            'algorithms:\n  ema: {half_life: 1ep}\n  mixup: {alpha: x}\n',
            '6: algorithms.mixup.alpha: must be float, not ',
        ),
        ('algorithms:\n  sam: {interval: 0.5}\n', '5: algorithms.sam.interval: must be int, not 0.5'),
        ('schedulers: {step: {}}\n', "4: schedulers.step: StepScheduler needs the argument 'step_size'; add it"),
        (
            'algorithms:\n  knowledge_distillation:\n',
            '5: algorithms.knowledge_distillation: there is no teacher to learn fr',
        ),
        (
            'teachers: [{name: network, model: {name: timm, model_name: x}}]\n',
            '4: teachers: nothing learns from them; add',
        ),
        ('teachers: {name: network}\n', "4: teachers: must be a list of teachers, not {'name': 'network'}"),
        ('teachers: [network]\n', "4: teachers.0: must be a mapping with the name of the teacher, not 'network'"),
        (
            'teachers:\n- {name: network}\n',
            '5: teachers.0: a teacher has a `model`, a `recipe` or `runs`; give one of them',
        ),
        (
            'teachers: [{name: network, model: {name: timm}, recipe: t.yaml}]\n',
            '4: teachers.0: a teacher has a `model`, a `recipe` or `runs`; give one',
        ),
        (
            'teachers: [{name: network, runs: a, recipe: t.yaml}]\n',
            '4: teachers.0: a teacher has a `model`, a `recipe` or `runs`; give one',
        ),
        (
            'teachers: [{name: network, runs: a, sha256: b}]\n',
            '4: teachers.0.sha256: comes from the run of `runs`; give a `model` instead, or remove it',
        ),
        (
            'teachers:\n- name: network\n  overrides: [a=b]\n  runs: a\n',
            '6: teachers.0.overrides: are for the recipe of a teacher; give a `recipe`, or remove them',
        ),
        (
            'teachers: [{name: network, runs: [a]}]\n',
            '4: teachers.0.runs: must be the folder of a run, or a pattern of',
        ),
        ('teachers: [{name: network, runs: a}]\nruns_dir: 3\n', '5: runs_dir: must be the path of a folder, not 3'),
        ('teachers: [{name: recorded}]\n', "4: teachers.0: RecordedTeacher needs the argument 'path'; add it"),
        ('teachers: [{name: recorded, path: 3}]\n', '4: teachers.0.path: must be '),
        (
            'teachers: [{name: network, recipe: t.yaml}]\n',
            '4: teachers.0.recipe: there is no file t.yaml; give the path',
        ),
        (
            'teachers: [{name: network, recipe: x.yaml}]\n',
            '4: teachers.0.recipe: x.yaml is taught by its own student; ',
        ),
        (
            'teachers: [{name: network, recipe: x.yaml, sha256: a}]\n',
            '4: teachers.0.sha256: comes from the run of `recipe`',
        ),
        (
            'teachers:\n- {name: network, model: {name: timm}, overrides: [a=b]}\n',
            '5: teachers.0.overrides: are for the recipe of a teacher; give a `recipe`, or remove them',
        ),
        (
            'teachers:\n- name: network\n  recipe: t.yaml\n  overrides: {seed: 3}\n',
            "7: teachers.0.overrides: must be a list of items key=value, not {'seed': 3}",
        ),
        (
            'teachers:\n- name: network\n  model: {name: timm}\n',
            "6: teachers.0.model: timm needs the argument 'model_name'",
        ),
        (
            KD.replace('{}', '{temperature: -1}'),
            '6: algorithms.knowledge_distillation: temperature must be above 0, not -1',
        ),
        (
            KD.replace('{}', '{temprature: 1}'),
            '6: algorithms.knowledge_distillation.temprature: KnowledgeDistillation has ',
        ),
        (
            KD.replace('{}', '{teachers: []}'),
            '6: algorithms.knowledge_distillation.teachers: is not for a recipe to give',
        ),
        (
            KD + '  early_stop_distillation: {start: 3ep, stop: 1ep}\n',
            '7: algorithms.early_stop_distillation: stop (1ep) mu',
        ),
        (
            KD + '  early_stop_distillation: {stop: 0.3durr}\n',
            "7: algorithms.early_stop_distillation.stop: '0.3durr' is no ",
        ),
        (
            KD + '  teacher_sampling: {num_teachers: 2}\n',
            '7: algorithms.teacher_sampling: num_teachers is 2, but there are 1',
        ),
        (
            'algorithms:\n  teacher_sampling:\n',
            '5: algorithms.teacher_sampling: TeacherSampling changes how a run distills',
        ),
        (
            KD + '  distillers.Other:\n',
            "7: algorithms.distillers.Other: one distilling algorithm per run; there is 'knowled",
        ),
    ],
)
def test_wrong_recipes(write, more, message):
    write(
        'from composer.core import Algorithm\nclass Other(Algorithm):\n    def __init__(self, teachers): ...\n',
        name='distillers.py',
        head='',
    )
    with pytest.raises(RecipeError) as error:
        check(load(write(more)))
    assert str(error.value).startswith(f'x.yaml:{message}')
    assert error.value.exit_code == 2


@pytest.mark.parametrize('key', ['model', 'train_data', 'max_duration'])
def test_what_every_recipe_has(write, key):
    with pytest.raises(RecipeError, match=f"^x.yaml:1: the recipe has no '{key}'; add it$"):
        check(load(write(), [f'{key}=null']))


@pytest.mark.parametrize('duration', ['3sec', '0.5dur'])
def test_a_duration_that_is_none(write, duration):
    with pytest.raises(RecipeError, match='command line: max_duration: a run is as long as'):
        check(load(write(), [f'max_duration={duration}']))


def test_a_mistake_in_the_recipe_of_a_teacher(write):
    write('sead: 1\n', 'teacher.yaml')
    with pytest.raises(RecipeError, match=r"^teacher.yaml:4: sead: a recipe has no 'sead'; did you mean 'seed'"):
        check(load(write('teachers: [{name: network, recipe: teacher.yaml}]\n')))


def test_recipes_that_teach_each_other(write):
    for name, other in [('x', 'y'), ('y', 'z'), ('z', 'x')]:
        write(KD.replace('model: {name: small_convnet, num_classes: 10}', f'recipe: {other}.yaml'), f'{name}.yaml')
    with pytest.raises(RecipeError, match=r'^z.yaml:4: teachers.0.recipe: x.yaml is taught by its own student'):
        check(load('x.yaml'))


def test_a_teacher_recipe_beside_its_student_or_in_the_current_folder(write, tmp_path):
    (tmp_path / 'recipes').mkdir()
    write('seed: 1\n', 'a.yaml')
    write('seed: 2\n', 'recipes/a.yaml')
    write('seed: 3\n', 'b.yaml')
    for name, seed in (('a', 2), ('b', 3)):
        path = write(
            KD.replace('model: {name: small_convnet, num_classes: 10}', f'recipe: {name}.yaml'), 'recipes/x.yaml'
        )
        teacher = check(load(path)).teachers[0].recipe
        assert teacher is not None and teacher.trainer['seed'] == seed


def test_overrides_of_a_teachers_recipe(write):
    write('seed: 1\n', 'teacher.yaml')
    text = 'teachers:\n- name: network\n  recipe: teacher.yaml\n  overrides: [model.width=6, run_name=big]\n'
    path = write(text + 'algorithms: {knowledge_distillation: {}}\ndevice: cpu\n')
    plan = check(load(path)).teachers[0].recipe
    assert plan is not None and plan.model.arguments == {'num_classes': 10, 'width': 6}
    assert (plan.recipe.config['run_name'], plan.trainer['seed'], plan.trainer['device']) == ('big', 1, 'cpu')
    plan = check(load(path, ['teachers.0.overrides=[model.width=7]'])).teachers[0].recipe
    assert plan is not None and plan.model.arguments['width'] == 7


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('modle.width=6', "modle.width: no 'modle' here; did you mean 'model'?"),
        ('model.widht=6', "model.widht: small_convnet has no argument 'widht'; did you mean 'width'?"),
        ('model.width=six', "model.width: must be int, not 'six'"),
        ('sead=6', "sead: a recipe has no 'sead'; did you mean 'seed'?"),
        ('model', "an override is written key=value, not 'model'"),
        ('model.width=[', "model.width: '[' is not valid YAML"),
    ],
)
def test_mistakes_in_the_overrides_of_a_teachers_recipe(write, override, message):
    write('seed: 1\n', 'teacher.yaml')
    text = f'teachers:\n- name: network\n  recipe: teacher.yaml\n  overrides: ["{override}"]\n'
    with pytest.raises(RecipeError) as error:
        check(load(write(text)))
    assert str(error.value) == f'x.yaml:7: teachers.0.overrides: {message}'
    with pytest.raises(RecipeError) as error:
        check(load('x.yaml', [f'teachers=[{{name: network, recipe: teacher.yaml, overrides: ["{override}"]}}]']))
    assert str(error.value) == f'command line: teachers.0.overrides: {message}'
