import hashlib
import importlib
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import parts
import pytest
import torch

from composer_kd.memory import free_closed_runs
from composer_kd.recipes import RecipeError, run
from composer_kd.recipes.metrics_logger import read_metrics
from composer_kd.recording import Journal, Record

HEAD = """\
model: {name: small_convnet, num_classes: 10, width: 4}
train_data: {name: digits, split: train, batch_size: 256}
eval_data: {name: digits, split: test, batch_size: 256}
max_duration: 2ep
optimizer: {name: decoupled_sgdw, lr: 0.1, momentum: 0.9}
device: cpu
"""
TEACHER = HEAD.replace('width: 4', 'width: 6').replace('2ep', '1ep')
STUDENT = """\
teachers: [{name: network, recipe: teacher.yaml}]
algorithms:
  knowledge_distillation: {temperature: 2}
"""


@pytest.fixture
def recipes(write):
    """A teacher's recipe and its student's, for digits."""
    return write('', 'teacher.yaml', TEACHER), write(STUDENT, 'x.yaml', HEAD)


def weights(folder) -> dict[str, torch.Tensor]:
    summary = json.loads((Path(folder) / 'summary.json').read_text())
    return torch.load(Path(folder) / summary['checkpoint'], weights_only=False)['state']['model']


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def without_times(rows):
    return [{name: v for name, v in row.items() if name not in ('seconds', 'time/teacher')} for row in rows]


def test_what_a_run_leaves(write, capsys):
    write('', 'x.yaml', HEAD)
    summary = run('x.yaml', ['max_duration=3ep', 'callbacks.lr_monitor={}'])
    folder = Path('runs/x')
    assert {path.name for path in folder.iterdir()} == {
        *('recipe.yaml', 'checkpoints', 'metrics.jsonl', 'summary.json', 'curves.png')
    }
    assert {path.name for path in (folder / 'checkpoints').iterdir()} == {'ep3-ba15-rank0.pt', 'latest-rank0.pt'}
    assert summary == json.loads((folder / 'summary.json').read_text())
    assert summary['checkpoint'] == 'checkpoints/ep3-ba15-rank0.pt'
    assert summary['checkpoint_sha256'] == hashlib.sha256((folder / summary['checkpoint']).read_bytes()).hexdigest()
    assert (summary['epochs'], summary['batches'], summary['samples'], summary['world_size']) == (3, 15, 3840, 1)
    assert summary['train_seconds'] > 0 and summary['teacher_seconds'] == summary['teacher_forwards'] == 0
    assert summary['samples_per_second'] == summary['samples'] / summary['train_seconds']
    assert summary['parameters'] == sum(
        v.numel() for k, v in weights(folder).items() if 'running' not in k and 'num_b' not in k
    )
    assert summary['versions']['torch'] == torch.__version__.split('+')[0]
    assert (folder / 'curves.png').read_bytes().startswith(b'\x89PNG')

    rows = read_metrics(folder / 'metrics.jsonl')
    assert [row['batch'] for row in rows] == list(range(1, 16))
    assert [row['batch'] for row in rows if 'metrics/eval/MulticlassAccuracy' in row] == [5, 10, 15]
    assert all(isinstance(row['loss/train/total'], float) and 'lr-DecoupledSGDW/group0' in row for row in rows)
    assert summary['metrics']['metrics/eval/MulticlassAccuracy'] == rows[-1]['metrics/eval/MulticlassAccuracy']
    assert summary['metrics']['loss/train/total'] == rows[-1]['loss/train/total']

    printed = capsys.readouterr().out
    assert 'epoch 2  batch 10  eval/' in printed and 'x: 3 epochs, 15 batches' in printed
    assert 'runs/x/curves.png' in printed

    again = run('runs/x/recipe.yaml', ['run_name=again'])  # what it wrote down is the recipe
    assert same(weights('runs/again'), weights(folder)) and again['metrics'].keys() == summary['metrics'].keys()


