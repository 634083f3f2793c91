import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from composer_kd import cli, glue, jobs, models
from composer_kd.recipes import RecipeError
from composer_kd.recipes.folder import write_recipe
from helpers import TINY_BERT, in_a_fork, make_glue, make_vocabulary, train_one_batch

YAMLS = Path(__file__).parents[1] / 'yamls' / 'glue'
FILE = 'runs/tiny/checkpoints/ep0-ba1-rank0.pt'

GATE = """\
import time
from pathlib import Path

from composer.core import Callback

class Gate(Callback):
    '''Notes every batch, and stops at the end of the second until there is a file `go`.'''

    def batch_end(self, state, logger):
        with open('batches', 'a') as file:
            file.write(f'{state.run_name} {state.timestamp.batch.value}\\n')
        while state.timestamp.batch.value == 2 and not Path('go').exists():
            time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def work_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    (tmp_path / 'go').touch()  # whoever waits for it, though nobody is left to say so


@pytest.fixture(scope='module')
def origin(tmp_path_factory):
    """A folder with the run of a tiny language model, and the files of the tasks."""
    folder = tmp_path_factory.mktemp('origin')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_glue('glue')
        torch.manual_seed(0)
        config = TINY_BERT | {'max_position_embeddings': 128}
        model = models.masked_lm(config=config, tokenizer=make_vocabulary('vocab.txt'))
        ids = torch.randint(5, 70, (4, 8))
        train_one_batch(model, ids, ids, 'runs/tiny/checkpoints')
    return folder


@pytest.fixture
def checkpoint(origin, work_in, monkeypatch):
    """The run of a tiny language model, and the files of the tasks."""
    shutil.copytree(origin, '.', symlinks=True, dirs_exist_ok=True)
    monkeypatch.setenv('GLUE_DIR', 'glue')
    return 'runs/tiny'


@pytest.fixture
def name(checkpoint):
    """What its runs begin with."""
    return f'tiny_{digits_of(FILE)}'


def digits_of(file):
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:8]


class Launcher:
    """Stands in for the processes that are started: each leaves a finished run, and notes how it was started."""

    def __init__(self, fails=()):
        self.started, self.at_once, self.most, self.fails = [], 0, 0, fails

    def __call__(self, command, *, env, stdout, **_):
        file = next(item for item in command if item.endswith('.yaml'))
        overrides = command[command.index(file) + 1 :]
        name = next(item for item in overrides if item.startswith('run_name=')).removeprefix('run_name=')
        self.started.append({'name': name, 'command': command, 'env': env})
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        return _Process(self, file, overrides, name, stdout)


class _Process:
    pid = 2**30  # nobody's

    def __init__(self, launcher, file, overrides, name, log):
        self.launcher, self.recipe, self.name, self.log = launcher, (file, overrides), name, log.name
        self.returncode, self.looks = None, 0

    def poll(self):
        self.looks += 1
        if self.returncode is None and self.looks == 2:
            self.launcher.at_once -= 1
            self.returncode = self.finish()
        return self.returncode

    def finish(self):
        if any(part in self.name for part in self.launcher.fails):
            Path(self.log).write_text('what went wrong\n')
            return 3
        recipe = glue.check(glue.load(*self.recipe)).recipe
        folder = Path(recipe.config['runs_dir'], self.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'x.pt').touch()
        write_recipe(recipe, folder)
        task, seed = re.fullmatch(r'.*glue(?:_kd)?_(\w+)_seed(\d+)', self.name).groups()
        metrics = {key: 0.5 + int(seed) / 100 for key in glue.SCORES[task].values()}
        if task == 'cola' and seed == '18':
            metrics = dict.fromkeys(metrics, 'nan')
        summary = {
            'checkpoint': 'x.pt',
            'checkpoint_sha256': 'x',
            'train_seconds': 1.0,
            'teacher_training_seconds': 0.0,
        }
        (folder / 'summary.json').write_text(json.dumps({**summary, 'metrics': metrics}))
        return 0


@pytest.fixture
def launcher(monkeypatch):
    monkeypatch.setattr(jobs, '_SECONDS_BETWEEN_LOOKS', 0.001)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)

    def install(**more):
        made = Launcher(**more)
        monkeypatch.setattr(subprocess, 'Popen', made)
        return made

    return install


def seeds_of(started, task):
    return [int(run['name'][-2:]) for run in started if f'_{task}_' in run['name']]


def test_all_tasks(checkpoint, name, launcher, capsys):
    made = launcher()
    results = glue.glue(checkpoint, recipes=YAMLS)
    names = [run['name'] for run in made.started]
    assert len(names) == 24 and made.most == 1
    assert {task: len(seeds_of(made.started, task)) for task in glue.SCORES} == {
        **dict.fromkeys(('mnli', 'qqp', 'qnli', 'sst2'), 1),
        **dict.fromkeys(('cola', 'mrpc', 'stsb', 'rte'), 5),
    }
    assert seeds_of(made.started, 'rte') == [17, 18, 19, 20, 21]
    assert names[0] == f'{name}_glue_mnli_seed17'
    for run in made.started:
        base = (
            f'runs/{name}_glue_mnli_seed17'
            if any(f'_{task}_' in run['name'] for task in ('rte', 'mrpc', 'stsb'))
            else FILE
        )
        assert f'model.pretrained="{base}"' in run['command'] and 'autoresume=true' in run['command']
    assert len({run['env']['MASTER_PORT'] for run in made.started}) > 20

    tasks = results['tasks']
    assert tasks['rte']['mean'] == {'accuracy': pytest.approx(0.69)}
    assert tasks['rte']['values'] == {'accuracy': pytest.approx([0.67, 0.68, 0.69, 0.70, 0.71])}
    assert tasks['qqp']['mean'].keys() == {'F1', 'accuracy'} and tasks['qqp']['seeds'] == [17]
    printed = capsys.readouterr().out
    table = Path(f'runs/{name}_glue.md').read_text().split('\n\n')[1]
    assert table in printed
    assert '| rte                | accuracy    |       69.0 |     5 |' in table
    assert '| mnli               | mm accuracy |       67.0 |     1 |' in table
    assert '| cola               | Matthews    |        nan |     5 |' in table  # one of its runs said nan
    written = json.loads(Path(f'runs/{name}_glue.json').read_text(), parse_constant=pytest.fail)
    assert written['tasks']['cola']['values']['Matthews'][1] == 'nan'
    assert written['tasks']['rte'] == tasks['rte'] and written['checkpoint'] == FILE


def test_what_a_checkpoint_may_be(checkpoint, launcher):
    Path('copy.pt').write_bytes(Path(FILE).read_bytes())
    assert cli.main(['export', checkpoint, 'folder']) == 0
    for given, name, source in [
        (f'{checkpoint}/', 'tiny', FILE),
        (FILE, 'tiny', FILE),
        ('copy.pt', 'copy', 'copy.pt'),
        ('./folder/', 'folder', 'folder'),
    ]:
        made = launcher()
        runs_dir = f'runs of {name} {len(given)}'
        results = glue.glue(given, recipes=YAMLS, tasks=['sst2'], runs_dir=runs_dir)
        assert results['checkpoint'] == source
        name = f'{name}_{results["sha256"][:8]}'
        assert given == './folder/' or name.endswith(digits_of(FILE))
        assert [run['name'] for run in made.started] == [f'{name}_glue_sst2_seed17']
        assert Path(runs_dir, f'{name}_glue.json').is_file()


def test_a_name_on_the_hub_has_no_digits(checkpoint, launcher, monkeypatch):
    for reader in ('read_pretrained', 'load_tokenizer'):
        monkeypatch.setattr(glue, reader, lambda source: None)
    made = launcher()
    results = glue.glue('someone/bert', recipes=YAMLS, tasks=['sst2'])
    assert (results['checkpoint'], results['sha256']) == ('someone/bert', None)
    assert [run['name'] for run in made.started] == ['bert_glue_sst2_seed17']


def test_a_checkpoint_has_the_same_runs_however_it_is_given(checkpoint, launcher):
    assert cli.main(['export', checkpoint, 'folder']) == 0
    for one, *others in [
        (checkpoint, FILE, f'./{FILE}', str(Path(FILE).resolve()), f'{checkpoint}/checkpoints/latest-rank0.pt'),
        ('folder', './folder/', str(Path('folder').resolve())),
    ]:
        launcher()
        glue.glue(one, recipes=YAMLS, tasks=['sst2'])
        for other in others:
            made = launcher()
            glue.glue(other, recipes=YAMLS, tasks=['sst2'])
            assert made.started == []


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_another_checkpoint_has_runs_of_its_own(checkpoint, launcher, kind):
    """Whether it lies beside the first one or in its place."""
    Path('other.txt').write_text(Path('vocab.txt').read_text() + 'word\n')
    seen = set()
    for seed, vocabulary in ((1, 'vocab.txt'), (2, 'vocab.txt'), (2, 'other.txt')):
        torch.manual_seed(seed)
        model = models.masked_lm(config=TINY_BERT | {'max_position_embeddings': 128}, tokenizer=vocabulary)
        ids = torch.randint(5, 70, (4, 8))
        shutil.rmtree(checkpoint)
        train_one_batch(model, ids, ids, f'{checkpoint}/checkpoints')
        if kind == 'folder':
            shutil.rmtree('folder', ignore_errors=True)
            assert cli.main(['export', checkpoint, 'folder']) == 0
        made = launcher()
        glue.glue(checkpoint if kind == 'file' else 'folder', recipes=YAMLS, tasks=['sst2'])
        seen.update(run['name'] for run in made.started)
    assert len(seen) == 3 and len([*Path('runs').glob('*_glue.json')]) == 3


def test_scores_of_another_evaluation_are_not_passed_off(checkpoint, name, launcher):
    launcher()
    glue.glue(checkpoint, recipes=YAMLS, tasks=['sst2'])
    made = launcher()
    folder = f'runs/{name}_glue_sst2_seed17'
    with pytest.raises(RecipeError) as error:
        glue.glue(checkpoint, recipes=YAMLS, tasks=['sst2', 'cola'], overrides=['eval_data.max_length=64'])
    assert str(error.value) == (
        f'command line: eval_data.max_length: {folder} was evaluated with other eval_data.max_length; take what it was '
        f'then, or delete {folder}/summary.json, and it is evaluated anew'
    )
    assert not made.started
    shutil.copytree('glue', 'moved')  # what does not change scores may change
    moved = ['eval_data.data_dir=moved', 'eval_data.num_workers=1', 'eval_data.batch_size=8']
    glue.glue(checkpoint, recipes=YAMLS, tasks=['sst2'], overrides=moved)
    assert not made.started
    Path(folder, 'summary.json').unlink()
    glue.glue(checkpoint, recipes=YAMLS, tasks=['sst2'], overrides=['eval_data.max_length=64'])
    assert [run['name'] for run in made.started] == [f'{name}_glue_sst2_seed17']


def test_the_average_counts_a_task_once(checkpoint, launcher):
    launcher()
    results = glue.glue(checkpoint, recipes=YAMLS, tasks=['rte', 'qqp', 'mnli'], seeds=2)
    assert results['tasks'].keys() == {'mnli', 'qqp', 'rte'}
    assert results['average'] == pytest.approx((0.67 + 0.67 + 0.675) / 3)


def test_what_is_finished_is_not_repeated(checkpoint, name, launcher, capsys):
    launcher()
    first = glue.glue(checkpoint, recipes=YAMLS, seeds=1, tasks=['rte'])
    assert [*first['tasks']] == ['rte']  # though the MNLI run, from which it starts, was needed
    again = launcher()
    capsys.readouterr()
    assert glue.glue(checkpoint, recipes=YAMLS, seeds=2, tasks=['rte', 'mnli'])['tasks'].keys() == {'mnli', 'rte'}
    assert [run['name'] for run in again.started] == [f'{name}_glue_rte_seed18']
    assert 'mnli  seed 17  finished before: m accuracy 67.0, mm accuracy 67.0' in capsys.readouterr().out
    with pytest.raises(RecipeError, match=rf'max_duration: runs/{name}_glue_mnli_seed17 is a run of another recipe'):
        glue.glue(checkpoint, recipes=YAMLS, tasks=['mnli'], overrides=['max_duration=1ep'])


def test_recipes_that_distill(checkpoint, name, launcher):
    made = launcher()
    results = glue.glue(checkpoint, recipes=YAMLS, seeds=1, tasks=['rte'], distilled=True, runs_dir='else where')
    assert [run['name'] for run in made.started] == [f'{name}_glue_kd_{task}_seed17' for task in ('mnli', 'rte')]
    assert f'{YAMLS}/rte_kd.yaml' in made.started[1]['command']
    assert f'model.pretrained="else where/{name}_glue_kd_mnli_seed17"' in made.started[1]['command']
    assert results['distilled'] and Path(f'else where/{name}_glue_kd.json').is_file()


def test_each_run_has_a_gpu_of_its_own(checkpoint, launcher, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    made = launcher()
    glue.glue(checkpoint, recipes=YAMLS, tasks=['cola', 'sst2', 'qnli'])
    assert made.most == 3
    assert [run['env']['CUDA_VISIBLE_DEVICES'] for run in made.started[:3]] == ['0', '1', '2']
    assert {run['env']['CUDA_VISIBLE_DEVICES'] for run in made.started} == {'0', '1', '2'}
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,GPU-abc,6')
    made = launcher()
    glue.glue(checkpoint, recipes=YAMLS, tasks=['cola'], jobs=4, runs_dir='other')
    assert made.most == 4
    assert [run['env']['CUDA_VISIBLE_DEVICES'] for run in made.started[:4]] == ['4', 'GPU-abc', '6', '4']


def test_cpu_cores_are_shared(checkpoint, launcher, monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: 8)
    made = launcher()
    glue.glue(checkpoint, recipes=YAMLS, tasks=['cola'], jobs=3)
    assert {run['env']['OMP_NUM_THREADS'] for run in made.started} == {'2'}
    assert 'CUDA_VISIBLE_DEVICES' not in made.started[0]['env'] or os.environ.get('CUDA_VISIBLE_DEVICES') is not None


def test_a_run_that_fails_leaves_the_others_alone(checkpoint, name, launcher, capsys):
    launcher(fails=['cola_seed18', 'mnli'])
    assert cli.main(['glue', checkpoint, '--recipes', str(YAMLS), '--tasks', 'cola,rte,mnli', '--seeds', '3']) == 1
    out, err = capsys.readouterr()
    assert err == (
        'not finished: mnli seed 17, cola seed 18, rte seed 17, rte seed 18, rte seed 19; '
        'the same command goes on with them\n'
    )
    log = f'runs/{name}_glue_cola_seed18.log'
    assert f'cola  seed 18  failed (exit code 3); {log} ends so:\n    what went wrong\n' in out
    assert out.count('not started, because the MNLI run that it starts from failed') == 3
    assert '| cola               | Matthews    |       68.0 |     2 |' in out
    assert '| average of 1 tasks |' in out
    launcher()
    assert cli.main(['glue', checkpoint, '--recipes', str(YAMLS), '--tasks', 'cola,rte', '--seeds', '3']) == 0


MISTAKES = {
    'task': (['--tasks', 'rte,cula'], "there is no task 'cula'; did you mean 'cola'?", 2),
    'seeds': (['--seeds', '0'], '--seeds must be 1 or more, not 0', 2),
    'jobs': (['--jobs', '-1'], '--jobs must be 1 or more, not -1', 2),
    'recipes': (
        ['--recipes', 'no'],
        'there is no recipe no/mnli.yaml: go where yamls/glue is, or name its folder by --rec',
        2,
    ),
    'ours': (['seed=3'], 'command line: seed=3: is not for an override, the command chooses it itself', 2),
    'override': (
        ['max_durration=3ep'],
        "command line: max_durration: a recipe has no 'max_durration'; did you mean 'max_d",
        2,
    ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_one_line(checkpoint, launcher, mistake, capsys):
    arguments, message, exit_code = MISTAKES[mistake]
    made = launcher()
    before = sorted(Path().rglob('*'))
    assert cli.main(['glue', checkpoint, '--recipes', str(YAMLS), *arguments]) == exit_code
    out, err = capsys.readouterr()
    assert err.startswith(message) and err.count('\n') == 1 and out == ''
    assert not made.started and sorted(Path().rglob('*')) == before


def test_what_is_no_checkpoint(launcher, capsys, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    made = launcher()
    assert cli.main(['glue', 'runs/none', '--recipes', str(YAMLS)]) == 1
    assert capsys.readouterr().err.startswith('runs/none is no file or folder here, and cannot be had from')
    with pytest.raises(SystemExit, match='2'):
        cli.main(['glue', 'runs/none', '--bogus'])
    assert 'unrecognized arguments: --bogus' in capsys.readouterr().err
    with pytest.raises(SystemExit, match='2'):
        cli.main(['check', 'a.yaml', 'b=c', '--d'])
    assert not made.started


OVERRIDES = ['callbacks={gate.Gate: {}}', 'save_interval=1ba', 'max_duration=4ba', 'train_data.batch_size=16']


def command(checkpoint):
    arguments = ['glue', checkpoint, '--recipes', str(YAMLS), '--tasks', 'mnli,cola,rte', '--seeds', '1', '--jobs', '2']
    sys.exit(cli.main([*arguments, *OVERRIDES]))


def wait_for(found, seconds=120):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, Path('batches').exists() and Path('batches').read_text()
        time.sleep(0.05)


def wait_for_batches(*wanted, seconds=120):
    batches = Path('batches')
    wait_for(lambda: batches.exists() and sorted(batches.read_text().splitlines()) == sorted(wanted), seconds)


def test_from_end_to_end_with_interruptions(checkpoint, name, capsys, monkeypatch):
    """The command is killed, and so is one of its runs, while the other lives on; the second start puts it right."""
    Path('gate.py').write_text(GATE)
    runs_name, name = f'{name}_glue', f'{name}_glue_{{}}_seed17'
    two = [f'{name.format(task)} {batch}' for task in ('mnli', 'cola') for batch in (1, 2)]
    with in_a_fork(command, checkpoint) as first:
        wait_for_batches(*two)
        processes = psutil.Process(first.pid).children(recursive=True)
        first.kill()
        for process in processes:
            if any('mnli' in argument for argument in process.cmdline()):
                process.kill()

    said = Path('said.txt')
    with in_a_fork(command, checkpoint, out='said.txt') as again:
        wait_for(lambda: said.exists() and said.read_text().count('\n') >= 2)
        assert said.read_text().splitlines()[:2] == [
            f'mnli  seed 17  started, log runs/{name.format("mnli")}.log',
            f'cola  seed 17  waiting for another launch, which is at work in runs/{name.format("cola")}',
        ]
        Path('go').touch()
        again.join(120)
    out = said.read_text()
    assert again.exitcode == 0, out
    patterns = (
        r'mnli .* done: m acc',
        r'cola .* finished by another launch: Matt',
        r'rte .* started',
        r'rte .* done: acc',
    )
    assert all(re.search(pattern, out) for pattern in patterns), out
    # The one that was killed went on behind its first batch, after which there was a checkpoint.
    again = [f'{name.format("mnli")} {batch}' for batch in (2, 3, 4)]
    rest = [f'{name.format("cola")} {batch}' for batch in (3, 4)]
    wait_for_batches(*two, *again, *rest, *(f'{name.format("rte")} {batch}' for batch in range(1, 5)), seconds=1)

    monkeypatch.setattr(subprocess, 'Popen', None)
    results = glue.glue(checkpoint, recipes=YAMLS, tasks=['mnli', 'cola', 'rte'], seeds=1, overrides=OVERRIDES)
    assert json.loads(Path(f'runs/{runs_name}.json').read_text()) == results
    assert capsys.readouterr().out.count('finished before') == 3


SLEEPS = """
import pathlib, subprocess, sys, time
deaf = 'import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(99)'
child = subprocess.Popen([sys.executable, '-c', deaf])
pathlib.Path('pids.tmp').write_text(str(child.pid))
time.sleep(0.5)
pathlib.Path('pids.tmp').rename('pids')
time.sleep(99)
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whoever_ends_the_command_ends_its_runs(checkpoint, monkeypatch, heeded, number):
    started = []
    popen = subprocess.Popen

    def start_sleeper(command, **more):
        started.append(popen([sys.executable, '-c', SLEEPS], **more))
        return started[-1]

    def end_once_started(seconds):
        if Path('pids').exists():
            Path('pids').rename('seen')
            os.kill(os.getpid(), number)
        sleep(seconds)

    sleep = time.sleep
    monkeypatch.setattr(jobs, '_SECONDS_TO_END', 1)
    monkeypatch.setattr(subprocess, 'Popen', start_sleeper)
    monkeypatch.setattr(time, 'sleep', end_once_started)
    before = heeded(number)
    assert cli.main(['glue', checkpoint, '--recipes', str(YAMLS), '--tasks', 'cola']) == 130
    assert signal.getsignal(number) == before
    assert len(started) == 1 and started[0].returncode == -signal.SIGTERM
    child = int(Path('seen').read_text())  # which does not end when it is asked to
    end = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        sleep(0.05)
