import json
from pathlib import Path

import pytest
from study_parts import METRIC, write_recipes

from composer_kd import cli
from composer_kd.recipes import RecipeError, check, load
from composer_kd.recipes.folder import differences
from composer_kd.studies.grid import read_sweep

SHIPPED = sorted((Path(__file__).parents[2] / 'benchmarks' / 'sweeps').glob('*.yaml'))

SWEEP = f"""\
metric: {METRIC}
seeds: [1, 2]
overrides: {{train_data.batch_size: 64}}
grid:
  max_duration: [2ba, 4ba]
methods:
  baseline: {{recipe: recipes/base.yaml, baseline: true}}
"""


@pytest.fixture(autouse=True)
def work_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipes()


def cells_of(text, name='s.yaml'):
    Path(name).write_text(text)
    return {cell.name: cell for cell in read_sweep(name)[1]}


THEN = "then: {on: {recipe: recipes/base.yaml, overrides: {load_path: '${run}/x.pt', max_duration: 9ba}}}\n"


def test_what_goes_on_from_a_student_follows_it():
    cells = cells_of(SWEEP + THEN)
    assert [*cells][:4] == [
        'baseline-2ba-seed1',
        'baseline-2ba-seed1-on',
        'baseline-4ba-seed1',
        'baseline-4ba-seed1-on',
    ]
    cell = cells['baseline-4ba-seed2-on']
    assert (cell.role, cell.method, cell.seed, cell.after, cell.of) == (
        *('follow-up', 'on', 2, ['baseline-4ba-seed2'], 'baseline-4ba-seed2'),
    )
    assert cell.settings == {'max_duration': '4ba'} and cell.command == [
        'recipes/base.yaml',
        'load_path=runs/s/baseline-4ba-seed2/x.pt',
        'max_duration=9ba',
        'seed=2',
        'run_name=baseline-4ba-seed2-on',
        'runs_dir=runs/s',
        'autoresume=true',
    ]


@pytest.mark.parametrize(
    'change, said',
    [
        (("'${run}/x.pt'", 'x.pt'), r's.yaml:8: then.on: nothing in its `overrides` says \${run}'),
        (('recipe: recipes/base.yaml, ', ''), 's.yaml:8: then.on.recipe: must be the path of a recipe'),
        (('overrides:', 'seeds: [1], overrides:'), "s.yaml:8: then.on.seeds: there is no 'seeds' here"),
        (('on:', 'metrics:'), 's.yaml:8: then.metrics: is how metrics begin; choose another name'),
        (('max_duration: 9ba', 'max_duratio: 9ba'), "s.yaml:8: max_duratio: .*did you mean 'max_duration'"),
    ],
)
def test_mistakes_in_what_goes_on(change, said):
    with pytest.raises(RecipeError, match=said):
        cells_of(SWEEP + THEN.replace(*change))


def test_variables_of_the_environment_are_those_that_the_runs_see(monkeypatch):
    monkeypatch.setenv('SCRATCH', 'scratch')
    text = SWEEP.replace('  baseline: {', "  baseline: {overrides: {eval_data.split: '$SPLIT'}, ")
    monkeypatch.setenv('SPLIT', 'test')
    cells = cells_of("runs_dir: '$SCRATCH/runs'\n" + text)
    cell = cells['baseline-2ba-seed1']
    assert str(cell.folder) == 'scratch/runs/s/baseline-2ba-seed1' and 'eval_data.split=test' in cell.command


def test_methods_by_points_by_seeds():
    cells = cells_of(
        SWEEP
        + '  kd: {recipe: recipes/kd.yaml, overrides: {algorithms.knowledge_distillation.temperature: 3.0}}\n'
        + '  stopped: {recipe: recipes/kd.yaml, grid: {algorithms.early_stop_distillation.stop: [0.1dur, 0.5dur]}}\n'
    )
    methods = ['baseline', 'kd', 'stopped-stop_0.1dur', 'stopped-stop_0.5dur']
    names = [f'{method}-{point}-seed{seed}' for seed in (1, 2) for point in ('2ba', '4ba') for method in methods]
    assert [*cells] == [names[0], 'teacher', *names[1:]]
    assert {name for name, cell in cells.items() if cell.is_baseline} == {n for n in names if n.startswith('baseline')}

    cell = cells['stopped-stop_0.5dur-4ba-seed2']
    assert (cell.method, cell.seed, cell.role, cell.after) == ('stopped', 2, 'student', ['teacher'])
    assert cell.settings == {'algorithms.early_stop_distillation.stop': '0.5dur', 'max_duration': '4ba'}
    assert cell.command == [
        'recipes/kd.yaml',
        'train_data.batch_size=64',
        'algorithms.early_stop_distillation.stop=0.5dur',
        'max_duration=4ba',
        'seed=2',
        'run_name=stopped-stop_0.5dur-4ba-seed2',
        'runs_dir=runs/s',
        'autoresume=true',
    ]
    assert load(cell.command[0], cell.command[1:]).config.items() <= cell.recipe.config.items()
    assert cells['kd-2ba-seed1'].recipe.config['algorithms']['knowledge_distillation'] == {'temperature': 3.0}


