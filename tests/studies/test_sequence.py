import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sequences import HEAD, METRIC, RECIPE, TAUGHT, Jobs, without_seconds, write
from study_parts import ForkedLauncher

from composer_kd.recipes import RecipeError, run
from composer_kd.recipes.load import read
from composer_kd.studies import sequence as module
from composer_kd.studies.rows import read_rows
from composer_kd.studies.sequence import check_file, sequence

YAMLS = sorted((Path(__file__).parents[2] / 'yamls' / 'sequences').glob('*.yaml'))

GATE = """\
import time
from pathlib import Path

from composer.core import Callback

class Gate(Callback):
    '''Stops in the third epoch until there is a file that lets its run go.'''

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == 10:
            Path('stopped').touch()
            while not Path(f'go-{state.run_name}').exists():
                time.sleep(0.02)
"""


@pytest.fixture
def in_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, 'Jobs', Jobs)
    monkeypatch.setattr(Jobs, 'broken', set())
    monkeypatch.setattr(Jobs, 'stopped', None)
    Jobs.started.clear()
    return Jobs


def recipes_of(rows):
    return {row['cell']: row['config'] for row in rows}


def test_a_chain_whose_runs_teach_the_next(in_process, capsys):
    file = write(HEAD['chain'] + 'arms: {without: {}, last: {teachers_from: last}}\n')
    rows = sequence(file)
    names = [f'{arm}-{step}' for arm in ('without', 'last') for step in range(3)]
    assert in_process.names() == [row['cell'] for row in rows] == names
    assert read_rows(Path('runs/s')) == rows
    assert [(row['arm'], row['step'], row['baseline'], row['seed']) for row in rows[2:5]] == [
        ('without', 2, True, 19),
        ('last', 0, False, 17),
        ('last', 1, False, 18),
    ]
    recipes = recipes_of(rows)
    assert [recipes[name].get('teachers') for name in names] == [
        *[None] * 4,
        [{'name': 'network', 'runs': 'runs/s/last-0'}],
        [{'name': 'network', 'runs': 'runs/s/last-1'}],
    ]
    assert rows[0]['metrics'][METRIC] == rows[3]['metrics'][METRIC]
    assert [row['teacher_forwards'] for row in rows] == [0, 0, 0, 0, 8, 8]
    for arm in (rows[:3], rows[3:]):
        seconds = [row['train_seconds'] for row in arm]
        assert [row['cumulated_seconds'] for row in arm] == pytest.approx([sum(seconds[: n + 1]) for n in range(3)])
        best = [row['metrics'][METRIC] for row in arm]
        assert [row['best_so_far'] for row in arm] == [max(best[: n + 1]) for n in range(3)]
    shown = capsys.readouterr().out
    assert [line.split('|')[1].strip() for line in shown.splitlines() if line.startswith('| ')][2:] == [
        row['arm'] for row in rows
    ]
    assert read('runs/s/study.yaml', 'study').config == {
        **{'name': 's', 'kind': 'chain', 'metric': METRIC, 'goal': 'max', 'points': None, 'file': 's.yaml'}
    }
    assert without_seconds(sequence(file)) == without_seconds(rows)
    assert in_process.names() == []


def test_steps_of_other_sizes_and_a_pool_whose_records_are_shared(in_process):
    steps = ''.join(f'  - {{recipe: small.yaml, overrides: {{model.width: {width}}}}}\n' for width in (4, 3, 2, 2))
    arm = 'arms: {all: {teachers_from: all, record: true, when_taught: {max_duration: 1ep}}}\n'
    rows = sequence(write(f'kind: chain\nmetric: {METRIC}\nsteps:\n{steps}{arm}'))
    assert [row['settings']['model.width'] for row in rows] == [4, 3, 2, 2]
    assert [row['parameters'] for row in rows] == sorted((row['parameters'] for row in rows), reverse=True)
    assert [row['epochs'] for row in rows] == [2, 1, 1, 1]
    config = rows[3]['config']
    assert [entry['runs'] for entry in config['teachers']] == ['runs/s/all-0', 'runs/s/all-1', 'runs/s/all-2']
    assert config['algorithms']['teacher_sampling'] == {'num_teachers': 1}
    pool = Path(config['algorithms']['knowledge_distillation']['record'])
    alone = Path(rows[1]['config']['algorithms']['knowledge_distillation']['record'])
    assert (pool / '0').resolve() == alone.resolve()
    assert sorted(path.name.rsplit('-', 1)[0] for path in alone.parent.iterdir()) == [
        *('all-0', 'all-1', 'all-2', 'pool', 'pool')
    ]
    # One teacher per batch: all batches of the second run, fewer of the later ones, which find some in the records.
    assert rows[1]['teacher_forwards'] == 4 and sum(row['teacher_forwards'] for row in rows[2:]) < 8

    shutil.rmtree('runs/s/all-0')  # trained anew, it is another teacher, and the next run is to learn from that
    shutil.rmtree('runs/s/all-3')
    again = sequence('s.yaml')
    assert in_process.names()[-2:] == ['all-0', 'all-3']
    assert [row['metrics'] for row in again] == [row['metrics'] for row in rows]

    shutil.rmtree('runs/s/all-0')  # of another size, it would have taught the next ones something else
    Path('s.yaml').write_text(Path('s.yaml').read_text().replace('width: 4', 'width: 5'))
    message = 'runs/s/all-1 is of a run after all-0, which had another recipe then; delete it'
    with pytest.raises(RecipeError, match=message):
        sequence('s.yaml')


