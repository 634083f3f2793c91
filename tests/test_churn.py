"""How much networks differ: the figures themselves, and what `composer-kd churn` makes of runs."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from composer_kd import cli, data, models
from composer_kd.churn import churn, compare
from composer_kd.recipes import RecipeError, run
from composer_kd.teachers.weights import load_weights
from helpers import TINY_BERT, make_glue, make_vocabulary

DIGITS = """\
model: {name: small_convnet, num_classes: 10, width: 2}
train_data: {name: digits, split: train, batch_size: 256}
eval_data: {name: digits, split: test, batch_size: 500}
max_duration: 1ep
optimizer: {name: decoupled_sgdw, lr: 0.1, momentum: 0.9}
device: cpu
"""
TEXT = """\
model: {name: masked_lm, tokenizer: vocab.txt, config: CONFIG}
train_data: {name: text, split: train, batch_size: 16, path: text.txt, tokenizer: vocab.txt, max_length: 16}
eval_data: {name: text, split: validation, batch_size: 200, path: text.txt, tokenizer: vocab.txt, max_length: 16}
max_duration: 1ba
optimizer: {name: adamw, lr: 0.01}
device: cpu
""".replace('CONFIG', json.dumps(TINY_BERT))
GLUE = """\
model: {name: text_classifier, tokenizer: vocab.txt, config: CONFIG, num_labels: 3}
train_data: {name: glue, task: mnli, split: train, batch_size: 16, tokenizer: vocab.txt, data_dir: glue, max_length: 32}
eval_data:
  {name: glue, task: mnli, split: validation, batch_size: 4, tokenizer: vocab.txt, data_dir: glue, max_length: 32}
max_duration: 1ba
optimizer: {name: adamw, lr: 0.01}
device: cpu
""".replace('CONFIG', json.dumps(TINY_BERT))
WORDS = ('cat', 'dog', 'bird', 'fish', 'cow', 'pig')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with runs: `x` and `same` are the same, `other` has another seed, `wide` another architecture."""
    folder = tmp_path_factory.mktemp('churn')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path('x.yaml').write_text(DIGITS)
        run('x.yaml')
        run('x.yaml', ['run_name=same'])
        run('x.yaml', ['run_name=other', 'seed=5'])
        run('x.yaml', ['run_name=wide', 'model.width=3', 'algorithms.blur_pool={min_channels: 1}'])
    return folder


@pytest.fixture(autouse=True)
def work_in(folder, monkeypatch):
    monkeypatch.chdir(folder)


def text_world():
    """The text, vocabulary and tables that text models are made from."""
    make_vocabulary('vocab.txt')
    documents = [f'the {noun} {verb}s a {other}' for noun in WORDS for verb in WORDS for other in WORDS]
    Path('text.txt').write_text('\n'.join(documents))
    if not Path('glue').exists():
        make_glue('glue')
    Path('text.yaml').write_text(TEXT)
    Path('glue.yaml').write_text(GLUE)


def softmax(row):
    powers = [math.exp(x - max(row)) for x in row]
    return [power / sum(powers) for power in powers]


@st.composite
def answers(draw):
    """Logits of two networks for some samples, and labels, not all of which count."""
    samples, classes = draw(st.integers(1, 6)), draw(st.integers(2, 5))
    logits = st.one_of(st.floats(-30, 30), st.integers(-2, 2).map(float))  # some of which are the same
    pair = [draw(arrays(np.float64, (samples, classes), elements=logits)) for _ in range(2)]
    labels = draw(st.lists(st.sampled_from([-100, *range(classes)]), min_size=samples, max_size=samples))
    return *pair, labels


