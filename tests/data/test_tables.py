import json

import pyarrow
import pyarrow.parquet
import pytest

from composer_kd.data.tables import header_of, read_table
from composer_kd.data.text_files import TextError


def test_the_same_rows_in_every_format(tmp_path):
    rows = [{'sentence': 'He said "no', 'label': '1'}, {'sentence': "a\u2028b\x0b c\x85d ' ", 'label': '0'}]
    (tmp_path / 't.tsv').write_text(
        'sentence\tlabel\n' + ''.join(f'{row["sentence"]}\t{row["label"]}\n' for row in rows), encoding='utf-8'
    )
    (tmp_path / 't.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 't.parquet')
    for name, first in (('t.tsv', 2), ('t.jsonl', 1), ('t.parquet', 1)):
        found = [*read_table(tmp_path / name)]
        assert [row for _, row in found] == rows
        assert [place for place, _ in found] == [f'{tmp_path / name}:{first}', f'{tmp_path / name}:{first + 1}']


def test_a_byte_order_mark_carriage_returns_and_blank_lines(tmp_path):
    (tmp_path / 't.tsv').write_bytes(b'\xef\xbb\xbfsentence\tlabel\r\n\r\na\t1\r\n')
    assert [*read_table(tmp_path / 't.tsv')] == [(f'{tmp_path / "t.tsv"}:3', {'sentence': 'a', 'label': '1'})]
    assert header_of(tmp_path / 't.tsv') == ['sentence', 'label']


def test_without_a_header(tmp_path):
    (tmp_path / 't.tsv').write_text('x\t1\n')
    assert [*read_table(tmp_path / 't.tsv', ('a', 'b'))] == [(f'{tmp_path / "t.tsv"}:1', {'a': 'x', 'b': '1'})]


def test_ragged_lines(tmp_path):
    path = tmp_path / 't.tsv'
    path.write_text('a\tb\n1\t2\n3\n4\t5\n')
    with pytest.raises(TextError, match=r't.tsv:3: 1 fields between tabs, not 2; repair this line$'):
        [*read_table(path, drop_surplus=True)]
    assert [row['a'] for _, row in read_table(path, drop_short=True)] == ['1', '4']
    path.write_text('a\tb\n1\t2\t3\n')
    with pytest.raises(TextError, match=r't.tsv:2: 3 fields between tabs, not 2'):
        [*read_table(path, drop_short=True)]
    assert [row for _, row in read_table(path, drop_surplus=True)] == [{'a': '1', 'b': '2'}]


DAMAGED = {
    'json': ('t.jsonl', b'{"a": 1}\n{"a": \n', r't.jsonl:2: not JSON; '),
    'list': ('t.jsonl', b'[1]\n', r't.jsonl:1: no JSON object; '),
    'deep': ('t.jsonl', b'[' * 100_000, r't.jsonl:1: not JSON; '),
    'bytes': ('t.tsv', b'a\n1\n\xff\n', r't.tsv:\d+: not UTF-8'),
    'parquet': ('t.parquet', b'PAR1', r't.parquet is damaged or cut short'),
}


@pytest.mark.parametrize('case', DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path, case):
    name, content, message = DAMAGED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message) as error:
        [*read_table(tmp_path / name)]
    assert '\n' not in str(error.value)


def test_what_is_no_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no such file: .*t.tsv$'):
        [*read_table(tmp_path / 't.tsv')]
    (tmp_path / 't.csv').touch()
    with pytest.raises(ValueError, match=r't.csv: a table of texts ends in .tsv, .jsonl, .parquet$'):
        [*read_table(tmp_path / 't.csv')]
