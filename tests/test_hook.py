"""The launcher hook, in the environment that it is installed in."""

import json
import os
import re
import runpy
import statistics
import subprocess
import sys
import time
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

COMPOSER = Path(sys.executable).with_name('composer')

RECIPE = """\
model: {name: small_convnet, num_classes: 10, width: 4}
train_data: {name: digits, split: train, batch_size: 256}
eval_data: {name: digits, split: test, batch_size: 256}
optimizer: {name: sgd, lr: 0.1}
max_duration: 1ep
device: cpu
"""

pytestmark = pytest.mark.skipif(
    not any('composer_kd_yaml.pth' in str(file) for file in distribution('composer-kd').files or ()),
    reason='composer-kd is not installed here',
)


@pytest.fixture(autouse=True)
def work_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ('PYTHONPATH', 'OMP_NUM_THREADS')}
    environment = {**inherited, 'PYTHONWARNINGS': 'ignore', **environment}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=300)


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    return start(sys.executable, *arguments)


def test_the_installed_hook_is_the_one_of_this_tree():
    hook = Path(__file__).parent.parent / 'hook'
    for name in ('_composer_kd_yaml.py', 'composer_kd_yaml.pth'):
        installed = next(file for file in distribution('composer-kd').files or () if str(file) == name).locate()
        assert Path(str(installed)).read_text() == (hook / name).read_text(), 'uv sync --reinstall-package composer-kd'


def test_python_starts_with_no_other_module():
    """Without the site's `.pth` files there is no hook; with it there is one module more, and none that it imports."""
    look = 'import sys; print(" ".join(sorted(sys.modules)))'
    assert '_composer_kd_yaml' in python('-c', look).stdout.split()
    hook = Path(__file__).parent.parent / 'hook'
    without = set(python('-S', '-c', look).stdout.split())
    with_hook = set(
        python(
            '-S', '-c', f'import sys; sys.path.append({str(hook)!r}); import _composer_kd_yaml; {look}'
        ).stdout.split()
    )
    assert with_hook - without == {'_composer_kd_yaml'}


def test_python_starts_as_fast():
    assert any(_milliseconds_more() < 5 for _ in range(3))  # on cores that others use too, one attempt says little


def _milliseconds_more() -> float:
    """How much longer Python takes to start with the hook; by the medians of runs that take turns."""
    hook = Path(__file__).parent.parent / 'hook'
    prepare = f'import sys; sys.path.append({str(hook)!r})'
    commands = prepare, f'{prepare}; import _composer_kd_yaml'
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(15):
        for which in (0, 1) if turn % 2 else (1, 0):
            begin = time.perf_counter()
            python('-S', '-c', commands[which])
            seconds[which].append(time.perf_counter() - begin)
    without, with_hook = map(statistics.median, seconds)
    return 1000 * (with_hook - without)


def test_everything_else_runs_as_before():
    code = 'import sys; print(sys.argv, __name__)\n'
    Path('script.py').write_text(code)
    Path('folder.d').mkdir()
    Path('folder.d/__main__.py').write_text(code)
    with zipfile.ZipFile('app.pyz', 'w') as app:
        app.writestr('__main__.py', code)
    Path('yaml').write_text(code)
    for name in ('script.py', 'folder.d', 'app.pyz', 'yaml'):
        done = python(name, 'a.b=3')
        assert (done.stdout, done.stderr) == (f"['{name}', 'a.b=3'] __main__\n", '')
    assert python('-c', 'import yaml, sys; print(yaml.safe_load("a: 1"))').stdout == "{'a': 1}\n"


def test_a_folder_whose_name_ends_in_yaml_on_the_path():
    Path('odd.yaml').mkdir()
    Path('odd.yaml/module_in_it.py').write_text('')
    done = python('-c', 'import sys; sys.path.insert(0, "odd.yaml"); import module_in_it')
    assert done.returncode == 0, done.stderr


def test_python_runs_a_recipe():
    Path('x.yml').write_text(RECIPE)
    done = python('x.yml', 'max_duration=1ba', 'model.width=3')
    assert (done.returncode, done.stderr) == (0, '')
    assert json.loads(Path('runs/x/summary.json').read_text())['batches'] == 1
    assert 'width: 3' in Path('runs/x/recipe.yaml').read_text()


def test_python_runs_no_other_yaml(capsys, monkeypatch):
    Path('compose.yaml').write_text('services: {web: {image: nginx}}\n')
    monkeypatch.setattr(sys, 'argv', ['compose.yaml'])
    with pytest.raises(SystemExit) as done:
        runpy.run_path('compose.yaml', run_name='__main__')  # asks `sys.path_hooks` as `python compose.yaml` does
    assert done.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count('\n')) == ('', 1)
    assert err.startswith('compose.yaml:1: this is no recipe')


@pytest.mark.dist
def test_composer_runs_a_recipe_on_two_ranks():
    """Teacher and student in one launch; the student is the one that a single rank would start with."""
    Path('teacher.yaml').write_text(RECIPE)
    Path('x.yaml').write_text(
        RECIPE + 'teachers: [{name: network, recipe: teacher.yaml}]\nalgorithms: {knowledge_distillation: {}}\n'
    )
    done = start(COMPOSER, '-n', 2, 'x.yaml', 'max_duration=2ep', 'train_data.batch_size=128')
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stderr == ''
    assert done.stdout.count('training the teacher teacher.yaml in runs/teacher') == 1
    summary = json.loads(Path('runs/x/summary.json').read_text())
    assert (summary['world_size'], summary['batches'], summary['samples']) == (2, 20, 2560)
    assert summary['teacher_forwards'] == 20
    rows = [json.loads(line) for line in Path('runs/x/metrics.jsonl').read_text().splitlines()]
    assert [row['batch'] for row in rows] == list(range(1, 21))


@pytest.mark.dist
def test_composer_on_two_ranks_says_once_what_is_wrong():
    Path('x.yaml').write_text(RECIPE)
    begin = time.monotonic()
    done = start(COMPOSER, '-n', 2, 'x.yaml', 'train_data.batch_size=129')
    assert done.returncode == 2
    said = [line for line in (done.stderr + done.stdout).splitlines() if re.search('batch_size', line)]
    assert len(said) == 1 and said[0].startswith('x.yaml:2: train_data: batch_size=129 counts all ranks')
    assert 'Traceback' not in done.stderr + done.stdout
    assert not Path('runs').exists()
    assert time.monotonic() - begin < 120
