import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from study_parts import METRIC, write_recipes

from composer_kd.recipes import RecipeError, check, load, run
from composer_kd.recipes.folder import differences, essence
from composer_kd.recipes.load import as_override, read
from composer_kd.recipes.lock import FolderLock
from composer_kd.record import record
from composer_kd.studies.cell import Cell
from composer_kd.studies.study import Override, Study


@pytest.fixture(autouse=True)
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipes()
    Path('s.yaml').write_text(f'metric: {METRIC}\n')
    return Study.of(read('s.yaml', 'study'), 'sweep', ())


KEYS = st.sampled_from(['model', 'device', 'save_interval'])
VALUE = st.recursive(st.integers(0, 1) | st.none(), lambda inner: st.dictionaries(KEYS, inner), max_leaves=4)
RECIPES = st.dictionaries(KEYS, VALUE)
VALUES = ['2ep', '', ' a', 'a: b', '1', 'true', 'null', '1e-3', '"', "it's", 'é\n', '${seed}', None, True, 3, 1e-5]


@pytest.mark.parametrize('value', [*VALUES, [1, 'a', None], {'name': 'x', 'y': [{'z': '1.0'}]}, {}], ids=repr)
def test_an_override_gives_the_value_back(value):
    recipe = load('recipes/base.yaml', [as_override('loggers', value)])
    assert recipe.config['loggers'] == (17 if value == '${seed}' else value)


def test_a_run(study):
    cell = Cell.of_run(
        study, 'x', 'kd', Path('recipes/base.yaml'), [Override('optimizer.lr', 0.2)], seed=3, arm='a', step=1
    )
    assert cell.finished() is None and cell.folder == Path('runs/s/x') and cell.log == Path('runs/s/x.log')
    summary = run(cell.arguments[0], cell.arguments[1:])
    assert cell.finished() == summary
    row = cell.row()
    assert row['metrics'] == summary['metrics'] and row['train_seconds'] == summary['train_seconds']
    assert (row['cell'], row['method'], row['seed'], row['arm'], row['step']) == ('x', 'kd', 3, 'a', 1)
    assert row['config']['optimizer'] == {'name': 'sgd', 'lr': 0.2}
    assert not {'runs_dir', 'run_name'} & row['config'].keys()
    assert json.loads(json.dumps(row)) == row
    failed = cell.row(error='the end')
    assert failed.keys() == row.keys() and (failed['status'], failed['error']) == ('failed', 'the end')

    whole = Path('runs/s/x/summary.json').read_text()
    Path('runs/s/x/summary.json').write_text(json.dumps(summary | {'metrics': None}))
    with pytest.raises(
        RecipeError, match=r'runs/s/x/summary\.json is damaged; delete runs/s/x/summary\.json, and it is'
    ):
        cell.finished()
    Path('runs/s/x/summary.json').write_text(whole)

    other = Cell.of_run(
        study, 'x', 'kd', Path('recipes/base.yaml'), [Override('optimizer.lr', 0.1, 's.yaml:9')], seed=3
    )
    with pytest.raises(RecipeError, match=r'^s\.yaml:9: optimizer\.lr: runs/s/x is a run of another recipe'):
        other.finished()
    other = Cell.of_run(
        study,
        'x',
        'kd',
        Path('recipes/base.yaml'),
        [Override('optimizer.lr', 0.2), Override('eval_data.subset', 9)],
        seed=3,
    )
    with pytest.raises(RecipeError, match=r'runs/s/x was evaluated with other eval_data\.subset'):
        other.finished()


@given(RECIPES, RECIPES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_recipes_that_train_the_same_are_of_one_essence(study, one, other):
    assert (essence(one) == essence(other)) == (not differences(one, other))


def test_what_a_cell_leaves_does_not_depend_on_where_its_data_lies_or_how_it_is_loaded(study):
    def digest(*overrides):
        own = [Override(*each) for each in overrides]
        return Cell.of_run(study, 'x', 'kd', Path('recipes/base.yaml'), own, seed=3).digest

    assert digest(('train_data.num_workers', 1), ('device', 'cpu'), ('save_interval', '2ba')) == digest()
    assert digest(('optimizer.lr', 0.2)) != digest()


def test_at_work(study):
    cell = Cell.of_run(study, 'x', 'kd', Path('recipes/base.yaml'))
    assert not cell.is_at_work()
    with FolderLock(cell.recipe) as lock:
        lock.take(cell.folder)
        with pytest.raises(RecipeError):  # of this very process; of another one, it would be told
            cell.is_at_work()
    assert not cell.is_at_work()


def test_records_of_two_teachers(study):
    """Each has its part of the cost; what the training of both took is told, too."""
    of_teacher = '{name: network, recipe: teacher.yaml}'
    of_other = '{name: network, recipe: base.yaml, overrides: [max_duration=1ba, run_name=other]}'
    teachers = Override(
        'teachers', load('recipes/kd.yaml', [f'teachers=[{of_teacher}, {of_other}]']).config['teachers']
    )
    cell = Cell.of_record(study, 'x-record', 'x', Path('recipes/kd.yaml'), [teachers])
    assert cell.records == [Path('runs/s/records/x/0'), Path('runs/s/records/x/1')]
    pattern = Override('teachers.0.path', 'runs/s/records/x/*')
    student = Cell.of_run(study, 'y', 'x', Path('recipes/recorded.yaml'), [pattern], after=[cell])
    assert [teacher.call.arguments['path'] for teacher in student.plan.teachers] == list(map(str, cell.records))
    assert cell.finished() is None

    threads = torch.get_num_threads()
    record(cell.command[1], cell.command[2:-2], out=cell.command[-1])
    torch.set_num_threads(threads)
    summary = cell.finished()
    assert summary is not None and summary['views'] == 2
    parts = [json.loads((folder / 'summary.json').read_text()) for folder in cell.records]
    assert parts[0]['seconds'] == parts[1]['seconds'] == pytest.approx(summary['train_seconds'] / 2)
    trained = [json.loads(Path('runs/s', name, 'summary.json').read_text()) for name in ('teacher', 'other')]
    assert [part['teacher_training_seconds'] for part in parts] == [one['train_seconds'] for one in trained]
    run(student.arguments[0], student.arguments[1:])
    row = student.row()
    assert row['recording_seconds'] == pytest.approx(summary['train_seconds'])
    assert row['teacher_training_seconds'] == pytest.approx(sum(one['train_seconds'] for one in trained))
    assert (cell.records[0] / 'manifest.json').exists() and cell.row()['metrics'] == {}

    changed = Cell.of_record(study, 'x-record', 'x', Path('recipes/kd.yaml'), [teachers, Override('optimizer.lr', 1.0)])
    assert changed.finished() is None
    check(changed.recipe)
    whole = parts[1]
    for damaged in (
        '{',
        json.dumps({k: v for k, v in whole.items() if k != 'config'}),
        json.dumps(whole | {'views': '2'}),
    ):
        (cell.records[1] / 'summary.json').write_text(damaged)
        with pytest.raises(RecipeError, match=r'runs/s/records/x/1/summary\.json is damaged; delete it'):
            cell.finished()
