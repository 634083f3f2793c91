import importlib.util
import json
import math
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from composer_kd import models
from composer_kd.recipes import run
from helpers import in_forks, launched, unpack_fashion_mnist

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def import_as_a_script_does(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))


def check(output: str, benchmark: str) -> dict:
    """The last line of a script's output."""
    row = json.loads(output.splitlines()[-1])
    assert row['benchmark'] == benchmark
    assert row['ratios'] and all(math.isfinite(ratio) and ratio > 0 for ratio in row['ratios'].values())
    assert row['hardware']['cpu'] and row['hardware']['threads'] >= 1
    assert row['versions']['torch'] == torch.__version__.split('+')[0]
    assert f'{benchmark}.py' in row['command'] and '--quick' in row['command']
    return row


def quick(benchmark: str, *arguments: str, ranks: int = 1) -> tuple[str, dict]:
    """A script's output, and its last line."""
    script = ROOT / 'benchmarks' / f'{benchmark}.py'
    environments = launched(ranks) if ranks > 1 else [{**os.environ, 'OMP_NUM_THREADS': '1'}]
    said, *_ = in_forks(run_script, ranks * [(script, '--quick', '--device', 'cpu', *arguments)], environments)
    return said, check(said, benchmark)


def run_script(script: Path, *arguments: str) -> None:
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name='__main__')


def test_step_time():
    _, row = quick('step_time')
    assert {'composer_kd / plain_loop', 'composer_kd / (composer_student + teacher_forward)'} <= set(row['ratios'])
    # The Trainer does what the plain loops do, to the last bit.
    assert row['gaps']['composer_student'] == row['gaps']['composer_kd'] == 0


def test_step_time_has_no_result_for_other_work(monkeypatch):
    import bench_parts
    import step_time

    student, teacher = (models.small_convnet(num_classes=10, in_channels=3, width=width) for width in (4, 8))
    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8))]
    bench_parts.settle(teacher.module, batches[0][0])
    setting = step_time.Setting(student, teacher, 8, torch.device('cpu'))
    start = step_time.Variant(step_time.student_step, setting).weights()

    def trained(build):
        variant = step_time.Variant(build, setting)
        variant.turn(batches, steps=1)
        return variant

    variants = {build.__name__: trained(build) for build in step_time.OURS}
    assert step_time.compare(variants, start) == {'composer_student': 0, 'composer_kd': 0}
    monkeypatch.setattr(step_time, 'KD_WEIGHT', 0.85)
    variants['composer_kd'] = trained(step_time.composer_kd)
    with pytest.raises(SystemExit, match='composer_kd does other work than plain_loop'):
        step_time.compare(variants, start)


def test_step_time_bert():
    _, row = quick('step_time_bert')
    assert {'composer_kd / dense_loop', 'composer_kd / (composer_student + teacher_forward)'} <= set(row['ratios'])
    # Chunks and the choice of positions change nothing but rounding.
    assert row['gaps'].keys() == {'dense_loop', 'composer_student', 'composer_kd'}
    assert max(row['gaps'].values()) < 1e-4


def test_pool():
    _, row = quick('pool', '--teacher', 'cifar_resnet20')
    assert set(row['ratios']) == {'sampled_4 / one_teacher', 'average_4 / one_teacher'}
    assert row['cpu_time_ratios']['average_4 / one_teacher'] > row['cpu_time_ratios']['sampled_4 / one_teacher']
    # They are copies of one network, so all learn the same; only a mean has rounding errors of its own.
    assert row['gaps']['sampled_4'] == 0 and row['gaps']['average_4'] < 1e-4
    on_device = row['weights_of_teachers_mib']
    assert on_device['sampled, host']['4'] == on_device['sampled, host']['2']
    for name in ('sampled, device', 'average, device'):
        assert on_device[name]['4'] == pytest.approx(2 * on_device[name]['2'], rel=0.01)


