"""Teachers that are the finished runs of a pattern, and records of one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from composer_kd.recipes import RecipeError, check, load, run
from composer_kd.recipes.build import build
from composer_kd.teachers.network import NetworkTeacher

HEAD = """\
model: {name: small_convnet, num_classes: 10, width: 4}
train_data: {name: digits, split: train, batch_size: 256}
max_duration: 1ep
optimizer: {name: decoupled_sgdw, lr: 0.1}
device: cpu
"""
STUDENT = """\
teachers:
- {name: network, runs: 'runs/sweep/*', precision: fp32}
algorithms:
  knowledge_distillation: {}
"""
WIDTHS = {'a': 3, 'a-2': 5, 'a-10': 4}  # in this order: numbers are sorted by their size

# What a run was taught and watched by is of no interest to those that it teaches.
NOT_HERE = [{'name': 'network', 'recipe': 'not_here.yaml'}], {'not_here.Callback': None}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    (folder / 'teacher.yaml').write_text(HEAD)
    for name, width in WIDTHS.items():
        overrides = [f'runs_dir={folder}/sweep', f'run_name={name}', f'model.width={width}', 'max_duration=1ba']
        run(folder / 'teacher.yaml', overrides)
        path = folder / 'sweep' / name / 'recipe.yaml'
        config = yaml.safe_load(path.read_text())
        config['teachers'], config['callbacks'] = NOT_HERE
        path.write_text(yaml.safe_dump(config))
    return folder / 'sweep'


@pytest.fixture
def student(trained, write):
    """A student's recipe, in a folder with finished runs that are to teach it."""
    path = write(STUDENT, head=HEAD)
    shutil.copytree(trained, 'runs/sweep', symlinks=True)
    Path('runs/sweep/report.md').touch()
    return path


def summary(folder):
    return json.loads(Path(folder, 'summary.json').read_text())


def teachers_of(plan):
    """The teachers, built."""
    keywords = build(plan, [run and (run.checkpoint, run.sha256) for run in (t.run for t in plan.teachers)])
    (algorithm,) = keywords['algorithms']
    return algorithm.pool.teachers


@pytest.mark.parametrize('pattern', ['runs/sweep/*', 'runs/sweep/*/latest', 'runs/sweep/a*/', 'ABSOLUTE/runs/sweep/*'])
def test_an_entry_stands_for_every_run_of_a_pattern(student, pattern):
    pattern = pattern.replace('ABSOLUTE', str(Path.cwd()))
    plan = check(load(student, [f'teachers.0.runs={pattern}']))
    assert [teacher.call.arguments for teacher in plan.teachers] == [{'precision': 'fp32'}] * 3
    teachers = teachers_of(plan)
    assert [teacher.name for teacher in teachers] == [*WIDTHS]
    for teacher, width in zip(teachers, WIDTHS.values(), strict=True):
        assert isinstance(teacher, NetworkTeacher)
        found = summary(f'runs/sweep/{teacher.name}')
        saved = torch.load(Path('runs/sweep', teacher.name, found['checkpoint']), weights_only=False)
        weights = teacher._live_network().state_dict()
        assert weights['module.stage1.0.weight'].shape[0] == width
        assert all(torch.equal(weights[key], value) for key, value in saved['state']['model'].items())


@pytest.mark.parametrize('one', ['runs/sweep/a-2', 'runs/sweep/a-2/latest', 'runs/sweep/*-2'])
def test_one_run(student, one):
    (teacher,) = teachers_of(check(load(student, [f'teachers.0.runs={one}'])))
    assert teacher.name == 'a-2'


def test_a_student_of_a_pool(student, capsys):
    more = ['max_duration=4ba', 'algorithms.teacher_sampling={weights: [1, 0, 2]}']
    before = {path: path.read_bytes() for path in Path('runs/sweep').rglob('*') if path.is_file()}
    found = run(student, more)
    printed = capsys.readouterr().out
    assert [f'found the teacher runs/sweep/{name}\n' in printed for name in WIDTHS] == [True] * 3
    assert 'training the teacher' not in printed
    assert found['teacher_training_seconds'] == sum(summary(f'runs/sweep/{name}')['train_seconds'] for name in WIDTHS)
    assert found['teacher_forwards'] == 4
    assert before == {path: path.read_bytes() for path in Path('runs/sweep').rglob('*') if path.is_file()}
    state = torch.load(Path('runs/x', found['checkpoint']), weights_only=False)['state']
    manifests = dict(state['algorithms'])['KnowledgeDistillation']['teachers']
    assert [manifest['name'] for manifest in manifests] == [*WIDTHS]


