"""What a record is of."""

import pytest
from record_parts import FIELDS, create, edit_manifest

from composer_kd.files import unfinished
from composer_kd.recording import Record, RecordError, RecordLock, differences


def changed(**fields):
    """The fields, with some of the values within them changed: `data__samples=3`."""
    result = {name: dict(value) if isinstance(value, dict) else value for name, value in FIELDS.items()}
    for name, value in fields.items():
        part, *within = name.split('__')
        if within:
            result[part][within[0]] = value
        else:
            result[part] = value
    return result


CASES = [
    ({'data__samples': 9}, ['samples: 10 there, 9 here']),
    ({'data__samples': 9, 'data__content': 'd' * 64}, ['samples: 10 there, 9 here']),
    ({'data__transform': 'Crop(32)'}, ['transform: Flip() there, Crop(32) here']),
    ({'data__view_seed': 3, 'data__content': 'd' * 64}, ['view_seed: 17 there, 3 here']),
    ({'data__mask_seed': 3}, ['mask_seed: none there, 3 here']),
    (
        {'data__content': 'c' * 63 + 'd'},
        [f'content of the data set: ...{"c" * 21} there, ...{"c" * 20}d here'],
    ),
    ({'teacher__sha256': '6' * 64}, [f'teacher sha256: {"5" * 40}... there, {"6" * 40}... here']),
    ({'teacher__name': 'Other', 'teacher__source': 'b.pt'}, []),
    ({'k': 3, 'dtype': 'float16'}, ['k: none there, 3 here', 'dtype: float32 there, float16 here']),
    ({'classes': 6}, ['classes: 5 there, 6 here']),
    ({'temperatures': (2, 4)}, ['temperatures: [] there, [2, 4] here']),
    ({'precision': 'amp_bf16'}, ['precision: fp32 there, amp_bf16 here']),
    ({'versions': {'torch': '0.1'}, 'shard_samples': 3}, []),
    ({'teacher': None}, None),
]


@pytest.mark.parametrize('fields, phrases', CASES)
def test_differences(tmp_path, fields, phrases):
    record = create(tmp_path / 'record')
    found = differences(record.manifest, changed(**fields))
    if phrases is None:
        assert len(found) == 1 and found[0].startswith('teacher: {"name": "Net"') and found[0].endswith('none here')
        return
    assert found == phrases
    if not phrases:
        assert Record.create(record.path, changed(**fields)).manifest == record.manifest
        return
    before = (record.path / 'manifest.json').read_bytes()
    with pytest.raises(RecordError) as error:
        Record.create(record.path, changed(**fields))
    todo = 'choose another path, or delete it'
    assert str(error.value) == f'{record.path} is another record: {"; ".join(phrases)}; {todo}'
    assert (record.path / 'manifest.json').read_bytes() == before


def test_some_parts_are_compared(tmp_path):
    manifest = create(tmp_path / 'record').manifest
    other = {'data': changed(data__samples=9)['data']}
    assert differences(manifest, other, ['data']) == ['samples: 10 there, 9 here']
    assert differences(manifest, {'data': FIELDS['data']}, ['data']) == []


def test_long_texts_are_shown_where_they_differ(tmp_path):
    transform = 'Compose(\n    Resize(size=256)\n    CenterCrop(size=224)\n    RandomHorizontalFlip(p=0.5)\n)'
    manifest = create(tmp_path / 'record', data={'samples': 3, 'transform': transform}).manifest
    data = {'samples': 3, 'transform': transform.replace('p=0.5', 'p=0.25')}
    (phrase,) = differences(manifest, {'data': data}, ['data'])
    assert phrase == 'transform: ...mHorizontalFlip(p=0.5) ) there, ...mHorizontalFlip(p=0.25) ) here'


def test_no_record(tmp_path):
    for path in (tmp_path, tmp_path / 'none'):
        with pytest.raises(RecordError) as error:
            Record.open(path)
        assert str(error.value) == f'{path}: there is no record; composer-kd record makes one'


@pytest.mark.parametrize('content', [b'', b'{', b'[]', b'{}', b'\xff', b'{"format": 1}', b'[' * 100_000])
def test_a_manifest_that_is_damaged(tmp_path, content):
    record = create(tmp_path / 'record')
    (record.path / 'manifest.json').write_bytes(content)
    for opened in (lambda: Record.open(record.path), lambda: create(record.path)):
        with pytest.raises(RecordError) as error:
            opened()
        todo = f'put one back that is whole, or delete {record.path} and record again'
        assert str(error.value) == f'{record.path}/manifest.json is damaged; {todo}'
    assert (record.path / 'manifest.json').read_bytes() == content


@pytest.mark.parametrize('changes', [{'k': 3}, {'teacher': {}}, {'classes': 4}, {'temperatures': [2.0]}, {'format': 2}])
def test_a_manifest_that_was_edited(tmp_path, changes):
    record = create(tmp_path / 'record')
    edit_manifest(record.path, **changes)
    with pytest.raises(RecordError, match=r'manifest.json is damaged; put one back that is whole'):
        Record.open(record.path)


def test_versions_are_for_people(tmp_path):
    record = create(tmp_path / 'record')
    edit_manifest(record.path, versions={'torch': '0.1'})
    assert Record.open(record.path).manifest['versions'] == {'torch': '0.1'}


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'k': 6, 'temperatures': [1.0]}, 'a record holds from 1 to all 5 logits of a position, not 6'),
        ({'classes': True}, 'classes is missing, or of a wrong type'),
        ({'data': {'samples': 0}}, 'samples and shard_samples must be positive'),
        ({'shard_samples': 0}, 'samples and shard_samples must be positive'),
        ({'k': 2, 'temperatures': ['1']}, 'temperatures must be numbers'),
        ({'precision': 3}, 'precision is missing, or of a wrong type'),
    ],
)
def test_a_record_that_cannot_be(tmp_path, fields, message):
    with pytest.raises(RecordError) as error:
        create(tmp_path / 'record', **fields)
    assert str(error.value) == f'no record can be made: {message}'
    assert not (tmp_path / 'record').exists()


def test_a_later_format(tmp_path, monkeypatch):
    monkeypatch.setattr('composer_kd.recording.manifest.FORMAT', 2)
    record = create(tmp_path / 'record')
    monkeypatch.undo()
    with pytest.raises(RecordError) as error:
        Record.open(record.path)
    todo = 'use a newer composer-kd'
    assert str(error.value) == f'{record.path}/manifest.json is of format 2, known is 1: {todo}'


def test_a_full_disk(tmp_path):
    with RecordLock(tmp_path / 'record'):
        unfinished(tmp_path / 'record' / 'manifest.json').symlink_to('/dev/full')
        with pytest.raises(RecordError, match=r'^cannot write the record .*record: No space left on device;'):
            create(tmp_path / 'record')
        assert [file.name for file in (tmp_path / 'record').iterdir()] == ['.lock']
    assert not (tmp_path / 'record').exists()