def test_names_of_runs(write):
    write('', 'x.yaml', HEAD)
    short = ['max_duration=1ba', 'runs_dir=out']
    assert [run('x.yaml', short)['run_name'] for _ in range(3)] == ['x', 'x-2', 'x-3']
    assert run('x.yaml', [*short, 'run_name=y'])['run_name'] == 'y'
    with pytest.raises(RecipeError) as error:
        run('x.yaml', [*short, 'run_name=y'])
    todo = 'out/y is there already; choose another run_name, or go on with that run by autoresume=true'
    assert str(error.value) == f'command line: run_name: {todo}'
    assert sorted(path.name for path in Path('out').iterdir()) == ['x', 'x-2', 'x-3', 'y']
    (Path('out/strange') / 'x').mkdir(parents=True)
    with pytest.raises(RecipeError, match='out/strange is there already'):
        run('x.yaml', [*short, 'run_name=strange', 'autoresume=true'])


def test_checkpoints_that_are_kept_elsewhere(write):
    write('', 'x.yaml', HEAD)
    summary = run('x.yaml', ['max_duration=1ba', 'save_folder=saved'])
    assert Path('runs/x', summary['checkpoint']).resolve().parent == Path('saved').resolve()


@pytest.mark.parametrize('batch', [3, 8])
def test_an_interrupted_run_goes_on(recipes, batch, capsys):
    """Killed once, before the first checkpoint and after it, the run ends as if nothing had happened."""
    more = ['callbacks={parts.Interrupt: {}}', 'max_duration=3ep']
    run('x.yaml', more)
    parts.Interrupt.batch = batch
    with pytest.raises(KeyboardInterrupt):
        run('x.yaml', [*more, 'run_name=y'])
    assert not Path('runs/y/summary.json').exists()
    if batch == 8:  # as if it had been killed where Composer puts a new link in place of this one
        Path('runs/y/checkpoints/latest-rank0.pt').unlink()
    capsys.readouterr()
    summary = run('x.yaml', [*more, 'run_name=y', 'autoresume=true'])
    said = capsys.readouterr().out
    assert ('epoch 1  batch 5 ' in said) == (batch == 3) and 'another recipe' not in said
    assert without_times(read_metrics(Path('runs/y/metrics.jsonl'))) == without_times(
        read_metrics(Path('runs/x/metrics.jsonl'))
    )
    assert same(weights('runs/x'), weights('runs/y'))
    assert summary['teacher_forwards'] == 15
    assert [path.name for path in Path('runs/y/checkpoints').glob('ep*')] == ['ep3-ba15-rank0.pt']

    # Once more: there is nothing left to train, but the summary is whole; and it may be made longer.
    assert run('x.yaml', [*more, 'run_name=y', 'autoresume=true'])['metrics'] == summary['metrics']
    assert 'another recipe' not in capsys.readouterr().out
    assert run('x.yaml', [*more, 'run_name=y', 'autoresume=true', 'max_duration=4ep'])['batches'] == 20
    assert 'going on in runs/y with another recipe than it began with: max_duration changed' in capsys.readouterr().out
    assert [row['batch'] for row in read_metrics(Path('runs/y/metrics.jsonl'))] == list(range(1, 21))


def test_a_damaged_checkpoint_is_not_resumed_from(write):
    write('', 'x.yaml', HEAD)
    summary = run('x.yaml', ['max_duration=1ep'])
    checkpoint = Path('runs/x') / summary['checkpoint']
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(
        RecipeError, match=r'latest-rank0.pt is damaged; put one back that is whole, or delete runs/x'
    ) as error:
        run('x.yaml', ['autoresume=true'])
    assert error.value.exit_code == 1


