"""Recipes of text models: what they are given must fit them, and evaluation may be of more than one set."""

import json
from pathlib import Path

import pytest

from composer_kd import tokenization
from composer_kd.recipes import RecipeError, run
from composer_kd.recipes.metrics_logger import read_metrics
from helpers import TINY_BERT, make_glue, make_vocabulary

TEXT = 'tokenizer: vocab.txt, max_length: 32, data_dir: .'
HEAD = f"""\
model: {{name: text_classifier, config: {json.dumps(TINY_BERT)}, tokenizer: vocab.txt, num_labels: 3}}
train_data: {{name: glue, task: mnli, split: train, batch_size: 16, {TEXT}}}
eval_data: {{name: glue, task: mnli, split: validation, batch_size: 8, {TEXT}}}
max_duration: 1ep
optimizer: {{name: decoupled_adamw, lr: 0.001}}
device: cpu
"""
TEACHER = 'teachers: [{name: network, recipe: teacher.yaml}]\nalgorithms: {knowledge_distillation: {}}\n'


@pytest.fixture
def recipe(write):
    make_glue('.')
    make_vocabulary('vocab.txt')
    write('', 'teacher.yaml', HEAD)
    return write('', 'x.yaml', HEAD)


def test_two_sets_are_measured(recipe, capsys):
    summary = run(recipe, ['max_duration=2ep'])
    names = [f'metrics/mnli_{match}/MulticlassAccuracy' for match in ('matched', 'mismatched')]
    assert [name for name in summary['metrics'] if name.startswith('metrics/')] == names
    rows = [row for row in read_metrics(Path('runs/x/metrics.jsonl')) if names[0] in row]
    assert [row['batch'] for row in rows] == [6, 12] and all(names[1] in row for row in rows)
    printed = capsys.readouterr().out
    values = '  '.join(f'mnli_{match}/MulticlassAccuracy 0.' for match in ('matched', 'mismatched'))
    assert all(part in printed for part in values.split('  '))
    assert printed.count('epoch 1  batch 6  mnli_matched/') == 1


def test_a_checkpoint_goes_on_as_another_task(recipe):
    run(recipe)
    rte = [f'{key}_data.task=rte' for key in ('train', 'eval')] + ['model.num_labels=2', 'run_name=rte']
    summary = run(recipe, [*rte, 'model={name: text_classifier, pretrained: runs/x}', 'train_data.tokenizer=runs/x'])
    assert summary['metrics'].keys() >= {'metrics/eval/MulticlassAccuracy'}


def test_a_text_teacher_teaches(recipe, write):
    write(TEACHER, 'kd.yaml', HEAD)
    summary = run('kd.yaml')
    assert summary['teacher_forwards'] == 6


STREAM = f"""\
model: {{name: masked_lm, config: {json.dumps(TINY_BERT | {'max_position_embeddings': 128})}, tokenizer: vocab.txt}}
train_data: {{name: c4, split: train, batch_size: 4, data_dir: text, num_workers: 0, tokenizer: vocab.txt}}
max_duration: 4ba
optimizer: {{name: decoupled_adamw, lr: 0.001}}
device: cpu
"""


@pytest.fixture
def stream(write):
    make_vocabulary('vocab.txt')
    Path('text').mkdir()
    Path('text/one.jsonl').write_text('{"text": "a b c"}\n' * 40)
    return write('', 'x.yaml', STREAM)


def test_a_stream_has_no_epochs_to_count(stream):
    with pytest.raises(RecipeError, match=r'^command line: max_duration: train_data streams without end'):
        run(stream, ['max_duration=2ep'])
    assert run(stream)['batches'] == 4


def test_a_damaged_line_in_a_stream_is_one_line(stream):
    Path('text/one.jsonl').write_text('{"text": "a b c"}\n' * 10 + '{"text": \n')
    with pytest.raises(RecipeError, match=r'^x.yaml:2: train_data: text/one.jsonl, line 11: not JSON') as error:
        run(stream)
    assert error.value.exit_code == 1 and '\n' not in str(error.value)
    assert not Path('runs/x').exists()


