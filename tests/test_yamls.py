"""Every YAML that we ship: right by the checker, and trains; twins differ in the distillation alone."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from composer_kd import cli
from composer_kd.models import masked_lm
from composer_kd.recipes import check, load, run
from composer_kd.recipes.metrics_logger import read_metrics
from helpers import TINY_BERT, in_forks, launched, make_imagefolder, make_vocabulary

YAMLS = sorted((Path(__file__).parents[1] / 'yamls').glob('*.yaml'))
NAMES = [path.stem for path in YAMLS]
TEAMS = [path for path in YAMLS if 'codistillation' in path.stem]
BLOCKWISE = [path for path in YAMLS if 'blockwise' in path.stem]
RECORDED = [path for path in YAMLS if path.stem.endswith('_recorded')]
DISTILLATION = {'knowledge_distillation', 'teacher_sampling', 'early_stop_distillation'}

WORDS = ('cat', 'dog', 'bird', 'fish')
BERT = TINY_BERT | {'max_position_embeddings': 128}
SMALL_BERT = [f'model.config.{name}={value}' for name, value in BERT.items()]
SHRUNK = {
    'digits': ['train_data.batch_size=32'],
    'fashion': [
        'train_data.batch_size=32',
        'train_data.synthetic=true',
        'train_data.subset=64',
        'train_data.download=false',
    ],
    'bert_docs': [*SMALL_BERT, 'train_data.batch_size=8'],
    'bert_text': [*SMALL_BERT, 'train_data.batch_size=8', 'model.tokenizer=vocab.txt'],
    'bert_mlm': [
        *SMALL_BERT,
        'model.tokenizer=vocab.txt',
        'precision=fp32',
        'device_train_microbatch_size=4',
        'train_data.batch_size=8',
        'train_data.num_workers=0',
    ],
    'vgg16': ['model.width=4', 'train_data.batch_size=8', 'train_data.synthetic=true', 'train_data.download=false'],
    'text_classification': ['train_data.batch_size=4', 'model.pretrained=pretrained'],
    'resnet50': ['train_data.batch_size=4', 'train_data.crop_size=64', 'train_data.num_workers=0', 'precision=fp32'],
}


def shrunk(path: Path) -> list[str]:
    config = load(path).config
    family = next(family for family in SHRUNK if path.stem.startswith(family))
    overrides = SHRUNK[family] + ['max_duration=2ba', 'eval_data=null', 'eval_interval=1']
    if 'linear_with_warmup' in config['schedulers']:
        overrides.append('schedulers.linear_with_warmup.t_warmup=1ba')
    for index, teacher in enumerate(config.get('teachers') or []):  # without a network there are no published weights
        if 'weights' in teacher.get('model', {}):
            overrides.append(f'teachers.{index}.model.weights=null')
        if 'pretrained' in teacher.get('model', {}):
            overrides.append(f'teachers.{index}.model.pretrained=pretrained')
    return overrides


def copy_beside(path: Path, folder: Path) -> Path:
    """A copy of a recipe, with shrunk ones of its teachers beside it."""
    folder.mkdir(exist_ok=True)
    for teacher in load(path).config.get('teachers') or []:
        if 'recipe' in teacher:
            source = path.parent / teacher['recipe']
            (folder / source.name).write_text(yaml.safe_dump(load(source, shrunk(source)).config))
    copy = folder / path.name
    copy.write_text(path.read_text())
    return copy


def record_command(path: Path) -> list[str]:
    """The arguments of the command that makes the record of a recipe, as its header has them."""
    (command,) = re.findall(r'composer-kd (record yamls/.*)', path.read_text())
    return shlex.split(command)


def local_data(folder: Path, monkeypatch) -> None:
    """What the recipes read, small and made up, where their environment variables say."""
    make_imagefolder(folder / 'imagenet', classes=2, per_class=8)
    make_vocabulary(folder / 'vocab.txt')
    lines = [f'the {noun} {verb} a {other}' for noun in WORDS for verb in WORDS for other in WORDS]
    (folder / 'c4').mkdir()
    (folder / 'c4' / 'c4-train.00000-of-00001.json').write_text(''.join(f'{{"text": "{x}"}}\n' for x in lines))
    (folder / 'c4' / 'c4-validation.00000-of-00001.json').write_text(f'{{"text": "{lines[0]}"}}\n')
    (folder / 'text.txt').write_text('\n'.join(lines))
    for name in ('train', 'validation'):
        rows = ''.join(f'{line}\t{index % 2}\n' for index, line in enumerate(lines[:16]))
        (folder / f'{name}.tsv').write_text(f'sentence\tlabel\n{rows}')
    monkeypatch.setenv('IMAGENET_DIR', str(folder / 'imagenet'))
    monkeypatch.setenv('C4_DIR', str(folder / 'c4'))
    for name in ('TEXT', 'TRAIN_FILE', 'VALIDATION_FILE'):
        monkeypatch.delenv(name, raising=False)
    model = masked_lm(config=BERT, tokenizer=str(folder / 'vocab.txt'))
    model.model.save_pretrained(folder / 'pretrained')
    model.tokenizer.save_pretrained(folder / 'pretrained')


@pytest.mark.parametrize('path', YAMLS, ids=NAMES)
def test_checks(path):
    check(load(path))


@pytest.mark.filterwarnings('ignore::UserWarning:torch', 'ignore:.*lr_scheduler.step:UserWarning')
@pytest.mark.parametrize('path', [path for path in YAMLS if path not in TEAMS + BLOCKWISE], ids=lambda path: path.stem)
def test_trains_two_batches(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local_data(tmp_path, monkeypatch)
    recipe = copy_beside(path, tmp_path / 'yamls')
    is_recorded = path in RECORDED
    if is_recorded:
        command, file, *options = record_command(path)
        twin = path.parents[1] / file
        copy_beside(twin, tmp_path / 'yamls')
        assert cli.main([command, file, *shrunk(twin), *options, '-n', '1']) == 0
    summary = run(recipe, shrunk(path))
    assert summary['batches'] == 2
    distills = 'teachers' in load(path).config
    assert (summary['teacher_forwards'] > 0) == (distills and not is_recorded)
    folder = tmp_path / 'runs' / path.stem
    assert any('loss/train/kd' in row for row in read_metrics(folder / 'metrics.jsonl')) == distills
    assert json.loads((folder / 'summary.json').read_text()) == summary
    assert (folder / summary['checkpoint']).is_file() and (folder / 'curves.png').is_file()


@pytest.mark.filterwarnings('ignore:.*lr_scheduler.step:UserWarning')
@pytest.mark.parametrize('path', BLOCKWISE, ids=lambda path: path.stem)
def test_learns_block_by_block(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local_data(tmp_path, monkeypatch)
    summary = run(copy_beside(path, tmp_path / 'yamls'), shrunk(path))
    folder = tmp_path / 'runs' / path.stem
    assert summary['batches'] == 2 and json.loads((folder / 'summary.json').read_text()) == summary
    assert (folder / summary['checkpoint']).is_file() and [*summary['stages'].values()] == [1]


@pytest.mark.dist
@pytest.mark.parametrize(
    ('path', 'exchange'),
    [
        *((path, None) for path in TEAMS),
        (YAMLS[0].parent / 'bert_mlm_codistillation.yaml', '{name: predictions, top: 5}'),
    ],
    ids=lambda value: getattr(value, 'stem', value),
)
def test_two_teams_train_three_batches(path, exchange, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local_data(tmp_path, monkeypatch)
    config = load(path).config
    overrides = [*shrunk(path), 'max_duration=3ba']
    by_weights = exchange is None and isinstance(config['algorithms']['codistillation']['exchange'], dict)
    if exchange:
        overrides.append(f'algorithms.codistillation.exchange={exchange}')
    if by_weights:
        overrides.append('algorithms.codistillation.exchange.interval=1ba')
    in_forks(_run_rank, 2 * [(str(copy_beside(path, tmp_path / 'yamls')), overrides)], launched(2), 120)
    folder = tmp_path / 'runs' / path.stem
    assert json.loads((folder / 'summary.json').read_text())['best_team'] in (0, 1)
    for team in ('team0', 'team1'):
        assert any('codistillation/bytes' in row for row in read_metrics(folder / team / 'metrics.jsonl'))
        assert any('loss/train/kd' in row for row in read_metrics(folder / team / 'metrics.jsonl'))
        summary = json.loads((folder / team / 'summary.json').read_text())
        assert (summary['teacher_forwards'] > 0) == by_weights and summary['batches'] == 3


def _run_rank(recipe, overrides):
    run(recipe, overrides)


@pytest.mark.parametrize('path', [path for path in YAMLS if '_kd' in path.stem], ids=lambda path: path.stem)
def test_a_twin_differs_in_the_distillation_alone(path):
    baseline = path.with_name(path.stem.split('_kd')[0] + '.yaml')

    def content(path):
        return [line for line in path.read_text().splitlines() if not line.startswith('#')]

    def undistilled(path):
        config = load(path).config
        config.pop('teachers', None)
        algorithms = {k: v for k, v in (config.pop('algorithms', None) or {}).items() if k not in DISTILLATION}
        return {**config, **({'algorithms': algorithms} if algorithms else {})}

    assert undistilled(path) == load(baseline).config
    assert set(content(baseline)) < set(content(path))


@pytest.mark.parametrize('path', RECORDED, ids=lambda path: path.stem)
def test_a_recorded_twin_differs_in_the_teacher_and_its_views_alone(path):
    command = record_command(path)
    twin = path.parents[1] / command[1]
    assert twin.name == path.name.replace('_recorded', '_kd')
    recorded, online = load(path).config, load(twin).config
    (teacher,) = recorded.pop('teachers')
    assert teacher == {'name': 'recorded', 'path': f'records/{twin.stem}'}
    del online['teachers']
    for name in ('augment', 'views'):
        if value := recorded['train_data'].pop(name, None):
            given = f'train_data.{name}={str(value).lower()}' if name == 'augment' else f'--{name} {value}'
            assert given in shlex.join(command)
    assert recorded == online


@pytest.mark.parametrize('path', YAMLS, ids=NAMES)
def test_the_header_names_the_command(path):
    header = path.read_text().split('\n\n')[0].splitlines()
    assert all(line.startswith('#') for line in header)
    assert any(re.search(rf'composer( -n \d+)? yamls/{re.escape(path.name)}$', line) for line in header)