@pytest.mark.parametrize('rule', ['best', '{top: 2}'])
def test_a_search_whose_best_runs_teach_the_next(in_process, rule):
    rows = sequence(write(HEAD['search'] + f'arms: {{with: {{teachers_from: {rule}, record: true}}}}\n'))
    assert [row['step'] for row in rows] == [0, 1, 2, 3]
    assert all(row['settings'] == {'optimizer.lr': row['config']['optimizer']['lr']} for row in rows)
    qualities = [row['metrics'][METRIC] for row in rows]
    count = 1 if rule == 'best' else 2
    for number in range(1, 4):
        best = sorted(sorted(range(number), key=lambda run: -qualities[run])[:count])
        teachers = [entry['runs'] for entry in rows[number]['config']['teachers']]
        assert teachers == [f'runs/s/with-{run}' for run in best]
    heard = [tuple(entry['runs'] for entry in row['config']['teachers']) for row in rows[1:]]
    if rule == 'best':  # said once for each sample, in whichever run
        assert sum(row['teacher_forwards'] for row in rows[1:]) == 4 * len({*heard})


def test_stages_begin_anew_or_with_the_weights_before(in_process):
    rows = sequence(write(HEAD['continual'] + 'arms: {fresh: {}, warm: {start: warm, teachers_from: last}}\n'))
    assert [row['samples'] for row in rows] == [128, 192, 256] * 2
    assert [row['settings'] for row in rows[:3]] == [{'train_data.subset': subset} for subset in (64, 96, 128)]
    recipes = recipes_of(rows)
    assert 'load_path' not in recipes['fresh-2'] and 'load_path' not in recipes['warm-0']
    assert (
        Path(recipes['warm-2']['load_path']).resolve() == Path('runs/s/warm-1/checkpoints/ep2-ba6-rank0.pt').resolve()
    )
    logs = [Path(f'runs/s/{cell}/metrics.jsonl').read_text() for cell in ('fresh-2', 'warm-2')]
    first = [json.loads(log.splitlines()[0]) for log in logs]
    label = [row.get('loss/train/label', row.get('loss/train/total')) for row in first]
    assert label[1] < label[0] and first[1]['batch'] == 1


def test_stages_as_a_list(in_process):
    stages = 'stages: [{train_data.subset: 0.25, train_data.shuffle: false}, {train_data.subset: 1.0}]\n'
    rows = sequence(write(f'kind: continual\nmetric: {METRIC}\nrecipe: small.yaml\n{stages}arms: {{a: {{}}}}\n'))
    assert [row['samples'] for row in rows] == [640, 2560]


def test_what_fails_ends_a_chain_but_not_a_search(in_process, capsys):
    stages = HEAD['continual'].replace('[64, 96, 128]', '[64, 8, 96]')
    file = write(stages + 'arms: {one: {}, two: {}}\n')
    with pytest.raises(RecipeError, match=r'^failed: one-1, two-1; not started after them: one-2, two-2; ') as caught:
        sequence(file)
    assert caught.value.exit_code == 1
    assert in_process.names() == ['one-0', 'one-1', 'two-0', 'two-1']
    rows = read_rows(Path('runs/s'))
    assert [row['status'] for row in rows] == ['finished', 'failed'] * 2
    assert 'which is not one batch of batch_size=32' in rows[1]['error']
    with pytest.raises(RecipeError):
        sequence(file)
    assert in_process.names() == [] and 'one-1  failed before; --retry starts it again' in capsys.readouterr().out
    with pytest.raises(RecipeError):
        sequence(file, retry=True)
    assert in_process.names() == ['one-1', 'two-1']


