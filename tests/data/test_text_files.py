import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from composer_kd.data.text_files import HubShard, TextError, hub_shards, text_files

TEXTS = ['One.', 'Two, a “quoted” one.', 'Drei: äöü.', '四', 'five\u2028is one line', 'Six.', 'seven', 'eight', 'nine']


def json_lines(texts, key='text'):
    return ''.join(json.dumps({key: text, 'url': 'x'}, ensure_ascii=False) + '\n' for text in texts).encode()


def plain_lines(texts):
    return ''.join(f'{text}\n' for text in texts).encode()


def write(path, texts, **options):
    if path.name.endswith('.parquet'):
        pq.write_table(pa.table({options.get('key', 'text'): texts, 'n': range(len(texts))}), path, row_group_size=4)
        return path
    content = plain_lines(texts) if '.txt' in path.name else json_lines(texts, **options)
    path.write_bytes(gzip.compress(content) if path.suffix == '.gz' else content)
    return path


ENDINGS = ['jsonl', 'json', 'txt', 'jsonl.gz', 'json.gz', 'txt.gz', 'parquet']


@pytest.mark.parametrize('ending', ENDINGS)
def test_reads_every_kind(tmp_path, ending):
    (shard,) = text_files(write(tmp_path / f'a.{ending}', TEXTS))
    documents = list(enumerate(TEXTS))
    assert list(shard.documents()) == documents
    for start in range(len(TEXTS) + 2):
        assert list(shard.documents(start)) == documents[start:]
        for part in range(3):
            assert list(shard.documents(start, part, 3)) == [pair for pair in documents[start:] if pair[0] % 3 == part]


@pytest.mark.parametrize('ending', ['jsonl', 'parquet'])
def test_key(tmp_path, ending):
    path = write(tmp_path / f'a.{ending}', TEXTS, key='content')
    assert [text for _, text in text_files(path, 'content')[0].documents()] == TEXTS
    with pytest.raises(TextError, match='text_key'):
        list(text_files(path)[0].documents())


@pytest.mark.parametrize('ending', ['jsonl', 'txt', 'parquet'])
def test_blank_documents_are_left_out_and_keep_their_number(tmp_path, ending):
    path = write(tmp_path / f'a.{ending}', ['a', '', ' \t', 'b'])
    assert list(text_files(path)[0].documents()) == [(0, 'a'), (3, 'b')]


