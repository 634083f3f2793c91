"""`composer-kd plan`: where blocks go, and what that promises."""

import json
import re
from pathlib import Path

import pytest
from test_blockwise_run import BLOCKWISE

from composer_kd import cli
from composer_kd.blockwise.profile import Profile


@pytest.fixture(autouse=True)
def recipe(write, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    return write('', 'x.yaml', BLOCKWISE)


def test_a_plan_is_measured_printed_and_written_down(capsys):
    assert cli.main(['plan', 'x.yaml', '-n', '2', '--out', 'plan', 'train_data.batch_size=64']) == 0
    said = capsys.readouterr().out
    assert said.startswith('x, 2 x cpu, batches of 64\nstage  blocks') and 'data parallel' in said
    profile = Profile.load('plan/profile.json')
    assert profile.batch_size == 64 and profile.shares == [64, 32] and len(profile.teacher) == 3
    assert profile.send.takes(1 << 20) > 0 and profile.average.takes(1 << 20) > 0 and profile.data > 0
    plan = json.loads(Path('plan/plan.json').read_text())
    assert sum(last - first for first, last in plan['blocks']) == 3
    assert sum(last - first for first, last in plan['devices']) == 2
    assert sorted(block for dealt in plan['layer_split'] for block in dealt) == [0, 1, 2]
    assert plan['steps'].keys() == {'relay', 'relay with a barrier', 'data parallel', 'layer split'}
    assert max(plan['seconds']) * 1.01 > plan['steps']['relay'] > 0
    assert Path('plan/plan.png').read_bytes().startswith(b'\x89PNG')

    # Elsewhere, from the file.
    for given in (['--profile', 'plan/profile.json'], ['blockwise.profile=plan/profile.json']):
        assert cli.main(['plan', 'x.yaml', '-n', '2', *given]) == 0
        assert capsys.readouterr().out == said
    assert cli.main(['plan', 'x.yaml', '-n', '3', '--profile', 'plan/profile.json']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[2] != '0-2' for line in lines[2:4])  # 64 samples cannot be shared by three


BAD = {
    ('x.yaml', '-n', '0'): r'blockwise: there must be 1 device or more, not 0',
    ('x.yaml', '-n', '4', '--profile', 'none.json'): r'blockwise\.profile: none\.json: cannot be read as a profile',
    ('x.yaml', '-n', '2', 'blockwise=null', 'teachers=null'): r'there is no `blockwise` section',
    ('x.yaml', '-n', '2', 'blockwise.cut=[stage7]'): r"blockwise: cut: teacher: there is no module 'stage7'",
}


@pytest.mark.parametrize(('arguments', 'message'), BAD.items(), ids=map(' '.join, BAD))
def test_what_cannot_be_planned(arguments, message, capsys):
    assert cli.main(['plan', *arguments]) > 0
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count('\n') == 1
