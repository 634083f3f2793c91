import json

import pytest

from composer_kd.recording import RecordError
from composer_kd.recording.cost import Cost, read_summary

ABOUT = {'config': {}, 'views': 1, 'teacher_training_seconds': 0.0}


def test_all_attempts_count(tmp_path):
    first = Cost(tmp_path)
    assert (first.seconds, first.teacher_forwards) == (0.0, 0)
    first.add(1.0, 2)
    first.add(1.5, 3)  # and then it is killed
    second = Cost(tmp_path)
    assert (second.seconds, second.teacher_forwards) == (1.5, 3)
    second.add(2.0, 4)
    second.close(ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == ['summary.json']
    summary = read_summary(tmp_path / 'summary.json')
    assert summary == {'seconds': 3.5, 'teacher_forwards': 7, **ABOUT}
    third = Cost(tmp_path)  # adds views
    third.add(0.5, 1)
    assert json.loads((tmp_path / 'summary.json').read_text()) == summary
    third.close(ABOUT)
    assert read_summary(tmp_path / 'summary.json') == {'seconds': 4.0, 'teacher_forwards': 8, **ABOUT}


@pytest.mark.parametrize('text', ['', '[]', '{"seconds": 1.0}', '{"seconds": "1", "teacher_forwards": 1}'])
def test_damaged(tmp_path, text):
    (tmp_path / 'summary.json').write_text(text)
    with pytest.raises(RecordError, match=r'summary\.json is damaged; delete it, and composer-kd record wri'):
        Cost(tmp_path)