@pytest.mark.parametrize('masked', [0.15, 1.0])
def test_lm_loss(masked):
    output, row = quick('lm_loss', '--masked', str(masked), '--chunk-size', '16')
    assert 'ours / dense_then_select' in row['ratios'] and row['setting']['masked'] == masked
    for peer, variant in (('trl', 'trl'), ('liger_kernel', 'liger')):
        left_out = importlib.util.find_spec(peer) is None
        assert left_out == (f'{peer} is not installed: left out' in output) == (variant not in row['seconds'])
    if Path('/proc/self/clear_refs').exists():
        # All logits at once are 4 MiB a network; chunks of them are a small part of that, whatever is added to it.
        peaks = row['peak_memory_mib']
        assert 0.5 < peaks['ours'] < peaks['dense_then_select'] / 2 and peaks['dense'] > 12
    else:
        assert row['peak_memory_mib'] == row['memory_ratios'] == {}


def test_lm_loss_has_no_result_for_other_work(monkeypatch):
    import lm_loss

    torch.manual_seed(0)
    student, teacher = (lm_loss.Head.random(20, 8, 50, 'cpu') for _ in range(2))
    for x in vars(student).values():
        x.requires_grad_()
    labels = torch.where(torch.arange(20) % 3 == 0, torch.arange(20), -100)
    problem = lm_loss.Problem(student, teacher, labels, chunk_size=4)
    results = {loss.__name__: lm_loss.step(loss, problem) for loss in lm_loss.LOSSES}
    assert max(lm_loss.compare(results).values()) < 1e-5
    monkeypatch.setattr(lm_loss, 'TEMPERATURE', 2.1)
    results['ours'] = lm_loss.step(lm_loss.ours, problem)
    with pytest.raises(SystemExit, match='ours does other work than dense_then_select: loss or gradients differ by'):
        lm_loss.compare(results)


def test_record():
    output, row = quick('record')
    assert {'online / student_only', 'record_top / student_only', 'online / record_all'} <= set(row['ratios'])
    # All logits, in float32, teach what the network teaches, to the last bit; 10 of 1000 do not.
    assert row['gaps']['record_all'] == 0 < row['gaps']['record_top']
    assert 0 < row['bytes_per_sample']['record_top'] < 4000 < row['bytes_per_sample']['record_all'] < 4100
    assert row['recording']['ratios']['forward / recording'] > 0
    for peer in ('torchdistill', 'textbrewer'):
        left_out = importlib.util.find_spec(peer) is None
        assert left_out == (f'{peer} is not installed: left out' in output) == (peer not in row['seconds'])
    for temperature in (1, 4):
        unsaid = [some for some in row['unsaid'] if some['temperature'] == temperature]
        assert [some['k'] for some in unsaid] == [1, 2, 5, 10, 50, 100, 1000]
        for name in ('mass', 'of_loss'):
            assert [some[name] for some in unsaid] == sorted((some[name] for some in unsaid), reverse=True)
        assert all(some['of_gradient'] < some['of_gradient_without'] for some in unsaid[:4])
        assert all(unsaid[-1][name] == 0 for name in ('mass', 'of_loss', 'of_gradient', 'of_gradient_without'))


def test_record_has_no_result_for_other_work():
    import record

    def network(weight):
        linear = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(linear.weight, weight)
        return linear

    # As shares of a way from 0 to 1: what knows 10 logits alone may end elsewhere, and what has another teacher must.
    students = {'student_only': 0.2, 'online': 1.0, 'record_top': 0.7, 'record_all': 0.99}
    networks = {name: network(weight) for name, weight in students.items()}
    gaps = record.compare(networks, record.weights(network(0.0)))
    assert gaps == {'record_top': pytest.approx(0.3), 'record_all': pytest.approx(0.01)}
    with pytest.raises(SystemExit, match=r'textbrewer does other work than online: its weights differ by 0\.1 of the'):
        record.compare({**networks, 'textbrewer': network(1.1)}, record.weights(network(0.0)))