def test_a_list_of_points():
    text = SWEEP.replace('grid:\n  max_duration: [2ba, 4ba]', 'list: [{optimizer.lr: 0.1, max_duration: 1ep}, {}]')
    cells = cells_of(text.replace('[1, 2]', '[1]'))
    assert [*cells] == ['baseline-lr_0.1-1ep-seed1', 'baseline-seed1']
    assert cells['baseline-lr_0.1-1ep-seed1'].recipe.config['optimizer']['lr'] == 0.1


def test_another_key_may_make_the_curves():
    cells = cells_of(SWEEP.replace('max_duration: [2ba, 4ba]', 'model.width: [2, 4]') + 'points: model.width\n')
    assert [*cells][:2] == ['baseline-2-seed1', 'baseline-4-seed1']


def test_a_teacher_is_the_run_that_its_students_find():
    """With what they say about it, and with what it takes over from them; those of teachers, too."""
    Path('recipes/middle.yaml').write_text(Path('recipes/kd.yaml').read_text())
    cells = cells_of(
        SWEEP
        + '  kd:\n    recipe: recipes/kd.yaml\n    overrides:\n      progress_bar: false\n      teachers:\n'
        + "      - {name: network, recipe: middle.yaml, overrides: ['seed=${seed}', 'run_name=middle-${seed}', "
        + "'teachers.0.overrides=[optimizer.lr=0.5]']}\n"
    )
    assert [*cells][1:4] == ['teacher', 'middle-1', 'kd-2ba-seed1']
    assert cells['middle-1'].after == ['teacher'] and cells['kd-4ba-seed2'].after == ['middle-2']
    for name in ('kd-2ba-seed1', 'kd-4ba-seed2'):
        student = check(load(cells[name].command[0], cells[name].command[1:]))
        teacher, of_teacher = student.teachers[0].recipe, cells[cells[name].after[0]]
        assert teacher is not None and teacher.teachers[0].recipe is not None
        for plan, cell in ((teacher, of_teacher), (teacher.teachers[0].recipe, cells['teacher'])):
            alone = load(cell.command[0], cell.command[1:])
            check(alone)
            assert not differences(plan.recipe.config, alone.config)
            assert cell.role == 'teacher' and cell.recipe.config['runs_dir'] == plan.recipe.config['runs_dir']
    assert cells['teacher'].recipe.config['optimizer']['lr'] == 0.5


def test_runs_that_others_wait_for():
    cells = cells_of(
        SWEEP
        + '  sampled: {recipe: recipes/kd.yaml, after: [pool], overrides: {algorithms.teacher_sampling.num_teachers: 2,'
        + " teachers: [{name: network, runs: '${folder}/pool-*', dtype: float32}]}}\n"
        + 'teachers:\n  pool: {recipe: recipes/teacher.yaml, seeds: [5, 6, 7], overrides: {max_duration: 1ba}}\n'
    )
    assert [*cells][:5] == ['baseline-2ba-seed1', 'pool-seed5', 'pool-seed6', 'pool-seed7', 'sampled-2ba-seed1']
    assert cells['sampled-2ba-seed1'].after == ['pool-seed5', 'pool-seed6', 'pool-seed7']
    pool = cells['pool-seed6'].recipe.config
    assert (pool['max_duration'], pool['seed'], pool['train_data']['batch_size']) == ('1ba', 6, 32)
    # Its recipe is as it will be run, though none of its teachers is there yet.
    # Each is named, so that no other one that the pattern matches teaches it, and none comes or goes unnoticed.
    student = cells['sampled-2ba-seed1']
    teachers = [{'name': 'network', 'runs': f'runs/s/pool-seed{seed}', 'dtype': 'float32'} for seed in (5, 6, 7)]
    assert student.recipe.config['teachers'] == teachers
    assert student.recipe.config['algorithms']['teacher_sampling'] == {'num_teachers': 2}
    assert sum(word.startswith('teachers') for word in student.command) == 1
    assert f'teachers={json.dumps(teachers)}' in student.command


