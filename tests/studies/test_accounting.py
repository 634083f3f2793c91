import json

import pytest

from composer_kd.recipes import RecipeError
from composer_kd.studies.accounting import evaluations, seconds_spent

LINES = [json.dumps({'batch': n, 'seconds': n / 2, **({'m': n / 10} if n % 2 else {})}) for n in range(1, 6)]


@pytest.mark.parametrize('end', ['', '{"batch": 6, "m": 0', '{"batch": 6, "m": 0\n', '\0\0\0\n', '{}}\n'])
def test_a_last_line_that_is_torn_is_left_out(tmp_path, end):
    (tmp_path / 'metrics.jsonl').write_text('\n'.join([*LINES, end]))
    assert [row['m'] for row in evaluations(tmp_path, 'm')] == [0.1, 0.3]
    assert seconds_spent(tmp_path) == 2.5


@pytest.mark.parametrize('line', [LINES[2][:-4], LINES[2][:20] + LINES[3], '', '\0'])
def test_a_line_that_is_damaged_is_named(tmp_path, line):
    (tmp_path / 'metrics.jsonl').write_text('\n'.join([*LINES[:2], line, *LINES[3:], '']))
    with pytest.raises(RecipeError, match=r'metrics\.jsonl:3: this line is damaged; delete .*, and the same command'):
        evaluations(tmp_path, 'm')


def test_a_run_without_a_batch_has_spent_nothing(tmp_path):
    assert seconds_spent(tmp_path) is None and evaluations(tmp_path, 'm') == []
