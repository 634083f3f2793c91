import json
import math
from pathlib import Path

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_kd.recipes import RecipeError
from composer_kd.studies.rows import read_rows, write_rows

ROW = {
    'study': 's',
    'cell': 'kd-2ep-seed17',
    'method': 'kd',
    'role': 'student',
    'baseline': False,
    'settings': {'max_duration': '2ep', 'optimizer.lr': 0.1},
    'seed': 17,
    'status': 'finished',
    'command': ['kd.yaml', 'optimizer.lr=0.1'],
    'config': {'model': {'name': 'resnet', 'width': 4}},
    'metrics': {'metrics/eval/Accuracy': 0.5},
    'train_seconds': 2.5,
    'teacher_seconds': 0,
    'teacher_training_seconds': 0.0,
    'recording_seconds': 0,
    'error': None,
    'arm': None,
    'step': None,
    'of': None,
    'versions': {'torch': '2.7'},
}


def test_no_results_yet(tmp_path):
    assert read_rows(tmp_path) == []
    write_rows(tmp_path, [])
    assert read_rows(tmp_path) == []


def test_the_table_has_a_column_for_each_value(tmp_path):
    write_rows(tmp_path, [ROW, ROW | {'status': 'failed', 'metrics': {}, 'error': 'two\nlines, "quoted"'}])
    table = pandas.read_csv(tmp_path / 'results.csv')
    assert table['settings.optimizer.lr'].tolist() == [0.1, 0.1]
    assert table['config.model.width'].tolist() == [4, 4]
    assert table['metrics.metrics/eval/Accuracy'][0] == 0.5 and math.isnan(table['metrics.metrics/eval/Accuracy'][1])
    assert table['command'].tolist() == ['kd.yaml optimizer.lr=0.1'] * 2
    assert table['error'][1] == 'two\nlines, "quoted"'


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(config=st.dictionaries(st.text(), VALUES, max_size=3), error=st.none() | st.text())
def test_what_is_written_is_read(config, error, tmp_path_factory):
    folder = tmp_path_factory.mktemp('rows')
    rows = [ROW | {'config': config}, ROW | {'error': error}]
    write_rows(folder, rows)
    assert read_rows(folder) == rows


BROKEN = {
    'half a line': lambda lines: [lines[0], lines[1][:20]],
    'no row': lambda lines: [lines[0], '3'],
    'a value is missing': lambda lines: [lines[0], json.dumps({k: v for k, v in ROW.items() if k != 'seed'})],
    'of another kind': lambda lines: [lines[0], json.dumps(ROW | {'train_seconds': '1'})],
    'a command of other kinds': lambda lines: [lines[0], json.dumps(ROW | {'command': [1]})],
    'versions of another kind': lambda lines: [lines[0], json.dumps(ROW | {'versions': 'x'})],
    'empty line': lambda lines: [lines[0], ''],
}


@pytest.mark.parametrize('case', BROKEN)
def test_damaged_results(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(Path(), [ROW, ROW])
    lines = Path('results.jsonl').read_text().splitlines()
    Path('results.jsonl').write_text('\n'.join(BROKEN[case](lines)) + '\n')
    message = r'^results.jsonl:2: this is no whole row of results; delete results.jsonl, and the command that made it w'
    with pytest.raises(RecipeError, match=message):
        read_rows(Path())


def test_results_that_are_no_text(tmp_path):
    Path(tmp_path, 'results.jsonl').write_bytes(b'\xff\xfe')
    with pytest.raises(RecipeError, match=r'results\.jsonl: cannot read the results'):
        read_rows(tmp_path)