@settings(deadline=None)
@given(answers())
def test_the_figures_are_those_of_a_plain_loop(given):
    *pair, labels = given
    rows = [row for row in zip(*pair, labels, strict=True) if row[2] != -100]
    found = churn(*map(torch.from_numpy, pair), torch.tensor(labels))
    assert found.samples == len(rows)
    if not rows:
        return
    says = [[max(range(len(row)), key=lambda c, row=row: row[c]) for row in both] for *both, _ in rows]
    assert found.disagreement == sum(a != b for a, b in says) / len(rows)
    pairs = [zip(softmax(a), softmax(b), strict=True) for a, b, _ in rows]
    means = [sum(abs(p - q) for p, q in pair) / len(rows[0][0]) for pair in pairs]
    assert found.difference == pytest.approx(sum(means) / len(rows), abs=1e-12)
    right = [[said[which] == label for said, (*_, label) in zip(says, rows, strict=True)] for which in (0, 1)]
    assert found.accuracies == tuple(sum(each) / len(rows) for each in right)


def test_batches_add_up():
    a, b = torch.randn(2, 64, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(64) % 7
    whole, parts = churn(a, b, labels), [churn(a[s], b[s], labels[s]) for s in (slice(0, 5), slice(5, None))]
    assert 0 < whole.disagreement < 1 and 0 < whole.difference < 1
    added = parts[0] + parts[1]
    assert (added.samples, added.disagreements, added.right) == (64, whole.disagreements, whole.right)
    assert added.difference == pytest.approx(whole.difference, rel=1e-9)
    assert churn(a, a, labels).disagreement == churn(a, a).difference == 0.0
    assert churn(a, b).accuracies is None and (churn(a, b) + churn(a, b, labels)).right is None
    as_text = churn(a.view(8, 8, 7), b.view(8, 8, 7), labels.view(8, 8))
    assert (as_text.samples, as_text.disagreements, as_text.right) == (64, whole.disagreements, whole.right)


def test_a_class_that_is_ruled_out_counts():
    a, b = torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0, -math.inf]])
    assert churn(a, b).difference == pytest.approx((0.5 + 0.5 + 0) / 3)


@pytest.mark.parametrize('shapes', [((4, 3), (4, 2), (4,)), ((4, 3), (4, 3), (3,)), ((4,), (4,), (4,))])
def test_shapes_that_do_not_belong_together(shapes):
    a, b, labels = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r'logits and labels must be \(\.\.\., C\), \(\.\.\., C\) and \(\.\.\.\), not'):
        churn(a, b, labels)


def logits_of_digits(name):
    """What a run says of all test images at once, and the labels."""
    summary = json.loads(Path('runs', name, 'summary.json').read_text())
    model = models.small_convnet(width=2)
    load_weights(model, Path('runs', name, summary['checkpoint']))
    ((images, labels),) = data.digits('test', 500).dataloader
    with torch.no_grad():
        return model.eval()((images, labels)), labels


def test_three_runs(capsys):
    assert cli.main(['churn', 'runs/x', 'runs/same', 'runs/other', '--out', 'churn.json']) == 0
    head, line, *rows, written = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.strip('|').split('|')] for row in (head, *rows)]
    assert cells[0] == ['data', 'A', 'B', 'samples', 'disagree', 'mean difference', 'A is right', 'B is right']
    assert set(line) == {'|', ' ', '-'} and written == 'written to churn.json'
    assert [row[1:3] for row in cells[1:]] == [
        ['runs/x', 'runs/same'],
        ['runs/x', 'runs/other'],
        ['runs/same', 'runs/other'],
    ]
    found = json.loads(Path('churn.json').read_text())
    assert [each['run'] for each in found['runs']] == ['runs/x', 'runs/same', 'runs/other']
    summaries = [json.loads(Path(each['run'], 'summary.json').read_text()) for each in found['runs']]
    assert [each['sha256'] for each in found['runs']] == [summary['checkpoint_sha256'] for summary in summaries]
    assert found['eval_data'] == {'name': 'digits', 'split': 'test', 'batch_size': 500}
    same, *others = found['pairs']
    assert (same['data'], same['samples'], same['disagreement'], same['difference']) == ('eval', 500, 0.0, 0.0)
    x, labels = logits_of_digits('x')
    expected = churn(x, logits_of_digits('other')[0], labels)
    for row, cell in zip(others, cells[2:], strict=True):
        assert row['disagreement'] == pytest.approx(expected.disagreement, abs=0.0021)  # of one sample, by rounding
        assert row['difference'] == pytest.approx(expected.difference, rel=1e-5)
        assert 0 < row['difference'] < 0.2 and 0 < row['disagreement'] < 1
        assert cell[3:6] == ['500', f'{row["disagreement"]:.2%}', f'{row["difference"]:.3g}']
        accuracies = [summary['metrics']['metrics/eval/MulticlassAccuracy'] for summary in (summaries[0], summaries[2])]
        assert [row['accuracy_a'], row['accuracy_b']] == pytest.approx(accuracies, abs=0.0021)


