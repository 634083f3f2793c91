"""`composer-kd record`, and runs that learn from what it has recorded."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from composer_kd import cli
from composer_kd.recipes import RecipeError, check, load, run
from composer_kd.record import VERIFIED
from composer_kd.recording import Journal, Record, seal
from helpers import TINY_BERT, another_writer, make_vocabulary, on_two_ranks

DIGITS = """\
seed: 3
max_duration: 2ep
model: {name: small_convnet, num_classes: 10, width: 2}
teachers: [{name: network, model: {name: small_convnet, num_classes: 10, width: 4}}]
train_data: {name: digits, split: train, batch_size: 64}
optimizer: {name: decoupled_sgdw, lr: 0.1, momentum: 0.9}
algorithms: {knowledge_distillation: {temperature: 3.0}}
device: cpu
"""
IMAGES = DIGITS.replace(
    '{name: digits, split: train, batch_size: 64}',
    '{name: fashion_mnist, split: train, batch_size: 16, synthetic: true, subset: 70, augment: true, drop_last: false}',
).replace('2ep', '4ep')
RECORDED = 'teachers=[{name: recorded, path: PATH}]'

pytestmark = pytest.mark.filterwarnings('ignore:Cannot split tensor of length')


@pytest.fixture(autouse=True)
def work_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('x.yaml').write_text(DIGITS)
    Path('images.yaml').write_text(IMAGES)


def record(*arguments):
    return cli.main(['record', *arguments, '-n', '1'])


def recorded(path):
    return RECORDED.replace('PATH', f"'{path}'")


def weights(summary):
    checkpoint = Path('runs', summary['run_name'], summary['checkpoint'])
    return torch.load(checkpoint, weights_only=False)['state']['model']


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def shards(path):
    return {file.name: file.read_bytes() for file in Path(path).glob('view*')}


def test_records_once_and_says_how_to_use_it(capsys):
    assert record('x.yaml') == 0
    said, errors = capsys.readouterr()
    assert errors == ''
    assert re.fullmatch(
        r'records/x: what small_convnet says about 1,297 samples in 1 view, all 10 logits, float32\n'
        r'  0\.1 MiB, 44\.3 bytes for each sample and view\n'
        r'recorded 1,297 samples in [\d.]+ s, [\d,]+ a second; to learn from it without a network:\n'
        r"  teachers: \[\{name: recorded, path: 'records/x'\}\]\n",
        said,
    )
    assert sorted(path.name for path in Path('records/x').iterdir()) == [
        'manifest.json',
        'summary.json',
        *sorted(shards('records/x')),
    ]
    before = shards('records/x')
    assert record('x.yaml') == 0
    assert 'recorded 0 samples, all were there already' in capsys.readouterr().out
    assert shards('records/x') == before
    assert record('x.yaml', '--verify') == 0
    line = f'records/x: {VERIFIED} samples, with {VERIFIED} vectors of logits, were asked about again: logits differ by'
    assert capsys.readouterr().out.startswith(line)


def test_learning_from_it_is_learning_online():
    record('x.yaml')
    online, replayed = run('x.yaml'), run('x.yaml', [recorded('records/x'), 'run_name=y'])
    assert same(weights(online), weights(replayed))
    assert (online['teacher_forwards'], replayed['teacher_forwards']) == (40, 0)


def test_views(capsys):
    assert record('images.yaml') == 2
    assert capsys.readouterr().err == (
        'images.yaml:5: train_data: makes new views of the samples in each epoch; say how many to record by --views N, '
        'or by train_data.views=N (1 if nothing is drawn at random)\n'
    )
    assert not Path('records/images').exists()
    assert record('images.yaml', '--views', '2', '--out', 'elsewhere', 'algorithms.knowledge_distillation={}') == 0
    said = capsys.readouterr().out
    assert 'about 70 samples in 2 views' in said and '  train_data.views: 2\n' in said
    assert Record.open('elsewhere').views() == [0, 1]
    two = ['train_data.views=2']
    online, replayed = run('images.yaml', two), run('images.yaml', [*two, recorded('elsewhere'), 'run_name=y'])
    assert same(weights(online), weights(replayed))
    assert record('images.yaml', '--views', '3', '--out', 'elsewhere') == 0  # one more view is added
    assert 'recorded 70 samples' in capsys.readouterr().out
    assert not same(weights(run('images.yaml', ['train_data.views=3', 'run_name=z'])), weights(online))


def test_the_largest_logits(capsys):
    assert record('x.yaml', '--top', '4') == 0
    said = capsys.readouterr().out
    assert 'the 4 largest of 10 logits, float16' in said
    (mass,) = re.findall(r'the other classes weigh ([\d.]+)% on average at temperature 3\n', said)
    assert Record.open('records/x').format.temperatures == (1.0, 2.0, 3.0, 4.0, 8.0)
    keys = np.array([(sample, 0) for sample in range(1297)])
    logits = Record.open('records/x').format.decode(torch.from_numpy(Record.open('records/x').lookup(keys)[0]))
    assert abs(float(mass) - 100 * logits.tail_mass(3.0).mean()) < 2
    assert record('x.yaml', '--verify') == 0
    line = r'differ by up to ([\d.e-]+), rounding explains ([\d.e-]+); the 4 largest are of the same classes in 25\d'
    difference, explained = map(float, re.search(line, capsys.readouterr().out).groups())
    assert 0 < difference < explained < 0.01
    online, replayed = run('x.yaml'), run('x.yaml', [recorded('records/x'), 'run_name=y'])
    assert replayed['teacher_forwards'] == 0
    assert replayed['metrics']['loss/train/kd'] < online['metrics']['loss/train/kd']  # by what cannot be known
    assert record('x.yaml', '--top', '4', '--dtype', 'float32') == 1
    assert 'is another record: dtype: float16 there, float32 here' in capsys.readouterr().err


def test_several_teachers(capsys):
    two = '{name: network, model: {name: small_convnet, width: WIDTH}}'
    teachers = f'teachers=[{two.replace("WIDTH", "3")}, {two.replace("WIDTH", "5")}]'
    assert record('x.yaml', teachers) == 0
    assert "path: 'records/x/*'" in capsys.readouterr().out
    assert record('x.yaml', teachers, '--verify') == 0
    online, replayed = run('x.yaml', [teachers]), run('x.yaml', [recorded('records/x/*'), 'run_name=y'])
    assert same(weights(online), weights(replayed))
    assert (online['teacher_forwards'], replayed['teacher_forwards']) == (80, 0)


def test_verify_finds_what_is_wrong(capsys):
    assert record('x.yaml', '--verify') == 1
    assert 'records/x: there is no record' in capsys.readouterr().err
    record('x.yaml')
    record('x.yaml', '--top', '3', '--out', 'top')
    for path in ('records/x', 'top'):
        writer = Record.create(path, Record.open(path).manifest)
        for shard in range(writer.shards):
            counts, rows = (x.copy() for x in writer.shard(0, shard))
            values = rows[:, :2].view(np.float16) if path == 'top' else rows[:, :4].view(np.float32)
            values += np.array(0.05, values.dtype)
            writer.write(0, shard, counts, rows)
        capsys.readouterr()
        assert record('x.yaml', '--verify', '--out', path) == 1
        said, error = capsys.readouterr()
        assert said == '' and re.search(rf'{path}: 256 samples, .* logits differ by up to 0\.0[45]', error)
    broken = sorted(Path('top').glob('view*'))[2]
    broken.write_bytes(broken.read_bytes()[:-1])
    assert record('x.yaml', '--verify', '--out', 'top') == 1
    todo = 'run the same without --verify, which'
    assert capsys.readouterr().err == f'x.yaml:4: teachers: {broken} is damaged: {todo} rewrites it\n'
    broken.unlink()
    assert record('x.yaml', '--verify', '--out', 'top') == 1
    assert capsys.readouterr().err == f'x.yaml:4: teachers: top lacks samples in 1 shard: {todo} adds them\n'


def test_what_is_torn_or_missing_is_recorded_again(capsys):
    record('x.yaml')
    whole = shards('records/x')
    first, second, third, *_ = sorted(whole)
    Path('records/x', first).unlink()
    Path('records/x', second).write_bytes(whole[second][:100])
    Path('records/x', f'.{third}.tmp').write_bytes(b'half')
    Path('records/x', 'journal-0.bin').write_bytes(b'torn')
    capsys.readouterr()
    assert record('x.yaml') == 0
    assert f'recorded {2 * Record.open("records/x").shard_samples} samples' in capsys.readouterr().out
    assert shards('records/x') == whole
    assert not [path.name for path in Path('records/x').iterdir() if path.name.startswith(('.', 'journal'))]


def test_a_run_that_records_is_completed(capsys):
    """What a run left out is added to what it said, which stays; and the other way round."""
    fly = 'algorithms.knowledge_distillation={temperature: 3.0, record: fly}'
    run('x.yaml', [fly, 'max_duration=1ep'])
    keys = np.array([(sample, 0) for sample in range(1297)])
    partly, counts = Record.open('fly').lookup(keys)
    assert counts.sum() == 20 * 64
    capsys.readouterr()
    assert record('x.yaml', fly) == 0  # into the record of the recipe
    assert 'recorded 17 samples' in capsys.readouterr().out
    rows, all_of_them = Record.open('fly').lookup(keys)
    assert all_of_them.sum() == 1297 and np.array_equal(rows[counts > 0], partly)
    assert run('x.yaml', [fly, 'run_name=y'])['teacher_forwards'] == 0


def test_text(tmp_path, capsys):
    words = ['cat', 'dog', 'bird', 'fish', 'cow']
    Path('text.txt').write_text('\n'.join(' '.join([*words[n % 5 :], *words[: n % 7]]) for n in range(40)))
    make_vocabulary('vocab.txt')
    model = {'name': 'masked_lm', 'tokenizer': 'vocab.txt', 'config': TINY_BERT | {'hidden_dropout_prob': 0.0}}
    data = '{name: text, split: train, batch_size: 8, path: text.txt, tokenizer: vocab.txt, max_length: 16, pack: true}'
    recipe = [
        f'model={model}',
        f'teachers=[{{name: network, model: {model | {"config": TINY_BERT}}}}]',
        f'train_data={data}',
        'max_duration=4ep',
        'device_train_microbatch_size=4',
    ]
    assert record('x.yaml', *recipe, '--views', '2', '--top', '77') == 0
    assert 'in 2 views, all 77 logits, float32' in capsys.readouterr().out
    assert record('x.yaml', *recipe, '--views', '2', '--verify') == 0
    recipe.append('train_data.views=2')
    online = weights(run('x.yaml', recipe))
    replayed = weights(run('x.yaml', [*recipe, recorded('records/x'), 'run_name=y']))
    for key in online:
        torch.testing.assert_close(replayed[key], online[key], rtol=0, atol=1e-5)


TWO_RANKS = """
import torch
torch.set_num_threads(1)
from composer_kd.record import record
for options in ({}, {'verify': True}, {'out': 'torn', 'top': 3}):
    record('x.yaml', **options)