def test_a_checkpoint_of_another_model_is_not_resumed_from(write):
    write('', 'x.yaml', HEAD)
    run('x.yaml', ['max_duration=1ep'])
    Path('runs/x/summary.json').unlink()  # as if it had been interrupted
    with pytest.raises(RecipeError, match=r'^x.yaml:1: cannot load the checkpoint: .*size mismatch') as error:
        run('x.yaml', ['autoresume=true', 'model.width=5'])
    assert error.value.exit_code == 1
    assert Path('runs/x/checkpoints/latest-rank0.pt').exists()


def test_a_finished_run_keeps_its_recipe(write):
    write('', 'x.yaml', HEAD)
    run('x.yaml', ['max_duration=1ep'])
    before = {name: Path('runs/x', name).read_text() for name in ('recipe.yaml', 'summary.json')}
    with pytest.raises(RecipeError, match=r'runs/x is a finished run of another recipe, .* model.width'):
        run('x.yaml', ['max_duration=1ep', 'autoresume=true', 'model.width=5'])
    assert before == {name: Path('runs/x', name).read_text() for name in before}


def test_teacher_is_trained_once(recipes, capsys):
    first = run('x.yaml')
    assert 'training the teacher teacher.yaml in runs/teacher' in capsys.readouterr().out
    teacher = json.loads(Path('runs/teacher/summary.json').read_text())
    assert first['teacher_training_seconds'] == teacher['train_seconds'] > 0
    assert first['teacher_forwards'] == 10 and 0 < first['teacher_seconds'] < first['train_seconds']
    second = run('x.yaml')
    printed = capsys.readouterr().out
    assert 'found the teacher teacher.yaml in runs/teacher' in printed and 'of them the teachers' in printed
    assert second['run_name'] == 'x-2'
    assert same(weights('runs/x'), weights('runs/x-2'))
    assert json.loads(Path('runs/teacher/summary.json').read_text()) == teacher


def test_the_students_randomness_does_not_depend_on_teachers(recipes, monkeypatch):
    monkeypatch.setattr(parts.InitialWeights, 'weights', [])
    watch = 'callbacks={parts.InitialWeights: {}}'
    deaf = ['algorithms.knowledge_distillation={kd_weight: 0.0, label_weight: 1.0}', watch]
    run('x.yaml', ['run_name=trained', *deaf])
    run('x.yaml', ['run_name=found', *deaf])
    run('x.yaml', ['run_name=alone', 'teachers=[]', 'algorithms={}', watch])
    initial = parts.InitialWeights.weights
    assert len(initial) == 3 and same(initial[0], initial[1]) and same(initial[0], initial[2])
    assert same(weights('runs/trained'), weights('runs/found')) and same(weights('runs/trained'), weights('runs/alone'))
    run('x.yaml', ['run_name=other', 'seed=5', 'teachers=[]', 'algorithms={}', watch])
    assert not same(initial[0], initial[3])


def test_the_teachers_run_frees_its_memory(recipes, write):
    write('callbacks: {parts.RememberState: {}}\n', 'teacher.yaml', TEACHER)
    run('x.yaml', ['callbacks={parts.LookForState: {}}'])
    assert parts.LookForState.found is False


def test_a_run_ends_its_workers_and_frees_its_memory(write, monkeypatch):
    data = '{name: fashion_mnist, synthetic: true, subset: 64, split: train, batch_size: 32, num_workers: 1}'
    overrides = [f'train_data={data}', f'eval_data={data}', 'max_duration=1ep', 'callbacks={parts.RememberState: {}}']
    write('', 'x.yaml', HEAD)
    before, left = {*multiprocessing.active_children()}, []

    def look_and_free():
        left.extend({*multiprocessing.active_children()} - before)
        free_closed_runs()

    monkeypatch.setattr(importlib.import_module('composer_kd.recipes.run'), 'free_closed_runs', look_and_free)
    run('x.yaml', overrides)
    assert not left  # for Python to find: it would wait for each of them for seconds
    assert parts.RememberState.state() is None


