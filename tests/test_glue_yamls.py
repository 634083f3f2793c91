"""The recipes of GLUE: right by the checker, and train; twins differ in the distillation alone."""

from pathlib import Path

import pytest
import torch

from composer_kd import models
from composer_kd.glue import SCORES
from composer_kd.recipes import RecipeError, check, load, run
from helpers import TINY_BERT, make_glue, make_vocabulary

YAMLS = sorted((Path(__file__).parents[1] / 'yamls' / 'glue').glob('*.yaml'))
NAMES = [path.stem for path in YAMLS]

# Epochs, batch, learning rate, weight decay and classes of each task.
VALUES = {
    'mnli': (3, 48, 5e-5, 5e-6, 3),
    'rte': (3, 16, 1e-5, 1e-5, 2),
    'qqp': (5, 16, 3e-5, 3e-6, 2),
    'cola': (10, 32, 5e-5, 5e-6, 2),
    'mrpc': (10, 32, 8e-5, 8e-6, 2),
    'qnli': (10, 16, 1e-5, 1e-6, 2),
    'sst2': (3, 16, 3e-5, 3e-6, 2),
    'stsb': (10, 32, 3e-5, 3e-6, 1),
}


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """A tiny network that has learned nothing, as a folder, and the files of all tasks."""
    folder = tmp_path_factory.mktemp('pretrained')
    torch.manual_seed(0)
    config = TINY_BERT | {'max_position_embeddings': 128}
    model = models.masked_lm(config=config, tokenizer=make_vocabulary(folder / 'vocab.txt'))
    model.model.save_pretrained(folder / 'tiny')
    model.tokenizer.save_pretrained(folder / 'tiny')
    return str(folder / 'tiny'), make_glue(folder / 'glue')


def test_there_are_two_for_each_task():
    assert sorted([*SCORES, *(f'{task}_kd' for task in SCORES)]) == NAMES


@pytest.mark.parametrize('path', YAMLS, ids=NAMES)
def test_checks(path):
    config = check(load(path)).recipe.config
    optimizer, data = config['optimizer'], config['train_data']
    task = path.stem.removesuffix('_kd')
    epochs, batch, lr, weight_decay, classes = VALUES[task]
    assert config['max_duration'] == f'{epochs}ep'
    assert (data['task'], config['eval_data']['task'], data['batch_size']) == (task, task, batch)
    assert optimizer == {
        **{'name': 'decoupled_adamw', 'lr': lr, 'weight_decay': weight_decay, 'betas': [0.9, 0.98], 'eps': 1e-6}
    }
    assert config['schedulers'] == {'linear_with_warmup': {'t_warmup': '0.06dur'}}
    assert config['model']['num_labels'] == classes
    base = 'runs/mnli' if task in ('rte', 'mrpc', 'stsb') else 'bert-base-uncased'
    assert {config['model']['pretrained'], data['tokenizer'], config['eval_data']['tokenizer']} == {base}


@pytest.mark.filterwarnings('ignore:.*lr_scheduler.step:UserWarning', 'ignore:The warmup duration is 0:UserWarning')
@pytest.mark.parametrize('path', YAMLS, ids=NAMES)
def test_trains_two_batches(path, pretrained, tmp_path, monkeypatch):
    network, files = pretrained
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('GLUE_DIR', str(files))
    overrides = [f'model.pretrained={network}', 'max_duration=2ba']
    distills = 'teachers' in load(path).config
    teacher = f'teachers.0.overrides=[{", ".join(overrides)}, run_name=teacher]'
    summary = run(path, [*overrides, *([teacher] if distills else [])])
    assert summary['batches'] == 2 and (tmp_path / 'runs' / path.stem / summary['checkpoint']).is_file()
    assert (summary['teacher_forwards'] > 0) == distills == (tmp_path / 'runs' / 'teacher').exists()
    scores = SCORES[path.stem.removesuffix('_kd')]
    assert {*scores.values()} == {name for name in summary['metrics'] if name.startswith('metrics/')}


@pytest.mark.parametrize('path', [path for path in YAMLS if path.stem.endswith('_kd')], ids=lambda path: path.stem)
def test_a_twin_differs_in_the_distillation_alone(path):
    baseline = path.with_name(path.name.replace('_kd', ''))

    def content(path):
        return [line for line in path.read_text().splitlines() if not line.startswith('#')]

    config = load(path).config
    (teacher,), algorithms = config.pop('teachers'), config.pop('algorithms')
    assert config == load(baseline).config
    assert set(content(baseline)) < set(content(path))
    assert algorithms.keys() == {'knowledge_distillation'}
    assert (algorithms['knowledge_distillation'].get('loss') == 'mse') == (path.stem == 'stsb_kd')
    assert teacher['recipe'] == baseline.name
    wanted = load(baseline, ['model.pretrained=bert-large-uncased']).config
    assert load(baseline, teacher['overrides']).config == wanted | {'run_name': f'{baseline.stem}_teacher'}


@pytest.mark.parametrize('path', YAMLS, ids=NAMES)
def test_the_header_names_the_command(path):
    header = path.read_text().split('\n\n')[0].splitlines()
    assert all(line.startswith('#') for line in header)
    assert any(line.endswith(f'composer yamls/glue/{path.name}') for line in header)


def test_what_starts_from_mnli_says_that_it_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(
        RecipeError, match=r'rte.yaml:\d+: model: runs/mnli is no file or folder here, and cannot'
    ) as error:
        run(YAMLS[NAMES.index('rte')])
    assert error.value.exit_code == 1