def test_a_record_is_made_first():
    cells = cells_of(
        SWEEP
        + '  recorded:\n    recipe: recipes/recorded.yaml\n'
        + '    record: {recipe: recipes/kd.yaml, views: 4, top: 5, '
        + 'overrides: {optimizer.lr: 0.2}}\n'
    )
    record = cells['recorded-record']
    assert [*cells][:4] == ['baseline-2ba-seed1', 'teacher', 'recorded-record', 'recorded-2ba-seed1']
    assert (record.role, record.after, record.seed) == ('record', ['teacher'], 17)
    assert record.command == [
        *('record', 'recipes/kd.yaml', 'train_data.batch_size=64'),
        *('optimizer.lr=0.2', 'runs_dir=runs/s'),
        *('--views', '4', '--top', '5', '--out', 'runs/s/records/recorded'),
    ]
    student = cells['recorded-4ba-seed2']
    assert student.after == ['recorded-record']
    assert student.recipe.config['teachers'] == [{'name': 'recorded', 'path': 'runs/s/records/recorded'}]


def test_a_record_of_several_teachers():
    two = '{name: network, recipe: teacher.yaml}, {name: network, model: {name: small_convnet, num_classes: 10}}'
    cells = cells_of(
        SWEEP
        + '  recorded:\n    recipe: recipes/recorded.yaml\n'
        + f'    record: {{recipe: recipes/kd.yaml, overrides: {{teachers: [{two}]}}}}\n'
    )
    paths = [teacher['path'] for teacher in cells['recorded-2ba-seed1'].recipe.config['teachers']]
    assert paths == ['runs/s/records/recorded/0', 'runs/s/records/recorded/1']
    assert len(cells['recorded-2ba-seed1'].plan.teachers) == 2