def test_an_unfinished_teacher_is_finished(recipes, write, capsys):
    write('callbacks: {parts.Interrupt: {}}\n', 'teacher.yaml', TEACHER.replace('1ep', '2ep'))
    parts.Interrupt.batch = 7
    with pytest.raises(KeyboardInterrupt):
        run('x.yaml')
    assert not Path('runs/x').exists()
    run('x.yaml')
    assert 'training the teacher' in capsys.readouterr().out
    assert [row['batch'] for row in read_metrics(Path('runs/teacher/metrics.jsonl'))] == list(range(1, 11))


def test_another_teacher_than_the_one_that_is_there(recipes, write):
    run('teacher.yaml', ['log_to_console=false'])  # by itself; how it is shown makes no difference
    run('x.yaml', ['run_name=one'])
    write('', 'teacher.yaml', TEACHER.replace('width: 6', 'width: 5'))
    with pytest.raises(RecipeError) as error:
        run('x.yaml', ['run_name=two'])
    assert str(error.value) == (
        'teacher.yaml:1: model.width: runs/teacher is a run of another recipe, which differs in model.width; '
        'delete runs/teacher, or give teacher.yaml another run_name'
    )
    write('run_name: narrow\n', 'teacher.yaml', TEACHER.replace('width: 6', 'width: 5'))
    run('x.yaml', ['run_name=two'])
    assert Path('runs/narrow/summary.json').exists()


def test_what_makes_no_other_teacher(recipes, write, capsys):
    """Where the data lies, how it is fetched, and how the teacher was measured, are no reasons to train it again."""
    fashion = '{name: fashion_mnist, synthetic: true, subset: 256, split: train, batch_size: 256'
    digits = '{name: digits, split: train, batch_size: 256'
    write('', 'teacher.yaml', TEACHER.replace(digits, fashion))
    run('teacher.yaml')
    fetched = 'data_dir: elsewhere, num_workers: 1, persistent_workers: false, prefetch_factor: 3, pin_memory: false'
    lines = TEACHER.replace(digits, f'{fashion}, {fetched}').splitlines(keepends=True)
    write('', 'teacher.yaml', ''.join(line for line in lines if not line.startswith('eval_data')))
    run('x.yaml', ['max_duration=1ba'])
    assert 'found the teacher teacher.yaml in runs/teacher' in capsys.readouterr().out
    write('', 'teacher.yaml', TEACHER)
    with pytest.raises(RecipeError, match=r'which differs in train_data.name, train_data.synthetic, train_data.subset'):
        run('x.yaml')


@pytest.mark.parametrize('damage', ['gone', 'changed', 'no run', 'no summary', 'no mapping', 'half', 'odd', 'binary'])
def test_a_teacher_that_cannot_be_used(recipes, damage):
    checkpoint = Path('runs/teacher') / run('teacher.yaml')['checkpoint']
    summary, recipe = Path('runs/teacher/summary.json'), Path('runs/teacher/recipe.yaml')
    if damage == 'gone':
        checkpoint.unlink()
        message = 'teacher.yaml:1: the checkpoint of runs/teacher is gone; put it back, or delete runs/teacher'
    elif damage == 'changed':
        checkpoint.write_bytes(checkpoint.read_bytes() + b'x')
        message = f'x.yaml:7: teachers.0: {checkpoint}: is not the expected file'
    elif damage in ('half', 'binary', 'odd', 'no summary'):
        what, text = {
            'half': ('cannot read ', summary.read_bytes()[:100]),
            'binary': ('cannot read ', b'\xff\x00'),
            'odd': ('', b'[1, 2]'),
            'no summary': ('', b'{"checkpoint": "checkpoints/latest-rank0.pt"}'),
        }[damage]
        summary.write_bytes(text)
        is_damaged = '' if what else ' is damaged'
        message = f'teacher.yaml:1: {what}{summary}{is_damaged}; delete {summary}, and it is written anew'
    elif damage == 'no mapping':
        recipe.write_text('- [')
        message = f'teacher.yaml:1: cannot read {recipe}; put one back that is whole, or delete runs/teacher'
    else:
        recipe.unlink()
        message = (
            'teacher.yaml:1: runs/teacher is there, but is no run; delete runs/teacher, or give teacher.yaml another'
        )
    with pytest.raises(RecipeError) as error:
        run('x.yaml')
    assert str(error.value).startswith(message)
    assert not Path('runs/x').exists()