"""


def test_two_ranks():
    record('x.yaml', '--out', 'one')
    record('x.yaml', '--out', 'torn', '--top', '3')
    whole = shards('torn')
    for name in sorted(whole)[3:8]:
        Path('torn', name).unlink()
    first, second = on_two_ranks(TWO_RANKS, '.')
    assert shards('one') == shards('records/x') and shards('torn') == whole
    assert f'records/x: {VERIFIED} samples' in first and second.count('records/x') == 0


@pytest.mark.dist
def test_starts_its_ranks():
    command = [sys.executable, '-W', 'ignore', '-m', 'composer_kd', 'record', 'x.yaml', '-n', '2', 'seed=5']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    assert done.stdout.startswith('records/x: what small_convnet says about 1,297 samples')
    before = shards('records/x')
    record('x.yaml', 'seed=5')
    assert shards('records/x') == before and not Record.open('records/x').missing(1)
    failed = subprocess.run([*command[:-1], 'seed=-1'], capture_output=True, text=True, timeout=120)
    assert (failed.returncode, failed.stderr.splitlines()[0]) == (
        2,
        'command line: seed: must be from 0 to 2**32 - 2, not -1',
    )


# Arguments, and the whole line on stderr, with the exit code.
BAD = {
    'no teachers': (
        ['teachers=[]', 'algorithms={}'],
        'x.yaml:1: there is no teacher to record; add a `teachers` sec',
        2,
    ),
    'recorded teachers': (
        [recorded('records/y')],
        'command line: teachers.0: speaks from a record already; there is nothing to record',
        2,
    ),
    'record_top': (
        ['algorithms.knowledge_distillation={record_top: 11, record: r}'],
        'command line: algorithms.knowledge_distillation.record_top: 11 logits cannot be recorded of 10 classes',
        2,
    ),
    'no views': (['--views', '2'], "command line: train_data.views: digits has no argument 'views'", 2),
    'views': (['images.yaml', '--views', '0'], 'images.yaml:5: train_data: views must be at least 1', 2),
    'top': (['--top', '11'], 'command line: --top: 11 logits cannot be recorded of 10 classes', 2),
    'no top': (['--top', '0'], 'command line: --top: 0 logits cannot be recorded of 10 classes', 2),
    'folder': (['--out', 'x.yaml/a'], 'x.yaml:4: teachers: cannot write the record x.yaml/a: Not a directory', 1),
    'no record': (['--out', 'full'], 'x.yaml:4: teachers: full is there, but is no record; choose another path', 1),
    'mix_up': (['algorithms.mix_up={}'], 'command line: algorithms.mix_up: MixUp changes inputs after the loader', 2),
    'one view': (
        ['images.yaml', '--views', '2', 'train_data.augment=false'],
        'images.yaml:5: train_data: nothing is drawn at random for a sample of this data set, so one view is all',
        2,
    ),
    **{
        algorithm: (
            ['images.yaml', '--views', '2', f'algorithms.{algorithm}={options}'],
            f'command line: algorithms.{algorithm}: {name} adds a transform to the data set only when a run '
            'begins: record as a run learns, by algorithms.knowledge_distillation.record=PATH, or leave it out',
            2,
        )
        for algorithm, options, name in (
            ('rand_augment', '{}', 'RandAugment'),
            ('aug_mix', '{}', 'AugMix'),
            ('col_out', '{batch: false}', 'ColOut'),
        )
    },
    'split': (
        ['train_data.split=test'],
        'x.yaml:5: train_data: the training data does not say which samples are in a batch, which a record needs to '
        'know: set split=train, or let composer_kd.data.data_spec(train=True) deal it out',
        2,
    ),
    'precision': (['precision=amp_bf16'], 'command line: precision: amp_bf16 needs a GPU', 2),
    'no such file': (['no.yaml'], 'no.yaml: cannot read the recipe: No such file', 2),
}


@pytest.mark.parametrize('case', BAD)
def test_what_cannot_be_recorded(case, capsys):
    Path('full').mkdir()
    Path('full/letter.txt').touch()
    arguments, message, exit_code = BAD[case]
    file = [] if arguments[0].endswith('.yaml') else ['x.yaml']
    assert record(*file, *arguments) == exit_code
    said, error = capsys.readouterr()
    assert error.startswith(message) and error.count('\n') == 1
    assert said == ''
    assert not list(Path().rglob('*.rows')) and not list(Path().rglob('.lock'))


def test_streams_cannot_be_recorded(capsys):
    make_vocabulary('vocab.txt')
    Path('c4').mkdir()
    Path('c4/train.txt').write_text('the cat\n' * 20)
    model = {'name': 'masked_lm', 'tokenizer': 'vocab.txt', 'config': TINY_BERT}
    data = {'name': 'c4', 'split': 'train', 'batch_size': 4, 'data_dir': 'c4', 'tokenizer': 'vocab.txt'}
    data |= {'num_workers': 0, 'max_length': 16}
    stream = [f'model={model}', f'teachers=[{{name: network, model: {model}}}]', f'train_data={data}']
    assert record('x.yaml', *stream, 'max_duration=2ba') == 2
    what = 'the training data does not say which samples are in a batch, which a record needs to know: streams never do'
    assert capsys.readouterr().err.startswith(f'command line: train_data: {what}')


def test_another_job_writes(capsys):
    Path('records/x').mkdir(parents=True)
    with another_writer('records/x'):
        assert record('x.yaml') == 1
    todo = 'wait until it is done, end it if it is a notebook whose run has failed, or choose another path'
    message = f'x.yaml:4: teachers: another process writes the record records/x; {todo}\n'
    assert capsys.readouterr() == ('', message)
    assert record('x.yaml') == 0


def test_mistakes_show_before_a_teacher_is_trained(capsys):
    Path('teacher.yaml').write_text(DIGITS.replace('teachers', '# teachers').replace('algorithms', '# algorithms'))
    taught = 'teachers=[{name: network, recipe: teacher.yaml}]'
    assert record('x.yaml', taught, '--top', '20') == 2
    assert record('x.yaml', taught, '--verify') == 1
    assert capsys.readouterr().err.endswith('records/x: there is no record; composer-kd record makes one\n')
    record('x.yaml', '--top', '3', '--out', 'top')
    for arguments, message in (
        (['--top', '4'], 'top is another record: k: 3 there, 4 here; choose another path, or delete it'),
        (['--top', '4', '--verify'], 'teachers.0: the teacher is still to be trained: run the same without --verify'),
    ):
        assert record('x.yaml', taught, '--out', 'top', *arguments) in (1, 2)
        assert message in capsys.readouterr().err
    assert not Path('runs').exists() and 'training' not in capsys.readouterr().out
    assert record('x.yaml', taught, 'max_duration=1ep') == 0
    assert 'training the teacher teacher.yaml in runs/teacher' in capsys.readouterr().out
    assert record('x.yaml', taught) == 0
    assert 'found the teacher teacher.yaml in runs/teacher' in capsys.readouterr().out


def test_a_teacher_that_says_nan(capsys):
    Path('odd.py').write_text(
        'import torch\nfrom composer.models import ComposerClassifier\n'
        'class Odd(torch.nn.Module):\n'
        '    def forward(self, images):\n'
        '        return torch.full((len(images), 10), torch.nan)\n'
        'def odd():\n    return ComposerClassifier(Odd(), num_classes=10)\n'
    )
    assert record('x.yaml', 'teachers=[{name: network, model: {name: odd.odd}}]') == 1
    message = (
        'command line: teachers: teacher odd, samples 0 to 127 in view 0: a logit of the teacher is NaN or infinite\n'
    )
    assert capsys.readouterr().err == message
    assert not shards('records/x')


def test_another_record_is_named_by_its_parts(capsys):
    record('x.yaml')
    with pytest.raises(RecipeError, match='is of other training data: samples: 1297 there, 70 here'):
        run('images.yaml', ['train_data.views=1', recorded('records/x')])
    other = 'teachers=[{name: network, model: {name: small_convnet, num_classes: 10, width: 3}}]'
    record('images.yaml', '--views', '1')
    for arguments, part in (
        (['x.yaml', other], 'records/x is another record: teacher parameters: '),
        (
            ['images.yaml', '--views', '1', 'train_data.view_seed=5'],
            'another record: view_seed: 0 there, 5 here;',
        ),
        (['images.yaml', '--views', '1', 'train_data.augment=false'], 'another record: transform: '),
        (['images.yaml', '--views', '1', 'train_data.subset=80'], 'another record: samples: 70 there, 80 here; choose'),
    ):
        capsys.readouterr()
        assert record(*arguments) == 1
        assert part in capsys.readouterr().err


def test_a_recipe_is_checked_without_its_record():
    check(load('x.yaml', [recorded('records/none')]))
    with pytest.raises(RecipeError, match=r'^command line: teachers.0: records/none: there is no record; composer-kd'):
        run('x.yaml', [recorded('records/none')])
    assert not Path('runs').exists()


def test_journals_that_a_killed_run_left_are_used(capsys):
    record('x.yaml')
    whole = shards('records/x')
    keys = np.array([(sample, 0) for sample in range(1297)])
    rows, counts = Record.open('records/x').lookup(keys)
    for name in whole:
        Path('records/x', name).unlink()
    writer = Record.create('records/x', Record.open('records/x').manifest)
    journal = Journal(writer, 3)
    journal.append(keys[:500], counts[:500], rows[:500])
    journal.close()
    capsys.readouterr()
    assert record('x.yaml') == 0
    assert 'recorded 797 samples' in capsys.readouterr().out
    assert shards('records/x') == whole
    seal(writer)  # has nothing to do