def test_checkpoints_of_unfinished_runs_that_differ_in_architecture(capsys):
    for name in ('x', 'wide'):
        shutil.copytree(f'runs/{name}', f'unfinished/{name}', symlinks=True)
        Path('unfinished', name, 'summary.json').unlink()
    paths = ['unfinished/x', 'unfinished/x/checkpoints/latest-rank0.pt', 'unfinished/x/latest', 'unfinished/wide']
    assert cli.main(['churn', *paths]) == 0
    assert capsys.readouterr().out.count('unfinished/x/latest') == 3
    pairs = compare(paths)['pairs']
    assert pairs == compare(paths)['pairs']
    assert [pair['difference'] > 0 for pair in pairs] == [False, False, True, False, True, True]
    wide = json.loads(Path('runs/wide/summary.json').read_text())['metrics']['metrics/eval/MulticlassAccuracy']
    assert pairs[-1]['accuracy_b'] == pytest.approx(wide, abs=0.0021)  # blurred, as it was trained


def test_the_data_of_another_recipe(capsys):
    run('x.yaml', ['run_name=half', 'eval_data.subset=250', 'eval_data.num_workers=0'])
    Path('other_data.yaml').write_text(DIGITS.replace('batch_size: 500', 'batch_size: 64, subset: 200'))
    assert cli.main(['churn', 'runs/x', 'runs/half']) == 2
    assert capsys.readouterr().err == (
        'runs/half/recipe.yaml:13: eval_data.subset: runs/half has other evaluation data than runs/x, which differ in '
        'eval_data.subset; name a recipe whose eval_data all are to be asked about, by --data RECIPE\n'
    )
    (pair,) = compare(['runs/x', 'runs/half'], data='other_data.yaml')['pairs']
    assert (pair['samples'], pair['disagreement']) == (200, 0.0)
    Path('other_data.yaml').write_text(f'{Path("other_data.yaml").read_text()}eval_subset_num_batches: 2\n')
    (pair,) = compare(['runs/x', 'runs/other'], data='other_data.yaml')['pairs']
    assert pair['samples'] == 128


def test_masked_words():
    text_world()
    summaries = [run('text.yaml', [f'seed={seed}', f'run_name=text{seed}']) for seed in (1, 2)]
    (pair,) = compare(['runs/text1', 'runs/text2'])['pairs']
    accuracies = [summary['metrics']['metrics/eval/MaskedAccuracy'] for summary in summaries]
    assert [pair['accuracy_a'], pair['accuracy_b']] == pytest.approx(accuracies, abs=1e-6)
    labelled = sum(int((batch['labels'] != -100).sum()) for batch in evaluated_text().dataloader)
    assert pair['samples'] == labelled > 0
    assert 0 < pair['difference'] < 2 / 77


def evaluated_text():
    return data.text('validation', 200, path='text.txt', tokenizer='vocab.txt', max_length=16)


def test_the_two_sets_of_mnli():
    text_world()
    summaries = [run('glue.yaml', [f'seed={seed}', f'run_name=mnli{seed}']) for seed in (1, 2)]
    pairs = compare(['runs/mnli1', 'runs/mnli2'])['pairs']
    assert [(pair['data'], pair['samples']) for pair in pairs] == [('mnli_matched', 10), ('mnli_mismatched', 10)]
    for pair in pairs:
        name = f'metrics/{pair["data"]}/MulticlassAccuracy'
        accuracies = [summary['metrics'][name] for summary in summaries]
        assert [pair['accuracy_a'], pair['accuracy_b']] == pytest.approx(accuracies, abs=1e-6)