def test_a_pool_beside_other_teachers(student, write):
    write('', 'teacher.yaml', HEAD)
    entry = '{name: network, model: {name: small_convnet, num_classes: 10}}'
    pool = "{name: network, runs: 'runs/sweep/*-*', dtype: bfloat16}"
    more = ['max_duration=2ba', f'teachers=[{entry}, {pool}, {{name: network, recipe: teacher.yaml}}, {pool}]']
    run(student, [*more, 'algorithms.teacher_sampling={num_teachers: 6}'])
    state = torch.load('runs/x/checkpoints/latest-rank0.pt', weights_only=False)['state']
    manifests = dict(state['algorithms'])['KnowledgeDistillation']['teachers']
    names = [manifest['name'] for manifest in manifests]
    assert names == ['small_convnet', 'a-2', 'a-10', 'teacher', 'a-2', 'a-10']
    with pytest.raises(RecipeError) as error:
        check(load(student, [*more, 'algorithms.teacher_sampling={weights: [1, 1, 1, 1]}']))
    assert str(error.value) == (
        'command line: algorithms.teacher_sampling: weights has 4 numbers for 6 teachers: give one for each'
    )


def unfinished(folder):
    (folder / 'summary.json').unlink()


def no_run(folder):
    (folder / 'recipe.yaml').unlink()


def damaged_recipe(folder):
    (folder / 'recipe.yaml').write_text('model: [')


def damaged_summary(folder):
    (folder / 'summary.json').write_text('{')


def lost(folder):
    (folder / summary(folder)['checkpoint']).unlink()


def unknown_model(folder):
    text = (folder / 'recipe.yaml').read_text()
    (folder / 'recipe.yaml').write_text(text.replace('small_convnet', 'small_covnet'))


DAMAGE = {
    unfinished: (
        'runs/sweep/a-2 is not finished; let it finish (composer runs/sweep/a-2/recipe.yaml autoresume=true), or '
        'choose a narrower pattern'
    ),
    no_run: 'runs/sweep/a-2 is no run: there is no recipe.yaml in it; choose a narrower pattern',
    damaged_recipe: 'runs/sweep/a-2/recipe.yaml:1: not valid YAML: ',
    damaged_summary: (
        'runs/sweep/a-2/recipe.yaml:1: cannot read runs/sweep/a-2/summary.json; delete '
        'runs/sweep/a-2/summary.json, and it is written anew'
    ),
    lost: (
        'runs/sweep/a-2/recipe.yaml:1: the checkpoint of runs/sweep/a-2 is gone; put it back, or delete runs/sweep/a-2'
    ),
    unknown_model: (
        "runs/sweep/a-2/recipe.yaml:MODEL: model.name: there is no model 'small_covnet'; did you mean 'small_convnet'?"
    ),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_run_that_cannot_teach(student, damage):
    damage(Path('runs/sweep/a-2'))
    message = DAMAGE[damage]
    if damage is unknown_model:
        text = Path('runs/sweep/a-2/recipe.yaml').read_text()
        message = message.replace('MODEL', str(text[: text.index('small_covnet')].count('\n') + 1))
    for work in (lambda: check(load(student)), lambda: run(student)):
        with pytest.raises(RecipeError) as error:
            work()
        assert str(error.value).startswith(f'x.yaml:7: teachers.0.runs: {message}')
    assert not Path('runs/x').exists()


def test_an_unfinished_run_can_be_finished_as_its_error_says(student):
    unfinished(Path('runs/sweep/a-2'))
    path = Path('runs/sweep/a-2/recipe.yaml')
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value not in NOT_HERE}))
    run(path, ['autoresume=true', 'runs_dir=runs/sweep'])
    assert len(check(load(student)).teachers) == 3


def test_other_weights_than_the_run_left(student):
    checkpoint = Path('runs/sweep/a-2', summary('runs/sweep/a-2')['checkpoint'])
    checkpoint.write_bytes(checkpoint.read_bytes() + b'x')
    with pytest.raises(RecipeError, match=f'^x.yaml:7: teachers.0: {checkpoint}: is not the expected file: its SHA'):
        run(student)
    assert not Path('runs/x').exists()


