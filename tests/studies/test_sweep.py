"""A sweep from end to end; its runs are real ones, in forked processes (see `study_parts`)."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from study_parts import METRIC, POPEN, ForkedLauncher, write_recipes

from composer_kd import cli, jobs
from composer_kd.recipes import RecipeError
from composer_kd.studies.rows import read_rows
from composer_kd.studies.sweep import sweep

PATIENCE = 120.0

SWEEP = f"""\
metric: {METRIC}
seeds: [1]
methods:
  baseline: {{recipe: recipes/base.yaml, baseline: true}}
"""
ALL = (
    SWEEP
    + """\
  kd: {recipe: recipes/kd.yaml}
  recorded: {recipe: recipes/recorded.yaml, record: {recipe: recipes/kd.yaml}}
  sampled:
    recipe: recipes/kd.yaml
    overrides: {teachers: [{name: network, runs: '${folder}/pool-*'}]}
    after: [pool]
teachers: {pool: {recipe: recipes/base.yaml, seeds: [5, 6]}}
"""
)

pytestmark = pytest.mark.filterwarnings('ignore:No batches were trained', 'ignore:The ``compute`` method of metric')


@pytest.fixture(autouse=True)
def work_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    write_recipes()
    Path('s.yaml').write_text(SWEEP)
    monkeypatch.setattr(jobs, '_SECONDS_BETWEEN_LOOKS', 0.02)
    monkeypatch.setattr(subprocess, 'Popen', ForkedLauncher)
    yield
    torch.set_num_threads(threads)


def fork(work, log='driver.txt'):
    """Do some work in a process of its own; its id."""
    process = os.fork()
    if process:
        return process
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may have been started with it ignored
    try:
        with Path(log).open('a', buffering=1) as sys.stdout:
            sys.stderr = sys.stdout
            code = work()
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def drive(*options):
    return fork(lambda: cli.main(['sweep', 's.yaml', *options]))


def finish(process):
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def timeless(rows):
    """What is the same however often a sweep was broken off."""
    # A record asks again about what was said when it was killed, and tells.
    costs = {'record': ['teacher_forwards']}
    return [{k: v for k, v in row.items() if 'second' not in k and k not in costs.get(row['role'], ())} for row in rows]


def started(cell):
    return Path('driver.txt').read_text().count(f'{cell}  started')


def test_all_kinds_of_cells_once(capsys):
    Path('s.yaml').write_text(ALL)
    assert cli.main(['sweep', 's.yaml', '--dry-run']) == 0
    listing = capsys.readouterr().out
    assert 'sampled-seed1 (student, after pool-seed5, pool-seed6)\n    composer recipes/kd.yaml ' in listing
    assert 'composer-kd record recipes/kd.yaml runs_dir=runs/s --out runs/s/records/recorded\n' in listing
    assert listing.endswith('\n8 runs; nothing was started\n') and not Path('runs').exists()

    assert finish(drive('--jobs', '2')) == 0
    rows = {row['cell']: row for row in read_rows(Path('runs/s'))}
    roles = {name: row['role'] for name, row in rows.items()}
    assert roles == {
        'baseline-seed1': 'student',
        'teacher': 'teacher',
        'kd-seed1': 'student',
        'recorded-record': 'record',
        'recorded-seed1': 'student',
        'pool-seed5': 'teacher',
        'pool-seed6': 'teacher',
        'sampled-seed1': 'student',
    }
    assert all(started(cell) == 1 for cell in rows)
    said = Path('driver.txt').read_text()
    assert said.endswith('8 runs are finished; rows in runs/s/results.jsonl\n')
    assert 'training the teacher' not in ''.join(path.read_text() for path in Path('runs/s').glob('*.log'))
    # What a record says is what the network says; and what was paid for it is told.
    kd, recorded, teacher, record = (rows[n] for n in ('kd-seed1', 'recorded-seed1', 'teacher', 'recorded-record'))
    assert recorded['metrics'] == kd['metrics']
    assert kd['teacher_training_seconds'] == recorded['teacher_training_seconds'] == teacher['train_seconds'] > 0
    assert recorded['recording_seconds'] == record['train_seconds'] > 0 == kd['recording_seconds']
    assert record['samples'] == 96 and record['teacher_forwards'] == 6
    pool = rows['pool-seed5']['train_seconds'] + rows['pool-seed6']['train_seconds']
    assert rows['sampled-seed1']['teacher_training_seconds'] == pytest.approx(pool)
    assert [name for name, row in rows.items() if row['baseline']] == ['baseline-seed1']
    assert {row['status'] for row in rows.values()} == {'finished'} and {row['study'] for row in rows.values()} == {'s'}
    assert rows['baseline-seed1']['config']['model']['width'] == 2 and rows['baseline-seed1']['batches'] == 3
    settings = {
        'name': 's',
        'kind': 'sweep',
        'metric': METRIC,
        'goal': 'max',
        'points': 'max_duration',
        'file': 's.yaml',
        'students': [name for name, row in rows.items() if row['role'] == 'student'],
    }
    assert yaml.safe_load(Path('runs/s/study.yaml').read_text()) == settings

    # Nothing is done twice, and rows come from what the runs have left.
    before = Path('runs/s/results.jsonl').read_bytes()
    Path('runs/s/results.jsonl').unlink()
    assert sweep('s.yaml') == [*rows.values()]
    assert capsys.readouterr().out.startswith('8 of 8 runs were finished before\n')
    assert Path('runs/s/results.jsonl').read_bytes() == before
    assert cli.main(['sweep', 's.yaml', '--dry-run']) == 0
    assert 'recorded-record (record, finished, after teacher)' in capsys.readouterr().out
    assert all(started(cell) == 1 for cell in rows)

    # But for a record that is not whole any more.
    next(Path('runs/s/records/recorded').glob('view00001-shard*')).unlink()
    assert finish(drive()) == 0
    assert {cell for cell in rows if started(cell) == 2} == {'recorded-record'}
    (again,) = (row for row in read_rows(Path('runs/s')) if row['role'] == 'record')
    assert again['train_seconds'] > record['train_seconds'] and again['teacher_forwards'] > 6

    # Who has learned from others than are there now is another run.
    Path('s.yaml').write_text(ALL.replace('[5, 6]', '[5]'))
    with pytest.raises(RecipeError, match=r'^s\.yaml:9: teachers: runs/s/sampled-seed1 is a run of another recipe'):
        sweep('s.yaml')


class Late(ForkedLauncher):
    """Ends badly when all is done."""

    def _work(self, *arguments):
        return super()._work(*arguments) or 1


def test_a_student_can_be_judged_by_a_run_that_goes_on_from_it(capsys):
    run = "load_path: '${run}/checkpoints/latest-rank0.pt', load_weights_only: true, optimizer.lr: 0.2"
    text = (
        SWEEP.replace(METRIC, f'more/{METRIC}')
        + f'then: {{more: {{recipe: recipes/base.yaml, overrides: {{{run}}}}}}}\n'
    )
    Path('s.yaml').write_text(text.replace('lr: 0.2', 'lr: -1.0'))
    assert finish(drive()) == 1
    student, more = read_rows(Path('runs/s'))
    assert (student['status'], more['status']) == ('finished', 'failed') and 'Invalid learning rate' in more['error']
    assert cli.main(['report', 'runs/s']) == 1
    assert 'no run of this study is finished; see runs/s/results.jsonl' in capsys.readouterr().err

    Path('s.yaml').write_text(text)
    assert finish(drive()) == 0
    again, more = read_rows(Path('runs/s'))
    assert again == student and started('baseline-seed1') == 1
    assert (more['cell'], more['method'], more['role'], more['of'], more['seed'], more['status']) == (
        *('baseline-seed1-more', 'more', 'follow-up', 'baseline-seed1', 1, 'finished'),
    )
    assert more['config']['load_path'].startswith('runs/s/baseline-seed1/checkpoints')
    said = Path('driver.txt').read_text()
    assert said.count('MulticlassAccuracy') == said.count(f's, MulticlassAccuracy {more["metrics"][METRIC]:.4f}\n') == 1
    assert yaml.safe_load(Path('runs/s/study.yaml').read_text())['then'] == ['more']

    assert student['metrics'][METRIC] != more['metrics'][METRIC]
    for options, row in ([], more), (['--metric', METRIC], student):
        assert cli.main(['report', 'runs/s', *options]) == 0
        assert f'{100 * row["metrics"][METRIC]:.2f}' in Path('runs/s/report.md').read_text().partition('## How')[0]

    Path('s.yaml').write_text(text.replace('baseline: true', 'baseline: true, overrides: {model.width: 3}'))
    shutil.rmtree('runs/s/baseline-seed1')
    message = 'runs/s/baseline-seed1-more is of a run after baseline-seed1, which had another recipe then; delete it'
    with pytest.raises(RecipeError, match=message):
        sweep('s.yaml')


def test_a_run_that_ends_badly_after_all_is_written_is_finished(monkeypatch):
    monkeypatch.setattr(subprocess, 'Popen', Late)
    assert finish(drive()) == 0
    assert [row['status'] for row in read_rows(Path('runs/s'))] == ['finished']


def test_what_is_not_in_the_file_any_more(capsys):
    Path('s.yaml').write_text(SWEEP.replace('[1]', '[1, 2]'))
    assert finish(drive()) == 0
    Path('s.yaml').write_text(SWEEP)
    assert cli.main(['sweep', 's.yaml']) == 0
    said = '1 runs are not in the file any more: their rows go, their folders stay\n'
    assert said in capsys.readouterr().out
    assert [row['cell'] for row in read_rows(Path('runs/s'))] == ['baseline-seed1']
    assert cli.main(['sweep', 's.yaml']) == 0 and said not in capsys.readouterr().out


def test_what_fails_is_not_repeated_unless_asked_for(monkeypatch):
    """Others go on; what waits for it does not begin."""
    text = ALL.replace('recipes/kd.yaml}\n', 'recipes/kd.yaml, overrides: {device_train_microbatch_size: 0}}\n', 1)
    Path('s.yaml').write_text(text)
    broken = Path('recipes/teacher.yaml').read_text()
    Path('recipes/teacher.yaml').write_text(
        broken.replace('name: fashion_mnist,', 'name: fashion_mnist, data_dir: no,', 1).replace(
            'synthetic: true', 'synthetic: false', 1
        )
    )
    assert finish(drive()) == 1
    said = Path('driver.txt').read_text()
    assert 'teacher  failed (exit code 1); runs/s/teacher.log ends so:\n    ' in said
    for name in ('kd-seed1', 'recorded-record'):
        assert f'{name}  not started, because teacher failed\n' in said
    assert 'recorded-seed1  not started, because recorded-record failed\n' in said
    assert said.splitlines()[-1] == (
        'failed: teacher; not started without them: kd-seed1, recorded-record, recorded-seed1; their logs are in '
        'runs/s, and --retry starts them again'
    )
    rows = {row['cell']: row for row in read_rows(Path('runs/s'))}
    assert [name for name, row in rows.items() if row['status'] == 'failed'] == ['teacher']
    assert 'no' in rows['teacher']['error'] and rows['teacher']['metrics'] == {}
    assert rows['teacher']['train_seconds'] is None
    assert rows['sampled-seed1']['status'] == 'finished'

    assert finish(drive()) == 1
    assert (
        started('teacher') == 1
        and 'teacher  failed before; --retry starts it again\n' in Path('driver.txt').read_text()
    )
    Path('recipes/teacher.yaml').write_text(broken)
    assert finish(drive('--retry')) == 1
    assert started('teacher') == 2 and started('baseline-seed1') == 1
    rows = {row['cell']: row['status'] for row in read_rows(Path('runs/s'))}
    assert rows.pop('kd-seed1') == 'failed' and {*rows.values()} == {'finished'} and len(rows) == 7
    # Another command is another try.
    Path('s.yaml').write_text(ALL)
    assert finish(drive()) == 0
    assert started('kd-seed1') == 2


def test_a_metric_that_no_run_reports_stops_the_sweep():
    Path('s.yaml').write_text(SWEEP.replace('Multiclass', 'Multi').replace('[1]', '[1, 2, 3]'))
    for _ in range(2):
        assert finish(drive()) == 2
        last = Path('driver.txt').read_text().splitlines()[-1]
        assert last.startswith('s.yaml:1: metric: baseline-seed1 does not report metrics/eval/MultiAccuracy; it has: m')
        assert METRIC in last
    assert started('baseline-seed1') == 1 and started('baseline-seed2') == 0
    Path('s.yaml').write_text(SWEEP.replace('[1]', '[1, 2, 3]'))
    assert finish(drive()) == 0
    assert started('baseline-seed1') == 1


def wait_until(what):
    end = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupted(number):
    Path('s.yaml').write_text(SWEEP.replace('[1]', '[1, 2]') + 'overrides: {max_duration: 100000ba}\n')
    driver = drive('--jobs', '2')
    wait_until(lambda: len([*Path('runs/s').glob('*/checkpoints/latest-rank0.pt')]) == 2)
    children = psutil.Process(driver).children(recursive=True)
    os.kill(driver, number)
    assert finish(driver) == 130
    assert Path('driver.txt').read_text().endswith('interrupted: 0 of 2 runs are finished; the same command goes on\n')
    psutil.wait_procs(children, timeout=PATIENCE)
    assert len(children) == 2 and not any(child.is_running() for child in children)


def test_one_driver_at_a_time(capsys):
    Path('s.yaml').write_text(SWEEP + 'overrides: {max_duration: 100000ba}\n')
    driver = drive()
    wait_until(lambda: Path('runs/s/baseline-seed1').exists())
    assert cli.main(['sweep', 's.yaml']) == 1
    assert capsys.readouterr().err == (
        's.yaml:1: name: another command is at work on the study in runs/s; '
        'wait until it is done, or choose another name\n'
    )
    os.kill(driver, signal.SIGTERM)
    assert finish(driver) == 130


def test_killed_again_and_again():
    """Its runs stay at work, and the next driver waits for them; or they are killed, too, and go on where they were."""
    Path('s.yaml').write_text(ALL)
    began = time.monotonic()
    assert finish(drive('--jobs', '2')) == 0
    seconds = time.monotonic() - began
    whole = timeless(read_rows(Path('runs/s')))
    Path('runs').rename('whole')
    moments = random.Random(7)
    for with_its_runs in (False, True, True, False, True):
        driver = drive('--jobs', '2')
        time.sleep(seconds / 2 * moments.random())
        for process in psutil.Process(driver).children(recursive=True) if with_its_runs else ():
            process.kill()
        os.kill(driver, signal.SIGKILL)
        finish(driver)
    assert finish(drive('--jobs', '2')) == 0
    assert timeless(read_rows(Path('runs/s'))) == whole


def test_what_a_killed_driver_left_at_work_is_waited_for():
    Path('s.yaml').write_text(SWEEP.replace('[1]', '[1, 2]') + 'overrides: {max_duration: 60ba}\n')
    driver = drive()
    wait_until(lambda: Path('driver.txt').exists() and started('baseline-seed1'))
    os.kill(driver, signal.SIGKILL)
    finish(driver)
    assert finish(drive()) == 0
    assert 'baseline-seed1  waiting for another process, which is at work on it\n' in Path('driver.txt').read_text()
    assert started('baseline-seed1') == started('baseline-seed2') == 1


MISTAKES = {
    'results': (
        'results.jsonl',
        '{"study": "s"',
        1,
        'runs/s/results.jsonl:1: this is no whole row of results; delete run',
    ),
    'settings': (
        'study.yaml',
        'kind: search\n',
        2,
        's.yaml:1: name: runs/s is the folder of a search; choose another n',
    ),
    'file': (
        'study.yaml',
        'kind: sweep\nfile: t.yaml\n',
        2,
        's.yaml:1: name: runs/s is the folder of the study in t.yaml; choose another n',
    ),
    'run': ('recipe.yaml', 'x', 2, 's.yaml:1: name: runs/s is the folder of a run; choose another name'),
    'cell': (
        'baseline-seed1/x',
        'x',
        2,
        'recipes/base.yaml:1: runs/s/baseline-seed1 is there, but is no run; delete ru',
    ),
}


@pytest.mark.parametrize('case', MISTAKES)
def test_what_lies_there_is_not_the_sweeps(case, capsys):
    name, text, code, message = MISTAKES[case]
    path = Path('runs/s', name)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert cli.main(['sweep', 's.yaml']) == code
    out, err = capsys.readouterr()
    assert out == '' and err.startswith(message) and err.count('\n') == 1
    assert path.read_text() == text


def test_options(capsys):
    assert cli.main(['sweep', 's.yaml', '--jobs', '0']) == 2
    assert capsys.readouterr().err == '--jobs must be 1 or more, not 0\n'
    assert cli.main(['sweep', 's.yaml', '--slurm', 'timeout_min=1']) == 2
    assert capsys.readouterr().err == '--slurm timeout_min=1: is for --launcher slurm; add that, or leave it out\n'
    assert not Path('runs').exists()


def test_as_a_person_starts_it(monkeypatch):
    """In processes of their own."""
    monkeypatch.setattr(subprocess, 'Popen', POPEN)
    code = 'import sys; from composer_kd.cli import main; sys.exit(main(sys.argv[1:]))'
    command = [sys.executable, '-c', code, 'sweep', 's.yaml', '--jobs', '2']
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.endswith('\n1 runs are finished; rows in runs/s/results.jsonl\n')
    (row,) = read_rows(Path('runs/s'))
    assert row['batches'] == 3 and row['world_size'] == 1
    assert cli.main(['sweep', 's.yaml']) == 0