def test_a_search_goes_on_without_what_failed(in_process):
    text = f'kind: search\nmetric: {METRIC}\nrecipe: small.yaml\ntrials: 4\narms: {{with: {{teachers_from: all}}}}\n'
    file = write(text + 'search: {train_data.subset: {choices: [8, 64]}}\nsampler: {name: random, seed: 1}\n')
    with pytest.raises(RecipeError, match=r'^failed: with-'):
        sequence(file)
    rows = read_rows(Path('runs/s'))
    bad = [row['cell'] for row in rows if row['settings'] == {'train_data.subset': 8}]
    assert 0 < len(bad) < 4
    assert [row['cell'] for row in rows if row['status'] == 'failed'] == bad
    taught = {entry['runs'] for row in rows for entry in row['config'].get('teachers', [])}
    assert not taught & {f'runs/s/{cell}' for cell in bad}
    in_process.names()
    with pytest.raises(RecipeError, match=r'^failed: with-'):
        sequence(file, retry=True)
    assert in_process.names() == bad


def test_what_failed_in_a_search_and_is_run_again_teaches_none_of_those_that_ran_without_it(in_process):
    file = write(HEAD['search'] + TAUGHT.replace('last', 'all'))
    in_process.broken |= {'with-1', 'with-3'}
    with pytest.raises(RecipeError, match=r'^failed: with-1, with-3; '):
        sequence(file)
    first = read_rows(Path('runs/s'))
    assert in_process.names() == ['with-0', 'with-1', 'with-2', 'with-3']

    in_process.broken.clear()
    in_process.stopped = 'with-3'
    with pytest.raises(KeyboardInterrupt):
        sequence(file, retry=True)
    assert in_process.names() == ['with-1', 'with-3']
    rows = read_rows(Path('runs/s'))
    assert [row['status'] for row in rows] == ['finished', 'finished', 'finished', 'failed']
    assert rows[2]['command'] == first[2]['command'] and rows[3] == first[3]

    in_process.stopped = None
    rows = sequence(file)
    assert in_process.names() == ['with-3']
    assert [row['command'] for row in rows] == [row['command'] for row in first]
    assert sequence(file) == read_rows(Path('runs/s')) == rows and in_process.names() == []

    file.write_text(file.read_text().replace('trials: 4', 'trials: 5'))
    rows = sequence(file)
    taught = [[entry['runs'][-1] for entry in row['config'].get('teachers', [])] for row in rows]
    assert taught == [[], ['0'], ['0'], ['0', '2'], ['0', '1', '2', '3']]  # a new one learns from all that are there
    assert in_process.names() == ['with-4']


def test_rows_of_arms_that_are_still_to_be_looked_at_are_kept(in_process):
    file = write(HEAD['chain'].replace('3', '2') + 'arms: {b: {}}\n')
    in_process.broken |= {'b-1'}
    with pytest.raises(RecipeError, match=r'^failed: b-1; '):
        sequence(file)
    before = read_rows(Path('runs/s'))
    file.write_text(file.read_text().replace('{b: {}}', '{a: {}, b: {}}'))
    in_process.stopped = 'a-1'
    with pytest.raises(KeyboardInterrupt):
        sequence(file)
    rows = read_rows(Path('runs/s'))
    assert [row['cell'] for row in rows] == ['a-0', 'b-0', 'b-1'] and rows[1:] == before
    in_process.stopped = None
    in_process.names()
    with pytest.raises(RecipeError, match=r'^failed: b-1; '):
        sequence(file)
    assert in_process.names() == ['a-1']  # what failed is not tried again
    run('small.yaml', before[1]['command'][1:])  # by hand
    assert [row['status'] for row in sequence(file)] == ['finished'] * 4 and in_process.names() == []


