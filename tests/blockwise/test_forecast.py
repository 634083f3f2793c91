"""What a plan promises."""

import pytest

from composer_kd.blockwise.forecast import draw, forecast, table, timings
from composer_kd.blockwise.plan import Costs, Device, Stage, best, planned
from composer_kd.blockwise.simulate import Timing


def costs(teacher, student, devices):
    shared = lambda seconds: [[each / number for number in range(1, devices + 1)] for each in seconds]  # noqa: E731
    rows = len(teacher)
    average = [[0.0] + [9.0] * (devices - 1)] * rows
    receive = [[0.01] * devices, *[[0.02] * devices] * (rows - 1)]
    return Costs(shared(teacher), shared(student), average, receive, [[0.0] * devices] * rows)


def test_a_pipeline_beside_the_baselines():
    of_blocks = costs([0.1, 0.2, 0.3], [1.0, 0.9, 0.8], 3)
    devices = [Device()] * 3
    plan = best(of_blocks, devices)
    found = forecast(of_blocks, devices, plan)
    assert timings(of_blocks, devices, plan) == [Timing(0.01, 0.1, 1.0), Timing(0.02, 0.2, 0.9), Timing(0.02, 0.3, 0.8)]
    assert found.steps['relay'] == pytest.approx(1.1)  # what is on its way is so while others work
    assert found.steps['relay with a barrier'] == pytest.approx(
        0.1 + 0.02 + 0.2 + 0.02 + 0.3 + 0.8
    )  # data is loaded meanwhile
    assert found.steps['data parallel'] == pytest.approx((0.1 + 0.3 + 0.6 + 2.7) / 3 + 3 * 9.01)
    assert found.steps['layer split'] == pytest.approx(0.6 + 0.8 + 0.01)
    assert found.waits == pytest.approx((0.0, 0.0, 0.0), abs=1e-9)


def test_slow_devices_and_what_is_shared():
    of_blocks, devices = costs([0.2, 0.2], [1.0, 1.0], 3), [Device(0.5), Device(), Device()]
    plan = planned(of_blocks, devices, [Stage(range(1), range(1)), Stage(range(1, 2), range(1, 3))])
    assert timings(of_blocks, devices, plan) == [Timing(0.01, 0.4, 2.0), Timing(0.02, 0.1, 0.5 + 9.0)]


def test_for_people(tmp_path):
    of_blocks, devices = costs([0.001, 0.001, 0.001], [0.01, 0.01, 0.02], 2), [Device()] * 2
    found = forecast(of_blocks, devices, best(of_blocks, devices))
    lines = table(found).splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [['0', '0-1', '0'], ['1', '2', '1']]
    assert lines[4].split() == ['relay', f'{1000 * found.steps["relay"]:.2f}', '1.00']
    assert lines[-1].startswith('layer split')
    draw(found, tmp_path / 'plan.png', 'a plan')
    assert (tmp_path / 'plan.png').read_bytes().startswith(b'\x89PNG')
    draw(found, tmp_path / 'plan.svg', 'a plan')
    assert b'<svg' in (tmp_path / 'plan.svg').read_bytes()