def test_runs_that_cannot_be_compared(capsys):
    run('x.yaml', ['run_name=eleven', 'model.num_classes=11'])
    run('x.yaml', ['run_name=blind', 'eval_data=null', 'max_duration=1ba'])
    Path('stray').mkdir()
    shutil.copy('runs/x/checkpoints/latest-rank0.pt', 'stray/x.pt')
    shutil.copytree('runs/other', 'runs/diverged', symlinks=True)
    broken = next(Path('runs/diverged/checkpoints').glob('ep*'))
    saved = torch.load(broken, weights_only=False)
    next(value for value in saved['state']['model'].values() if value.is_floating_point()).fill_(math.nan)
    torch.save(saved, broken)
    capsys.readouterr()
    todo = 'name a recipe whose eval_data all are to be asked about, by --data RECIPE'
    for arguments, code, message in [
        (['runs/eleven'], 2, 'runs/eleven has 11 classes, runs/x 10: they must be the same'),
        (['runs/blind'], 2, 'runs/blind has other evaluation data than runs/x, which differ in eval_data; ' + todo),
        (['runs/none'], 1, 'runs/none: there is no checkpoint, neither a file nor the folder of a run with one'),
        (['stray/x.pt'], 1, 'stray/x.pt: there is no recipe.yaml in the folder of its run, to say what its network is'),
        (['runs/other', '--data', 'no.yaml'], 2, 'no.yaml: cannot read the recipe: No such file or directory'),
        (['runs/other', '--data', 'runs/blind/recipe.yaml'], 2, f'the recipe has no eval_data; {todo}'),
        (['runs/other', '--out', 'no/x.json'], 2, '--out no/x.json: there is no folder no; make it first'),
        (['runs/diverged'], 1, 'gives NaN or infinity, so that there is nothing to compare; leave it out'),
    ]:
        assert cli.main(['churn', 'runs/x', *arguments]) == code
        out, err = capsys.readouterr()
        assert out == '' and err.endswith(f'{message}\n') and err.count('\n') == 1
    with pytest.raises(SystemExit, match='2'):
        cli.main(['churn', 'runs/x'])


def test_texts_that_cannot_be_compared():
    text_world()
    stsb = [f'{section}.task=stsb' for section in ('train_data', 'eval_data')]
    run('glue.yaml', ['run_name=grades', 'model.num_labels=1', 'eval_interval=0', *stsb])
    with pytest.raises(RecipeError, match=r'^runs/grades gives grades \(num_labels=1\): churn compares networks that'):
        compare(['runs/grades', 'runs/grades'])
    words = Path('vocab.txt').read_text()
    Path('more.txt').write_text(f'{words}cat\n')
    run('text.yaml', ['run_name=words'])
    more = [f'{key}.tokenizer=more.txt' for key in ('model', 'train_data', 'eval_data')]
    run('text.yaml', ['run_name=more', *more])
    with pytest.raises(RecipeError, match=r'which differ in eval_data.tokenizer; name a recipe'):
        compare(['runs/words', 'runs/more'])
    with pytest.raises(RecipeError, match=r'^runs/more has 78 classes, runs/words 77: they must be the same'):
        compare(['runs/words', 'runs/more'], data='text.yaml')
    Path('swapped.txt').write_text(words.replace('\na\n', '\n?\n').replace('\nb\n', '\na\n').replace('\n?\n', '\nb\n'))
    run('text.yaml', ['run_name=swapped', *(setting.replace('more', 'swapped') for setting in more)])
    with pytest.raises(RecipeError, match=r'^the tokenizer of runs/swapped is not that of runs/words \(the word of id'):
        compare(['runs/words', 'runs/swapped'], data='text.yaml')
    Path('vocab.txt').write_text(Path('swapped.txt').read_text())  # behind the run's back
    with pytest.raises(RecipeError, match=r'runs/words was trained with another tokenizer \(the word of id'):
        compare(['runs/words', 'runs/swapped'], data='text.yaml')