# What is added to, or replaced in, the sweep: the line, and what stands there.
MISTAKES = {
    'key': ('sweep: 1\n', "s.yaml:8: sweep: a sweep has no 'sweep'; did you mean 'seeds'?"),
    'metric': (('metric: ', 'name: '), 's.yaml:1: say what is compared, for instance metric: metrics/eval/Multi'),
    'goal': ('goal: least\n', "s.yaml:8: goal: must be max or min, not 'least'"),
    'name': ('name: a/b\n', "s.yaml:8: name: must be the name of a folder, not 'a/b'"),
    'runs_dir': ('runs_dir: 3\n', 's.yaml:8: runs_dir: must be text, not 3'),
    'points': ('points: [a]\n', "s.yaml:8: points: must be the key of a recipe, not ['a']"),
    'seeds': (('[1, 2]', '[1, a]'), "s.yaml:2: seeds: must be a list of whole numbers, not [1, 'a']"),
    'dotted key': (
        ('max_duration: [2ba, 4ba]', 'optimizer.lrr: [1, 2]'),
        "s.yaml:5: optimizer.lrr: SGD has no argument 'lrr'; did you mean 'lr'?",
    ),
    'dotted key of all': (
        ('train_data.batch_size: 64', 'train_date.batch_size: 64'),
        "s.yaml:3: train_date.batch_size: no 'train_date' here; did you mean 'train_data'?",
    ),
    'value': (('[2ba, 4ba]', '[2ba, 4]'), None),
    'wrong value': (('[2ba, 4ba]', '[2ba, soon]'), "s.yaml:5: max_duration: 'soon' is no time; write '90ep', '50"),
    'axis': (('[2ba, 4ba]', '2ba'), "s.yaml:5: grid.max_duration: must be a list of values, not '2ba'"),
    'list': ('list: [{max_duration: 2ba}]\n', 's.yaml:8: list: give a grid, or a list of points, not both'),
    'ours': (
        ('max_duration: [2ba', 'seed: [2ba'),
        's.yaml:5: grid.seed: seed is chosen by the command itself; give `s',
    ),
    'twice': (
        ('[2ba, 4ba]', '[2ba, 2ba]'),
        's.yaml:7: methods.baseline: two runs have the name baseline-2ba-seed1; change a name, or remove what is th',
    ),
    'no baseline': ((', baseline: true', ''), 's.yaml:6: methods: one method has `baseline: true`; the others are com'),
    'two baselines': (
        '  kd: {recipe: recipes/kd.yaml, baseline: true}\n',
        's.yaml:6: methods: one method has `baseline: true`, not baseline, kd; the others are compared with it',
    ),
    'baseline': (
        ('baseline: true', "baseline: 'false'"),
        "s.yaml:7: methods.baseline.baseline: must be true or false, not 'f",
    ),
    'key of a method': (
        '  kd: {recipes: recipes/kd.yaml}\n',
        "s.yaml:8: methods.kd.recipes: there is no 'recipes' her",
    ),
    'name of a method': (
        '  k/d: {recipe: recipes/kd.yaml}\n',
        's.yaml:8: methods.k/d: a name is made of letters, digi',
    ),
    'recipe': (
        '  kd: {recipe: kd.yaml}\n',
        's.yaml:8: methods.kd.recipe: there is no file kd.yaml; give the path of a',
    ),
    'no recipe': ('  kd: {}\n', 's.yaml:8: methods.kd.recipe: must be the path of a recipe, not None'),
    'not taught': (
        '  kd: {recipe: recipes/base.yaml, record: {recipe: recipes/base.yaml}}\n',
        'recipes/base.yaml:1: there is no teacher to record; add a `teachers` section',
    ),
    'views': (
        '  kd: {recipe: recipes/recorded.yaml, record: {recipe: recipes/kd.yaml, views: no}}\n',
        "s.yaml:8: methods.kd.record.views: must be a whole number above 0, not 'no'",
    ),
    'after': (
        '  kd: {recipe: recipes/kd.yaml, after: [x]}\n',
        "s.yaml:8: methods.kd.after.0: there is no 'x' among the",
    ),
    'teachers': (
        'teachers:\n  pool: {recipe: recipes/base.yaml}\n',
        's.yaml:9: teachers.pool: no method waits for it; name it in the `after` of one, or remove it',
    ),
    'pattern': (
        "  kd: {recipe: recipes/kd.yaml, overrides: {teachers: [{name: network, runs: '${folder}/no-*'}]}}\n",
        's.yaml:8: teachers.0.runs: there is no run at runs/s/no-*; train the teachers first, or change it',
    ),
    'two teachers': (
        '  kd: {recipe: recipes/kd.yaml}\n'
        '  other: {recipe: recipes/kd.yaml, overrides: {teachers.0.overrides: [optimizer.lr=1]}}\n',
        's.yaml:9: methods.other: two runs have the name teacher, which differ in optimizer.lr; give run_name',
    ),
    'no evaluation': (
        (', baseline', ', overrides: {eval_data: null}, baseline'),
        's.yaml:7: eval_data: there is none, so',
    ),
    'metric of nothing': (
        (f'metric: {METRIC}', 'metric: eval/F1'),
        "s.yaml:1: metric: must begin with metrics or loss, not 'eval/F1'",
    ),
    'no mapping': ('  kd: [1]\n', 's.yaml:8: methods.kd: must be a mapping, not [1]'),
    'YAML': ('methods: {}\n', 's.yaml:8: methods: given twice, first in line 6; remove one'),
}


@pytest.mark.parametrize('case', MISTAKES)
def test_mistakes_are_one_line(case, capsys):
    change, message = MISTAKES[case]
    Path('s.yaml').write_text(SWEEP + change if isinstance(change, str) else SWEEP.replace(*change, 1))
    code = cli.main(['sweep', 's.yaml'] if message else ['check', 's.yaml'])
    out, err = capsys.readouterr()
    if message is None:
        assert (code, out, err) == (0, 'ok s.yaml\n', '')
        return
    assert code in (1, 2) and out == '' and err.count('\n') == 1
    assert err.startswith(message)
    assert not Path('runs').exists()


def test_one_name_for_long():
    with pytest.raises(
        RecipeError, match=r's.yaml:7: methods.baseline: the name baseline.* of a run of it is too long'
    ):
        cells_of(SWEEP.replace('max_duration: [2ba', f'run_name: [{"x" * 250}').replace('run_name', 'optimizer.name'))


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
def test_shipped(path):
    header = path.read_text().split('\n\n')[0]
    assert f'composer-kd sweep benchmarks/sweeps/{path.name}' in header
    study, cells = read_sweep(path)
    assert f'composer-kd report {study.folder}' in header
    students = sum(cell.role == 'student' for cell in cells)
    assert f' {students} runs ' in header