def test_a_run_of_other_classes(student):
    with pytest.raises(
        RecipeError, match=r'^x.yaml:6: teachers: teacher a has 10 classes, the student 7: they must be'
    ):
        run(student, ['model.num_classes=7'])
    assert not Path('runs/x').exists()


@pytest.mark.parametrize('pattern', ['runs/swep/*', 'runs/sweep/report.md', 'teacher', 'runs/*.yaml'])
def test_no_run_at_all(student, pattern):
    with pytest.raises(RecipeError) as error:
        check(load(student, [f'teachers.0.runs={pattern}']))
    todo = 'train the teachers first, or change it'
    assert str(error.value) == f'command line: teachers.0.runs: there is no run at {pattern}; {todo}'
    assert error.value.exit_code == 1


@pytest.mark.parametrize('there', [False, True])
@pytest.mark.parametrize('pattern', ['runs/sweep/*', 'runs/sweep/x', 'runs/sweep/*/latest', 'ABSOLUTE/runs/*p/x'])
def test_no_run_teaches_itself(student, pattern, there):
    if there:
        shutil.copytree('runs/sweep/a', 'runs/sweep/x')
    pattern = pattern.replace('ABSOLUTE', str(Path.cwd()))
    with pytest.raises(RecipeError) as error:
        check(load(student, ['runs_dir=runs/sweep', f'teachers.0.runs={pattern}']))
    todo = f'the folder of this very run, is among {pattern}; choose a narrower pattern'
    assert str(error.value) == f'command line: teachers.0.runs: runs/sweep/x, {todo}'


def test_a_run_goes_on_with_its_pool(student):
    run(student, ['max_duration=2ba'])
    assert run(student, ['max_duration=4ba', 'autoresume=true'])['teacher_forwards'] == 3 * 4
    shutil.rmtree('runs/sweep/a-2')
    with pytest.raises(RecipeError, match='the run to be resumed had 3 teachers, this one has 2'):
        run(student, ['max_duration=6ba', 'autoresume=true'])


@pytest.mark.filterwarnings('ignore:the record .* lacks')  # what no sampled teacher was asked about
def test_records_of_a_pattern(student, capsys):
    """They teach what the runs that were recorded taught, when nothing is left of these."""
    sampled = ['max_duration=6ba', 'algorithms.teacher_sampling={weights: [3, 1, 2]}']
    run(student, ['algorithms.knowledge_distillation.record=records/x', *sampled])
    shutil.rmtree('runs/sweep')
    capsys.readouterr()
    found = run(student, ["teachers=[{name: recorded, path: 'records/x/*'}]", *sampled, 'run_name=again'])
    assert 'the teacher ' not in capsys.readouterr().out
    assert found['teacher_forwards'] == found['teacher_training_seconds'] == 0
    states = [torch.load(f'runs/{name}/checkpoints/latest-rank0.pt', weights_only=False) for name in ('x', 'again')]
    one, other = (state['state']['model'] for state in states)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_records_are_in_the_order_of_their_numbers(student):
    for number in range(12):
        Path('records/x', str(number)).mkdir(parents=True)
    Path('records/x/.0.lock').touch()
    weights = f'algorithms.teacher_sampling.weights={[*range(12)]}'
    plan = check(load(student, ["teachers=[{name: recorded, path: 'records/x/*'}]", weights]))
    assert [teacher.call.arguments['path'] for teacher in plan.teachers] == [f'records/x/{n}' for n in range(12)]
    # A path that is no pattern may be recorded later.
    (teacher,) = check(load(student, ['teachers=[{name: recorded, path: records/y}]'])).teachers
    assert teacher.call.arguments == {'path': 'records/y'}
    with pytest.raises(RecipeError, match=r'^command line: teachers\.0: .*records/y') as error:
        run(student, ['teachers=[{name: recorded, path: records/y}]'])
    assert error.value.exit_code == 1
    with pytest.raises(RecipeError) as error:
        check(load(student, ["teachers=[{name: recorded, path: 'records/y/*'}]"]))
    assert str(error.value) == (
        'command line: teachers.0.path: there is no record at records/y/*; record first (composer-kd record), or '
        'change it'
    )