@pytest.mark.dist
def test_codistillation():
    output, row = quick('codistillation', ranks=2)
    assert set(row['ratios']) == {'predictions / alone', 'weights / taught', 'taught / alone'}
    # What is sent is what has to be: the logits of 8 images and their fingerprints; weights and statistics.
    network = models.cifar_resnet20(num_classes=1000)
    weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    assert row['bytes_sent'] == row['bytes_by_formula'] == {'predictions': 8 * (4 * 1000 + 8), 'weights': weights}
    assert f'predictions: {8 * 4008:,} bytes at a time' in output and row['command'].startswith('composer -n 2 ')


def test_twins(tmp_path, monkeypatch, capsys):
    script, yamls = ROOT / 'benchmarks' / 'twins.py', ROOT / 'yamls'
    monkeypatch.setenv('OMP_NUM_THREADS', '1')

    def twins(*arguments):
        command = [script, yamls / 'digits.yaml', yamls / 'digits_kd.yaml', 'model.width=2', '--quick', *arguments]
        monkeypatch.setattr(sys, 'argv', [*map(str, command), '--runs-dir', str(tmp_path)])
        runpy.run_path(str(script), run_name='__main__')

    # One of the two runs is there already; the other is started.
    overrides = ['model.width=2', 'seed=17', 'max_duration=2ba', f'runs_dir={tmp_path}', 'run_name=digits-seed17']
    baseline = run(yamls / 'digits.yaml', overrides)
    twins()
    output = capsys.readouterr().out
    row = check(output, 'twins')
    assert row['seeds'] == [17] and row['device'] and 0 < row['teacher_share'] < 1
    assert row['train_seconds']['digits'] == [baseline['train_seconds']]
    assert row['difference'] == pytest.approx(row['quality']['digits_kd'][0] - row['quality']['digits'][0], abs=1e-6)
    assert '| digits_kd | ' in output
    assert 'max_duration: 2ba' in (tmp_path / 'digits_kd-seed17' / 'recipe.yaml').read_text()

    with pytest.raises(SystemExit, match=r'is a run of another recipe, which differs in optimizer\.lr'):
        twins('optimizer.lr=0.2')
    with pytest.raises(SystemExit, match='has no metrics/eval/F1; --metric can be: metrics/eval/'):
        twins('--metric', 'metrics/eval/F1')


@pytest.mark.filterwarnings('ignore:The warmup duration is 0', 'ignore:.*lr_scheduler.step:UserWarning')
def test_twins_that_are_fine_tuned(tmp_path, monkeypatch, capsys):
    script, yamls = ROOT / 'benchmarks' / 'twins.py', ROOT / 'yamls'
    table = tmp_path / 'table.tsv'
    table.write_text('sentence\tlabel\n' + 'this is good\t1\nthis is bad\t0\n' * 32)
    monkeypatch.setenv('TRAIN_FILE', str(table))
    monkeypatch.setenv('VALIDATION_FILE', str(table))
    copy = tmp_path / 'copy.yaml'  # a twin that needs no teacher
    copy.write_text((yamls / 'bert_docs.yaml').read_text())
    small = ['model.config.hidden_size=16', 'model.config.intermediate_size=32', 'train_data.batch_size=4']
    overrides = ['max_duration=2ba', 'seed=17', f'runs_dir={tmp_path}']
    accuracy = {}
    for recipe in (yamls / 'bert_docs.yaml', copy):
        run(recipe, [*small, *overrides, f'run_name={recipe.stem}-seed17'])
        tuned = [
            f'model.pretrained={tmp_path}/{recipe.stem}-seed17',
            f'run_name={recipe.stem}-seed17-text_classification',
        ]
        summary = run(yamls / 'text_classification.yaml', [*tuned, *overrides])
        accuracy[recipe.stem] = [summary['metrics']['metrics/eval/MulticlassAccuracy']]
    command = [script, yamls / 'bert_docs.yaml', copy, *small, '--quick', '--then', yamls / 'text_classification.yaml']
    monkeypatch.setattr(sys, 'argv', [*map(str, command), '--runs-dir', str(tmp_path)])
    capsys.readouterr()
    runpy.run_path(str(script), run_name='__main__')
    row = check(capsys.readouterr().out, 'twins')
    assert row['quality'] == accuracy
    assert row['then'].endswith('text_classification.yaml')