def test_reads_lines_as_editors_leave_them(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    (tmp_path / 'b.txt').write_bytes(b'\xef\xbb\xbfa\r\n\r\n  b')
    for shard in text_files(tmp_path):
        assert list(shard.documents()) == [(0, 'a'), (2, 'b')]


BAD = {
    'no JSON': (b'{"text": ', r'not JSON \(.*\)'),
    'a list': (b'["text"]', r"no JSON object with the key 'text' \(see text_key\)"),
    'another key': (b'{"texts": "a"}', r"no JSON object with the key 'text' \(see text_key\)"),
    'a number': (b'{"text": 3}', "'text' is no text but int"),
    'null': (b'{"text": null}', "'text' is no text but NoneType"),
    'Latin-1': ('{"text": "ä"}'.encode('latin-1'), 'not UTF-8'),
    'surrogate': (b'{"text": "\\ud800"}', "'text' holds half a surrogate pair"),
    'nested': (b'[' * 100_000, r'.*recursion.*'),
    'long number': (b'{"text": "a", "n": ' + b'9' * 5000 + b'}', r'not JSON \(.*\)'),
}


@pytest.mark.parametrize('name', BAD)
@pytest.mark.parametrize('ending', ['jsonl', 'jsonl.gz'])
def test_a_bad_line(tmp_path, name, ending):
    line, reason = BAD[name]
    path = tmp_path / f'a.{ending}'
    content = b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n' + line + b'\n'
    path.write_bytes(gzip.compress(content) if ending.endswith('gz') else content)
    with pytest.raises(TextError) as caught:
        list(text_files(path)[0].documents())
    said = str(caught.value)
    assert re.fullmatch(
        rf'{re.escape(str(path))}, line 3: {reason}; repair it, or set on_error=skip to leave such lines out', said
    )

    (shard,) = text_files(path, on_error='skip')
    with pytest.warns(UserWarning, match=r'left out 2 lines that hold no text, first line 3: ') as warned:
        assert list(shard.documents()) == [(0, 'a'), (3, 'b')]
    assert len(warned) == 1
    assert str(path) in str(warned[0].message)
    with pytest.warns(UserWarning, match='left out 1 lines'):
        assert list(shard.documents(3)) == [(3, 'b')]
    assert list(shard.documents(0, 1, 2)) == [(3, 'b')]  # both bad lines are in the other part


def test_a_bad_row(tmp_path):
    write(tmp_path / 'a.parquet', ['a', None, 'b'])
    with pytest.raises(TextError, match=r"a\.parquet, row 2: 'text' is no text but NoneType; repair it, or set"):
        list(text_files(tmp_path)[0].documents())
    with pytest.warns(UserWarning, match='left out 1 rows that hold no text, first row 2'):
        assert list(text_files(tmp_path, on_error='skip')[0].documents()) == [(0, 'a'), (2, 'b')]


@pytest.mark.parametrize('ending', ['jsonl.gz', 'txt.gz', 'parquet'])
@pytest.mark.parametrize('damage', ['cut short', 'overwritten', 'another format'])
def test_a_damaged_file(tmp_path, ending, damage):
    path = write(tmp_path / f'a.{ending}', [f'{text} {number}' for text in TEXTS for number in range(100)])
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(
        {
            'cut short': content[:half],
            'overwritten': content[: half - 100] + b'\xff' * 200 + content[half + 100 :],
            'another format': b'<html>Not found</html>',
        }[damage]
    )
    with pytest.raises(TextError) as caught:
        list(text_files(path, on_error='skip')[0].documents())
    assert re.match(rf'{re.escape(str(path))} is damaged or cut short, fetch it again: \S', str(caught.value))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('ending', ENDINGS)
def test_an_empty_file(tmp_path, ending):
    path = write(tmp_path / f'a.{ending}', [])
    with pytest.raises(TextError, match='has no text in it: remove it') as caught:
        list(text_files(path)[0].documents())
    assert str(path) in str(caught.value)
    if ending != 'parquet':
        path.write_bytes(b'')
        with pytest.raises(TextError, match='has no text in it: remove it'):
            list(text_files(path)[0].documents(0, 1, 2))


def test_finds_files(tmp_path):
    for name in ('b.jsonl', 'sub/a.txt.gz', 'a.json', '.cache/c.jsonl', 'README.md', 'sub/.d.txt', 'c.csv'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, ['a'])
    shards = text_files(tmp_path)
    assert [shard.name for shard in shards] == ['a.json', 'b.jsonl', 'sub/a.txt.gz']
    assert shards[0].identity == f'a.json, {(tmp_path / "a.json").stat().st_size} bytes'
    with pytest.raises(FileNotFoundError, match=r'no file or folder \S+nowhere'):
        text_files(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match=r'no text in the folder \S+\.cache2: no file there ends in \.jsonl, '):
        (tmp_path / '.cache2').mkdir()
        text_files(tmp_path / '.cache2')
    with pytest.raises(ValueError, match=r'c.csv: text comes in files that end in \.jsonl, '):
        text_files(tmp_path / 'c.csv')
    with pytest.raises(ValueError, match="unknown on_error 'ignore': choose fail or skip"):
        text_files(tmp_path, on_error='ignore')


def test_finds_the_files_of_a_split(tmp_path):
    write(tmp_path / 'constraints.jsonl', ['a'])  # which has `train` in it
    assert len(text_files(tmp_path, split='train')) == 1
    with pytest.raises(FileNotFoundError, match="has 'validation' in its name: put one there, or take another eval"):
        text_files(tmp_path, split='validation')
    write(tmp_path / 'validation.jsonl', ['a'])
    with pytest.raises(FileNotFoundError, match=r"has 'train' in its name: put one there$"):
        text_files(tmp_path, split='train')
    (tmp_path / 'validation.jsonl').unlink()
    for name in ('c4-train.00000-of-00002.json.gz', 'c4-train.00001-of-00002.json.gz'):
        write(tmp_path / name, ['a'])
    assert [shard.name[:8] for shard in text_files(tmp_path, split='train')] == ['c4-train'] * 2
    with pytest.raises(FileNotFoundError, match="has 'validation' in its name"):
        text_files(tmp_path, split='validation')
    write(tmp_path / 'c4-validation.00000-of-00001.json.gz', ['a'])
    assert [shard.name[:6] for shard in text_files(tmp_path, split='validation')] == ['c4-val']


def test_the_hub_is_read_by_shard(tmp_path):
    """A data set of local files, read as one from the hub is."""
    import datasets

    for number in range(3):
        write(tmp_path / f'{number}.jsonl', [f'{number} {text}' for text in TEXTS] + [' '])
    rows = datasets.load_dataset('json', data_files=str(tmp_path / '*.jsonl'), split='train', streaming=True)
    assert rows.num_shards == 3
    shard = HubShard('x 1/3', rows.shard(num_shards=3, index=1))
    assert [text for _, text in shard.documents()] == [f'1 {text}' for text in TEXTS]
    assert [number for number, _ in shard.documents(4)] == [4, 5, 6, 7, 8]
    assert [number for number, _ in shard.documents(4, 1, 2)] == [5, 7]
    with pytest.raises(TextError, match="x 1/3 cannot be read: no text under 'content' in row 1, set text_key"):
        list(HubShard('x 1/3', rows, 'content').documents())
    (tmp_path / '1.jsonl').write_text('no JSON')
    with pytest.raises(TextError, match='x 1/3 cannot be read: '):
        list(shard.documents())


def test_no_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', True)
    with pytest.raises(FileNotFoundError) as caught:
        hub_shards('allenai/c4', 'en', 'train')
    assert re.fullmatch(
        r'cannot read allenai/c4 from the Hugging Face hub \(\w+\): set data_dir to a folder with its files, or .*',
        str(caught.value),
    )