def test_a_damaged_recipe_is_not_resumed(write):
    write('', 'x.yaml', HEAD)
    run('x.yaml', ['max_duration=1ba'])
    for text, message in (('a: [', 'cannot read runs/x/recipe.yaml; put'), ('a', 'runs/x/recipe.yaml is damaged; put')):
        Path('runs/x/recipe.yaml').write_text(text)
        with pytest.raises(RecipeError, match=message) as error:
            run('x.yaml', ['autoresume=true'])
        assert error.value.exit_code == 1


def test_a_summary_is_written_anew(recipes):
    before = run('teacher.yaml')
    Path('runs/teacher/summary.json').unlink()  # as the error about a damaged one says
    run('x.yaml')
    after = json.loads(Path('runs/teacher/summary.json').read_text())
    assert (after['checkpoint_sha256'], after['batches']) == (before['checkpoint_sha256'], before['batches'])


MISTAKES = {
    'classes': (['model.num_classes=7'], 'x.yaml:7: teachers: teacher teacher has 10 classes, the student 7', 2),
    'device': (['device=cqu'], 'command line: device: device (cqu) must be one of', 2),
    'batch size': (['train_data.batch_size=0'], 'x.yaml:2: train_data: batch_size=0 counts all ranks', 2),
    'no data': (
        ['train_data={name: imagenet, data_dir: nowhere, split: train, batch_size: 2}'],
        'command line: train_data: ',
        1,
    ),
    'no checkpoint': (
        ['teachers=[{name: network, model: {name: small_convnet}, checkpoint: no.pt}]'],
        'command line: teachers.0: no.pt: no such file; ',
        1,
    ),
    'no load_path': (['load_path=no.pt'], 'x.yaml:1: Local path no.pt does not exist', 1),
    'no checkpoint at all': (['load_path=x.yaml'], 'x.yaml:1: cannot load the checkpoint: ', 1),
    'no classifier': (
        ['model={name: parts.bare_network}'],
        'command line: model: must build a ComposerModel, not Linear',
        2,
    ),
    'a constructor': (['optimizer={name: sgd, lr: -1}'], 'command line: optimizer: Invalid learning rate: -1', 2),
    'runs_dir': (
        ['runs_dir=x.yaml', 'teachers=[]', 'algorithms={}'],
        'command line: runs_dir: cannot make x.yaml/x: Not a directory',
        1,
    ),
    'precision': (['precision=amp_fp16'], 'x.yaml:1: ', 2),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_what_cannot_be_run_leaves_nothing(recipes, mistake):
    overrides, message, exit_code = MISTAKES[mistake]
    run('teacher.yaml')
    before = sorted(Path().rglob('*'))
    with pytest.raises(RecipeError) as error:
        run('x.yaml', overrides)
    assert str(error.value).startswith(message)
    assert '\n' not in str(error.value)
    assert error.value.exit_code == exit_code
    assert sorted(path for path in Path().rglob('*') if '__pycache__' not in str(path)) == before


@pytest.mark.parametrize('mistake', ['classes', 'batch size', 'no data', 'no classifier', 'a constructor'])
def test_mistakes_show_before_a_teacher_is_trained(recipes, mistake, capsys):
    overrides, message, exit_code = MISTAKES[mistake]
    with pytest.raises(RecipeError) as error:
        run('x.yaml', overrides)
    assert (str(error.value)[: len(message)], error.value.exit_code) == (message, exit_code)
    assert 'training' not in capsys.readouterr().out
    assert not Path('runs').exists()


RECORD = 'algorithms.knowledge_distillation.record=record'
UNRECORDABLE = {
    'mixup': ([RECORD, 'algorithms.mixup={}'], 'command line: algorithms.mixup: MixUp changes inputs after the loader'),
    'no record': (['algorithms.knowledge_distillation.record=notes'], 'notes is there, but is no record'),
    'two of the largest': (
        [RECORD, 'algorithms.knowledge_distillation.record_top=3', 'teachers=[TEACHER, TEACHER]'],
        'only the largest logits of the teachers are known, which cannot be averaged',
    ),
    'other data': (
        ['teachers=[TEACHER, {name: recorded, path: other}]'],
        'the record other is of other training data: ',
    ),
    'no keys': ([RECORD, 'train_data={name: parts.without_keys}'], 'does not say which samples are in a batch'),
}


@pytest.mark.filterwarnings('ignore:Cannot split tensor of length')
@pytest.mark.parametrize('mistake', UNRECORDABLE)
def test_what_cannot_be_recorded_shows_before_a_teacher_is_trained(recipes, mistake, capsys):
    overrides, message = UNRECORDABLE[mistake]
    overrides = [override.replace('TEACHER', '{name: network, recipe: teacher.yaml}') for override in overrides]
    Path('notes').mkdir()
    Path('notes', 'thesis.tex').touch()
    if mistake == 'other data':
        own = ['teachers=[{name: network, model: {name: small_convnet, num_classes: 10}}]', 'max_duration=1ba']
        data = '{name: fashion_mnist, split: train, batch_size: 2, synthetic: true, subset: 4}'
        run(
            'x.yaml',
            [
                *own,
                f'train_data={data}',
                'eval_data=null',
                'algorithms.knowledge_distillation.record=other',
                'run_name=y',
            ],
        )
        capsys.readouterr()
    with pytest.raises(RecipeError) as error:
        run('x.yaml', overrides)
    assert message in str(error.value) and '\n' not in str(error.value) and error.value.exit_code == 2
    assert 'training' not in capsys.readouterr().out
    assert not Path('runs', 'teacher').exists() and [path.name for path in Path('notes').iterdir()] == ['thesis.tex']


def test_what_a_run_recorded_that_was_killed_after_its_last_batch(recipes):
    """Its journals become shards when its summary is written."""
    more = [RECORD, 'save_interval=1ba', 'max_duration=3ba']
    run('x.yaml', more)
    whole = {path.name: path.read_bytes() for path in Path('record').iterdir()}
    Path('runs', 'x', 'summary.json').unlink()
    record = Record.open('record')
    journal = Journal(Record.create('record', record.manifest), 0)
    for shard in range(record.shards):
        counts, rows = record.shard(0, shard)
        ids = np.flatnonzero(counts) + shard * record.shard_samples
        journal.append(np.stack([ids, np.zeros_like(ids)], 1), counts[counts > 0], rows)
    journal.close()
    for path in Path('record').glob('view*'):
        path.unlink()
    run('x.yaml', [*more, 'autoresume=true'])
    assert {path.name: path.read_bytes() for path in Path('record').iterdir()} == whole


def test_a_bad_checkpoint_shows_before_another_teacher_is_trained(recipes):
    more = '{name: network, model: {name: small_convnet}, checkpoint: no.pt}'
    with pytest.raises(RecipeError, match=r'^command line: teachers.1: no.pt: no such file'):
        run('x.yaml', [f'teachers=[{{name: network, recipe: teacher.yaml}}, {more}]'])
    assert not Path('runs').exists()


def test_mistakes_in_the_second_teacher_show_before_the_first_is_trained(recipes, write):
    write('', 'second.yaml', TEACHER.replace('batch_size: 256', 'batch_size: 2560'))
    with pytest.raises(RecipeError, match=r'second.yaml:2: train_data: the data set has 1297 samples'):
        run('x.yaml', ['teachers=[{name: network, recipe: teacher.yaml}, {name: network, recipe: second.yaml}]'])
    write('', 'second.yaml', TEACHER)
    run('second.yaml')
    before = sorted(Path().rglob('*'))
    write('', 'second.yaml', TEACHER.replace('width: 6', 'width: 5'))
    with pytest.raises(RecipeError, match=r'runs/second is a run of another recipe'):
        run('x.yaml', ['teachers=[{name: network, recipe: teacher.yaml}, {name: network, recipe: second.yaml}]'])
    assert sorted(Path().rglob('*')) == before


def test_the_teachers_determinism_is_its_own(recipes, write):
    write('deterministic_mode: true\n', 'teacher.yaml', TEACHER)
    cudnn = torch.backends.cudnn
    cudnn.benchmark = True
    try:
        run('x.yaml', ['max_duration=1ba'])
        assert not torch.are_deterministic_algorithms_enabled()
        assert (cudnn.benchmark, cudnn.deterministic) == (True, False)
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.benchmark = cudnn.deterministic = False


def test_a_run_that_fails_in_its_first_batch_leaves_nothing(recipes, monkeypatch):
    hidden = 'teachers=[{name: network, model: {name: parts.hides_its_classes, num_classes: 7}}]'
    with pytest.raises(RecipeError, match='teachers: ') as error:
        run('x.yaml', [hidden])
    assert error.value.exit_code == 1
    assert not Path('runs').exists()
    monkeypatch.setattr(parts.Interrupt, 'batch', 2)
    with pytest.raises(KeyboardInterrupt):
        run('x.yaml', ['teachers=[]', 'algorithms={}', 'callbacks={parts.Interrupt: {}}'])
    assert Path('runs/x/metrics.jsonl').exists()
    with pytest.raises(RecipeError):
        run('x.yaml', [hidden, 'autoresume=true'])
    assert Path('runs/x/metrics.jsonl').exists()


def test_a_teacher_that_says_nan(recipes):
    with pytest.raises(RecipeError, match=r'^command line: teachers: teacher .* gave NaN') as error:
        run('x.yaml', ['teachers=[{name: network, model: {name: parts.says_nan}}]'])
    assert error.value.exit_code == 1
    assert not Path('runs').exists()


def test_own_modules_are_found_where_one_works(write, monkeypatch):
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if path != ''])
    write(
        '',
        'own_for_run.py',
        'from composer_kd.models import small_convnet\ndef mine(): return small_convnet(width=3)\n',
    )
    write('', 'x.yaml', HEAD)
    assert run('x.yaml', ['model={name: own_for_run.mine}', 'max_duration=1ba'])['batches'] == 1


def test_a_recipe_teaches_itself_with_overrides(recipes, capsys):
    """A teacher's recipe needs no file of its own, and its run is found again by the name that it is given."""
    overrides = ['max_duration=1ba', 'teachers=[{name: network, recipe: teacher.yaml, overrides: OVERRIDES}]']
    big, other = (
        [item.replace('OVERRIDES', f'[model.width={width}, run_name=big]') for item in overrides] for width in (8, 9)
    )
    run('x.yaml', big)
    assert 'training the teacher teacher.yaml in runs/big' in capsys.readouterr().out
    assert weights('runs/big')['module.stage1.0.weight'].shape[0] == 8
    state = torch.load(next(Path('runs/x/checkpoints').glob('ep*')), weights_only=False)['state']
    assert dict(state['algorithms'])['KnowledgeDistillation']['teachers'][0]['name'] == 'big'
    run('x.yaml', big)
    assert 'found the teacher teacher.yaml in runs/big' in capsys.readouterr().out
    with pytest.raises(
        RecipeError, match=r'^command line: teachers.0.overrides: model.width: runs/big is a run of anoth'
    ):
        run('x.yaml', other)
