import runpy
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from composer_kd import cli
from composer_kd.recipes import RecipeError

GOOD = """\
model: {name: small_convnet, num_classes: 10, width: 4}
train_data: {name: digits, split: train, batch_size: 256}
max_duration: 2ba
optimizer: {name: sgd, lr: 0.1}
device: cpu
"""


@pytest.fixture(autouse=True)
def work_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('good.yaml').write_text(GOOD)


def test_check(capsys):
    Path('bad.yaml').write_text(GOOD + 'sead: 1\n')
    assert cli.main(['check', 'good.yaml', 'good.yaml']) == 0
    assert capsys.readouterr() == ('ok good.yaml\nok good.yaml\n', '')
    assert cli.main(['check', 'good.yaml', 'bad.yaml', 'good.yaml']) == 2
    assert capsys.readouterr() == ('ok good.yaml\n', "bad.yaml:6: sead: a recipe has no 'sead'; did you mean 'seed'?\n")


def test_record_starts_its_ranks(monkeypatch):
    """The command becomes Composer's launcher of itself, unless it is one of its ranks, or one is enough."""
    became = []
    monkeypatch.setattr(cli.os, 'execv', lambda *command: became.append(command))
    monkeypatch.delenv('RANK', raising=False)
    cli.main(['record', 'good.yaml', '--views', '2', '-n', '3', 'seed=5'])
    python = sys.executable
    launcher = [python, '-m', 'composer.cli', '-n', '3', '-m', 'composer_kd']
    assert became == [(python, [*launcher, 'record', 'good.yaml', '--views', '2', '-n', '3', 'seed=5'])]
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    Path('gpu.yaml').write_text(GOOD.replace('device: cpu\n', ''))
    cli.main(['record', 'gpu.yaml'])
    assert became[1][1][4] == '2'
    cli.main(['record', 'good.yaml'])
    cli.main(['record', 'gpu.yaml', '--views', '2', 'device=cpu'])
    cli.main(['record', 'good.yaml', '-n', '1'])
    monkeypatch.setenv('RANK', '0')
    cli.main(['record', 'good.yaml', '-n', '3'])
    assert len(became) == 2


@pytest.mark.parametrize('ranks', ['0', '-2'])
def test_record_needs_a_rank(ranks, capsys, monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    assert cli.main(['record', 'good.yaml', '-n', ranks]) == 2
    assert capsys.readouterr() == ('', f'composer-kd record: -n {ranks}: there must be at least one process\n')


def test_version_and_usage(capsys):
    with pytest.raises(SystemExit, match='0'):
        cli.main(['--version'])
    assert capsys.readouterr().out == f'composer-kd {version("composer-kd")}\n'
    with pytest.raises(SystemExit, match='0'):
        cli.main(['--help'])
    assert f'{{{",".join(cli.COMMANDS)}}}' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='2'):
        cli.main([])
    assert 'usage: composer-kd' in capsys.readouterr().err


# What stands in the file, overrides, start of the one line on stderr, exit code.
BAD_INPUT = {
    'no such file': (None, [], 'bad.yaml: cannot read the recipe: No such file', 2),
    'empty': ('', [], 'bad.yaml:1: this is no recipe', 2),
    'list': ('- a\n', [], 'bad.yaml:1: this is no recipe', 2),
    'docker compose': ('services:\n  web: {image: nginx}\n', [], 'bad.yaml:1: this is no recipe', 2),
    'syntax': ('a: [1\n', [], 'bad.yaml:2: not valid YAML', 2),
    'override': (GOOD, ['modle.width=3'], "command line: modle.width: no 'modle' here; did you mean 'model'?", 2),
    'no override': (GOOD, ['-n'], 'command line: an override is written key=value', 2),
    'unknown key': (GOOD, ['seeed=3'], "command line: seeed: a recipe has no 'seeed'; did you mean 'seed'?", 2),
    'unknown name': (
        GOOD,
        ['model.name=smal_convnet'],
        "command line: model.name: there is no model 'smal_convnet'; did",
        2,
    ),
    'wrong type': (GOOD, ['optimizer.lr=fast'], 'command line: optimizer.lr: must be ', 2),
    'wrong value': (
        GOOD,
        ['model.width=0'],
        'bad.yaml:1: model: small_convnet: num_classes, in_channels, width and',
        2,
    ),
    'no data': (
        GOOD,
        ['train_data={name: imagenet, split: train, batch_size: 8, data_dir: no}'],
        'command line: train_da',
        1,
    ),
    'no teacher': (
        GOOD,
        ['algorithms.knowledge_distillation={}'],
        'command line: algorithms.knowledge_distillation: there',
        2,
    ),
    'no checkpoint': (
        GOOD + 'teachers: [{name: network, model: {name: small_convnet}, checkpoint: no.pt}]\n',
        ['algorithms.knowledge_distillation={}'],
        'bad.yaml:6: teachers.0: no.pt: no such file',
        1,
    ),
    'no resume': (GOOD, ['load_path=no.pt'], 'bad.yaml:1: Local path no.pt does not exist', 1),
    'no GPU': (GOOD, ['device=hpu'], 'command line: device: Unable to import habana-torch-plugin', 1),
}


@pytest.mark.parametrize('case', BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(case, capsys):
    text, overrides, message, exit_code = BAD_INPUT[case]
    if text is not None:
        Path('bad.yaml').write_text(text)
    assert cli.run_recipe('bad.yaml', overrides) == exit_code
    out, err = capsys.readouterr()
    assert err.startswith(message) and err.count('\n') == 1 and err.endswith('\n')
    assert out == ''
    assert not Path('runs').exists()


def test_an_error_that_nobody_expects_keeps_its_traceback():
    def work():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.guarded(work)


def test_ranks_but_the_first_wait_before_they_speak(capsys, monkeypatch):
    waited = []
    monkeypatch.setattr(cli.time, 'sleep', waited.append)
    monkeypatch.setenv('RANK', '1')

    def work():
        raise RecipeError('x.yaml:1: wrong', exit_code=1)

    assert cli.guarded(work) == 1
    assert waited == [cli.SECONDS_FOR_RANK_ZERO]
    assert capsys.readouterr().err == 'rank 1: x.yaml:1: wrong\n'


def test_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['composer_kd', 'good.yaml', 'seed=3', 'max_duration=1ba'])
    with pytest.raises(SystemExit) as done:
        runpy.run_module('composer_kd', run_name='__main__', alter_sys=False)
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith('good: 0 epochs, 1 batches')
    assert 'seed: 3' in Path('runs/good/recipe.yaml').read_text()
    monkeypatch.setattr(sys, 'argv', ['composer_kd', 'record', 'good.yaml', '-n', '1'])
    with pytest.raises(SystemExit) as done:
        runpy.run_module('composer_kd', run_name='__main__')
    assert done.value.code == 2
    assert capsys.readouterr().err == 'good.yaml:1: there is no teacher to record; add a `teachers` section\n'
    monkeypatch.setattr(sys, 'argv', ['composer_kd', 'sweep', 'no.yaml'])
    with pytest.raises(SystemExit) as done:
        runpy.run_module('composer_kd', run_name='__main__')
    assert done.value.code == 2
    assert capsys.readouterr().err == 'no.yaml: cannot read the sweep: No such file or directory\n'
    for arguments in ([], ['--help']):
        monkeypatch.setattr(sys, 'argv', ['composer_kd', *arguments])
        with pytest.raises(SystemExit) as done:
            runpy.run_module('composer_kd', run_name='__main__')
        assert done.value.code == 'usage: python -m composer_kd FILE [key=value ...]'