def test_overhead(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('FASHION_MNIST_DIR', str(unpack_fashion_mnist(tmp_path / 'data')))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    # Two of the three runs are there already; the record and the run with it are started.
    small = ['train_data.subset=1024', 'eval_data.subset=1024']
    of_teacher = ['train_data.augment=true', 'run_name=fashion_mnist_augmented_teacher', *small, 'max_duration=1ep']
    taught = [f'teachers.0.overrides={json.dumps(of_teacher)}']
    for way, path, overrides in (('online', 'fashion_mnist_kd', taught), ('no_teacher', 'fashion_mnist', [])):
        names = ['seed=17', f'run_name=overhead-seed17-{way}', f'runs_dir={tmp_path}/runs']
        run(f'yamls/{path}.yaml', ['train_data.augment=true', *small, *overrides, 'max_duration=1ep', *names])
    script = ROOT / 'benchmarks' / 'overhead.py'
    (said,) = in_forks(run_script, [(script, '--quick', '--runs-dir', str(tmp_path / 'runs'))], [os.environ.copy()])
    row = json.loads(said.splitlines()[-1])
    assert row['benchmark'] == 'overhead' and '| recorded, 1 view |' in said
    # Every batch is heard online, and from the record no network is asked.
    assert row['teacher_forwards'] == {'no teacher': 0, 'online': 8, 'recorded, 1 view': 0}
    assert row['recording_seconds']['recorded, 1 view'] > 0


def test_study(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / 'tests' / 'studies'))
    from made_results import METRIC, row, study

    rows = [row('kd', 1, 0.5, 2.0), row('kd', 2, 0.1, 1.0, status='failed', error='no disk')]
    rows += [row('teacher', 3, 0.9, 4.0, role='teacher', git_commit='def')]
    for seed, of_teams in ((1, (0.3, 0.5)), (2, (0.6, 0.4))):
        of = {f'team{index}': {METRIC: quality} for index, quality in enumerate(of_teams)}
        rows.append(row('teams', seed, max(of_teams), 3.0, teams=of))
    monkeypatch.setattr(sys, 'argv', ['study.py', str(study(tmp_path, rows))])
    runpy.run_path(str(ROOT / 'benchmarks' / 'study.py'), run_name='__main__')
    *table, line = capsys.readouterr().out.splitlines()
    assert [each.split(' | ') for each in table[2:]] == [
        ['| kd', '1', '0.5000', '', '2.0 |'],
        ['| teams', '2', '0.4500', '0.0707', '3.0 |'],  # of the means over teams, not of the best of them
    ]
    said = json.loads(line)
    assert said['benchmark'] == 'study' and said['study'] == 'made'
    of_runs = {'git_commit': ['abc', 'def'], 'device': ['cpu'], 'world_size': [1], 'versions': [{'torch': '2.7'}]}
    assert said['of_runs'] == of_runs
    seconds = {'parameters': 1000, 'teacher_seconds': 0.0, 'teacher_forwards': 0}
    assert said['runs'] == {
        'kd-seed1': {'status': 'finished', 'train_seconds': 2.0, **seconds, 'quality': 0.5},
        'kd-seed2': {'status': 'failed', 'train_seconds': 1.0, **seconds},
        'teacher-seed3': {'status': 'finished', 'train_seconds': 4.0, **seconds, 'quality': 0.9},
        'teams-seed1': {'status': 'finished', 'train_seconds': 3.0, **seconds, 'teams': [0.3, 0.5], 'quality': 0.5},
        'teams-seed2': {'status': 'finished', 'train_seconds': 3.0, **seconds, 'teams': [0.6, 0.4], 'quality': 0.6},
    }