def fork(out=os.devnull):
    """Start a driver as a process of its own, which need not import everything anew."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with Path(out).open('w') as sys.stdout:
                sequence('s.yaml')
                code = 0
        finally:
            os._exit(code)
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize('kind', HEAD)
def test_killed_at_any_moment(in_process, kind):
    """Killed together with the run that is at work; the driver alone is killed below."""
    write(HEAD[kind] + TAUGHT)
    start = time.monotonic()
    whole = without_seconds(sequence('s.yaml'))
    took = time.monotonic() - start
    Path('runs').rename('whole')
    numbers, kills = random.Random(kind), 0
    for _ in range(4):
        child, end = fork(), time.monotonic() + numbers.uniform(0, 0.7 * took)
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
            time.sleep(0.01)
        if ended != (0, 0):
            assert ended[1] == 0
            break
        kill(child)
        kills += 1
    assert kills
    assert without_seconds(sequence('s.yaml')) == without_seconds(read_rows(Path('runs/s'))) == whole


def test_runs_that_fall_behind_end_early_and_a_driver_that_is_killed(tmp_path, monkeypatch):
    """With forks: the driver is killed while its run waits; the next one waits for that, and then ends one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, 'Popen', ForkedLauncher)
    Path('gate_of_a_sequence.py').write_text(GATE)
    recipe = RECIPE.replace('2ep', '4ep') + 'callbacks: {gate_of_a_sequence.Gate: {}}\n'
    text = HEAD['search'].replace('trials: 4', 'trials: 2')
    write(text + 'pruner: {name: threshold_pruner, lower: 2.0, n_warmup_steps: 1}\narms: {a: {}}\n', recipe)

    def wait_until(happened):
        end = time.monotonic() + 200
        while not happened():
            assert time.monotonic() < end
            time.sleep(0.05)

    first = fork('first.out')
    wait_until(lambda: Path('stopped').exists())
    kill(first)
    again, out = fork('again.out'), Path('again.out')
    wait_until(lambda: out.exists() and 'a-0  waiting for another process' in out.read_text())
    Path('go-a-0').touch()  # the run ends, and is judged by what it had found after two epochs
    wait_until(lambda: 'a-0  ended early' in out.read_text())
    # The other one is ended as it waits behind its second epoch.
    wait_until(lambda: (ended := os.waitpid(again, os.WNOHANG)) != (0, 0) and not ended[1])
    assert 'a-1  ended early' in out.read_text()
    rows = read_rows(Path('runs/s'))
    assert [(row['status'], row['batches'], row['best_so_far']) for row in rows] == [('pruned', 8, None)] * 2
    assert all(row['train_seconds'] > 0 and 0 < row['metrics'][METRIC] < 1 for row in rows)
    assert rows[1]['cumulated_seconds'] == pytest.approx(sum(row['train_seconds'] for row in rows))
    assert not Path('runs/s/a-1/summary.json').exists()


def test_a_metric_that_no_run_reports_ends_it_at_once(in_process):
    file = write(HEAD['chain'].replace('MulticlassAccuracy', 'F1') + 'arms: {a: {}}\n')
    with pytest.raises(
        RecipeError, match=rf's.yaml:2: metric: a-0 does not report metrics/eval/F1; it has: .*{METRIC}'
    ):
        sequence(file)
    assert in_process.names() == ['a-0']


def test_a_dry_run_starts_nothing(in_process, capsys):
    sequence(write(HEAD['continual'] + TAUGHT), dry_run=True)
    out = capsys.readouterr().out
    assert 'with-2 after with-1, or another run before it\n    composer small.yaml train_data.subset=128 ' in out
    assert '1 arms of 3 runs, 3 in all; nothing was started' in out
    assert not Path('runs').exists() and not in_process.names()