def test_a_vocabulary_whose_text_has_changed_is_found_out(write):
    """The same path, other words: what a run has learned is of the old ones."""
    trained = STREAM.replace('tokenizer: vocab.txt', 'tokenizer: {text: text, vocabulary: 60}')
    Path('text').mkdir()
    Path('text/one.jsonl').write_text('{"text": "abc abd abe"}\n' * 40)
    write('', 'teacher.yaml', trained)
    write(TEACHER, 'kd.yaml', trained)
    run('kd.yaml')
    Path('text/one.jsonl').write_text('{"text": "xyz xyw xyv"}\n' * 40)
    tokenization._train.cache_clear()  # as in another process
    with pytest.raises(RecipeError, match=r'kd.yaml.*was trained with another tokenizer .* has changed since'):
        run('kd.yaml', ['run_name=again'])
    with pytest.raises(RecipeError, match=r'teacher.yaml:1: model: runs/teacher began with another tokenizer'):
        run('teacher.yaml', ['autoresume=true', 'max_duration=8ba'])


def test_a_vocabulary_to_train_has_options(stream):
    Path('text/one.jsonl').write_text('{"content": "a b c"}\n' * 40 + 'no JSON\n')
    key = ['train_data.text_key=content', 'train_data.on_error=skip', 'train_data.tokenizer=${model.tokenizer}']
    words = 'text: text/one.jsonl, vocabulary: 20'
    with pytest.raises(RecipeError, match=r"line 1: no JSON .* 'text' \(see tokenizer\.text_key\)"):
        run(stream, [*key, f'model.tokenizer={{{words}}}'])
    with pytest.raises(RecipeError, match=r'^command line: model\.tokenizer: must be str \| WordPiece'):
        run(stream, [*key, f'model.tokenizer={{{words}, on_error: ignore}}'])
    with pytest.warns(UserWarning, match='left out 1 lines'):
        run(stream, [*key, f'model.tokenizer={{{words}, text_key: content, on_error: skip}}'])


MISTAKES = {
    'positions': (
        ['train_data.max_length=100'],
        'x.yaml:1: model: train_data.max_length is 100, but model has 64 positions (max_position_embeddings): set ',
    ),
    'positions to evaluate': (
        ['eval_data.max_length=65'],
        'x.yaml:1: model: eval_data.max_length is 65, but model has 64',
    ),
    'tokenizer': (
        ['train_data.tokenizer=other.txt'],
        'x.yaml:1: model: train_data.tokenizer is not the tokenizer of model (78 words against 77): give train_data',
    ),
    'labels': (
        ['model.num_labels=2'],
        'x.yaml:1: model: train_data has 3 classes, model 2 classes: set model.num_labels=3',
    ),
    'two sets': (
        ['train_data.split=validation'],
        'x.yaml:2: train_data: is more than one set, made for evaluation: train',
    ),
    'rows': (
        ['train_data.data_dir=broken'],
        'x.yaml:2: train_data: broken/MNLI/train.tsv:2: 2 fields between tabs, not 12',
    ),
    'task': (['train_data.task=mnly'], "command line: train_data.task: must be Literal['cola', 'sst2', "),
    'config': (['model.config.hidden_sise=3'], "x.yaml:1: model: config: bert has no 'hidden_sise'; did you mean"),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_one_line(recipe, mistake):
    overrides, message = MISTAKES[mistake]
    Path('other.txt').write_text(Path('vocab.txt').read_text() + 'word\n')
    Path('broken/MNLI').mkdir(parents=True)
    Path('broken/MNLI/train.tsv').write_text(Path('MNLI/train.tsv').read_text().replace('\n', '\n1\tx\n', 1))
    with pytest.raises(RecipeError) as error:
        run(recipe, overrides)
    assert str(error.value).startswith(message)
    assert not Path('runs').exists()


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (['model.config.max_position_embeddings=16'], 'train_data.max_length is 32, but teachers.0 has 16 positions'),
        (
            ['model.tokenizer=other.txt', 'train_data.tokenizer=other.txt', 'eval_data=null'],
            'train_data.tokenizer is not',
        ),
        (
            ['model.num_labels=2', 'train_data.task=rte', 'eval_data=null'],
            'train_data has 3 classes, teachers.0 2 classes',
        ),
    ],
)
def test_a_teacher_that_cannot_read_the_data_shows_before_it_is_trained(recipe, write, overrides, message, capsys):
    Path('other.txt').write_text(Path('vocab.txt').read_text() + 'word\n')
    write(TEACHER.replace('teacher.yaml', f'teacher.yaml, overrides: {json.dumps(overrides)}'), 'kd.yaml', HEAD)
    run('teacher.yaml', [*overrides, 'train_data.max_length=16', 'eval_data=null', 'runs_dir=apart'])
    with pytest.raises(RecipeError, match=rf'kd.yaml:7: teachers.0: {message}'):
        run('kd.yaml')
    assert 'training the teacher' not in capsys.readouterr().out
    assert not Path('runs').exists()