A = 'arms: {a: {}}\n'
MISTAKES = {
    'kind': (
        f'kind: grid\nmetric: {METRIC}\n' + A,
        "s.yaml:1: kind: must be one of search, continual, chain, not 'grid'",
    ),
    'key': (HEAD['chain'] + A + 'trials: 3\n', "s.yaml:6: trials: a chain has no 'trials'"),
    'arms': (HEAD['chain'], 's.yaml:1: arms: say what is compared'),
    'arm key': (HEAD['chain'] + 'arms:\n  a: {teacher_from: best}\n', 's.yaml:6: arms.a.teacher_from: there is no'),
    'arm name': (HEAD['chain'] + 'arms:\n  a/b: {}\n', 's.yaml:6: arms.a/b: is a part of folder names'),
    'rule': (
        HEAD['chain'] + 'arms:\n  a: {teachers_from: first}\n',
        'teachers_from: must be best, last, all or {top: 3}',
    ),
    'top': (HEAD['chain'] + 'arms:\n  a: {teachers_from: {top: 0}}\n', 'teachers_from: must be best, last, all or'),
    'needless': (HEAD['chain'] + 'arms:\n  a: {record: true}\n', 's.yaml:6: arms.a.record: is for runs with a teacher'),
    'record': (
        HEAD['chain'] + 'arms:\n  a: {teachers_from: best, distillation: {record: x}}\n',
        's.yaml:6: arms.a.distillation.record: is chosen by the command; give the arm record: true',
    ),
    'distillation': (
        HEAD['chain'] + 'arms:\n  a: {teachers_from: best, distillation: {temprature: 2.0}}\n',
        "s.yaml:6: algorithms.knowledge_distillation.temprature: KnowledgeDistillation has no argument 'temprature'",
    ),
    'teacher': (
        HEAD['chain'] + 'arms:\n  a: {teachers_from: best, teacher: {precison: fp32}}\n',
        "s.yaml:6: teachers.0.precison: NetworkTeacher has no argument 'precison'",
    ),
    'taught': (
        HEAD['chain'] + 'arms:\n  a:\n    teachers_from: best\n    when_taught:\n      optimizer.lrr: 1.0\n',
        "s.yaml:9: optimizer.lrr: SGD has no argument 'lrr'; did you mean 'lr'?",
    ),
    'override': (HEAD['chain'] + 'overrides: {model.wdth: 3}\n' + A, 's.yaml:5: model.wdth: small_convnet has no'),
    'seed': (
        HEAD['chain'] + 'overrides: {seed: 3}\n' + A,
        's.yaml:5: overrides.seed: seed is chosen by the command itself; give `seed` instead',
    ),
    'searched': (
        HEAD['search'].replace('optimizer.lr', 'optimizer.lrate') + A,
        "s.yaml:5: optimizer.lrate: SGD has no argument 'lrate'",
    ),
    'value': (
        HEAD['search'].replace('{low: 1.0e-3, high: 1.0, log: true}', '{choices: [0.1, big]}') + A,
        's.yaml:5: optimizer.lr: must be',
    ),
    'trials': (HEAD['search'].replace('trials: 4', 'trials: 0') + A, 's.yaml:4: trials: must be the number of trials'),
    'stages': (HEAD['continual'].replace('values: [64, 96, 128]', 'value: 3') + A, 's.yaml:4: stages: must be {key: '),
    'stage list': (
        HEAD['continual'].replace('key: train_data.subset', 'key: [train_data.subset]') + A,
        's.yaml:4: stages: must be {key: train_data.subset, values: [...]}',
    ),
    'stage': (HEAD['continual'].replace('subset', 'subst') + A, 's.yaml:4: train_data.subst: digits has no argument'),
    'start': (
        HEAD['continual'] + 'arms:\n  a: {start: hot}\n',
        "s.yaml:6: arms.a.start: must be fresh or warm, not 'hot'",
    ),
    'warm chain': (HEAD['chain'] + 'arms:\n  a: {start: warm}\n', 'arms.a.start: must be fresh in a chain'),
    'neither': (
        HEAD['chain'].replace('generations: 3\n', '') + A,
        's.yaml:1: a chain has either `steps`, or `generations`',
    ),
    'generations': (HEAD['chain'].replace(': 3', ': 0') + A, 's.yaml:4: generations: must be a number of generations'),
    'both': (
        HEAD['chain'].replace('generations: 3', 'steps: [{recipe: small.yaml}]') + A,
        's.yaml:3: recipe: is for `generations`',
    ),
    'step': (
        f'kind: chain\nmetric: {METRIC}\nsteps:\n  - {{recipe: small.yaml}}\n  - {{recipe: big.yaml}}\n' + A,
        's.yaml:5: steps.1.recipe: there is no file big.yaml',
    ),
    'teachers': (
        HEAD['chain'].replace('small', 'taught') + A,
        's.yaml:3: recipe: taught.yaml has teachers, but those of a',
    ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_one_line(in_process, mistake):
    text, message = MISTAKES[mistake]
    Path('taught.yaml').write_text(RECIPE + 'teachers: [{name: network, recipe: small.yaml}]\n')
    with pytest.raises(RecipeError) as caught:
        check_file(write(text))
    assert message in str(caught.value)
    assert '\n' not in str(caught.value)
    assert not Path('runs').exists()


@pytest.mark.parametrize('path', YAMLS, ids=lambda path: path.stem)
def test_every_sequence_that_we_ship_is_right(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_file(path)
    header = path.read_text().split('\n\n')[0].splitlines()
    assert all(line.startswith('#') for line in header)
    assert header[-1] == f'#   composer-kd sequence yamls/sequences/{path.name}'
    assert not [*tmp_path.iterdir()]
