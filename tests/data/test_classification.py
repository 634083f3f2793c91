from pathlib import Path

import pytest
import torch

from composer_kd import data
from composer_kd.data.classification import class_or_grade
from composer_kd.data.text_files import TextError
from helpers import make_vocabulary, shared_data


@pytest.fixture
def table(tmp_path):
    """Write a table; keywords that read it."""
    vocabulary = make_vocabulary(tmp_path / 'vocab.txt')

    def write(*rows, header='sentence\tlabel'):
        (tmp_path / 't.tsv').write_text('\n'.join([header, *rows]), encoding='utf-8')
        return {'file': tmp_path / 't.tsv', 'tokenizer': vocabulary}

    return write


def test_reviews_are_read_as_they_are(tmp_path):
    folder = shared_data('text')
    file = folder / 'reviews_validation.tsv'
    spec = data.text_classification(
        'validation', 64, file=file, tokenizer=str(folder / 'bert_uncased_vocab.txt'), max_length=50
    )
    dataset = spec.dataloader.dataset
    lines = file.read_text(encoding='utf-8').split('\n')[1:-1]
    assert spec.num_samples == len(lines) == 1000
    row = 0
    for batch in spec.dataloader:
        assert batch.keys() == {'input_ids', 'attention_mask', 'labels'}
        length = batch['attention_mask'].sum(dim=1).max().item()
        assert batch['input_ids'].shape[1] == min(-(-length // 8) * 8, 50)
        for ids, mask, label in zip(batch['input_ids'], batch['attention_mask'], batch['labels'], strict=True):
            text, wanted = lines[row].split('\t')
            expected = dataset.tokenizer(text, truncation=True, max_length=50)['input_ids']
            assert ids[: mask.sum()].tolist() == expected
            assert (ids[mask.sum() :] == dataset.tokenizer.pad_token_id).all()
            assert label.item() == int(wanted)
            row += 1
    assert row == 1000


def test_pairs(table):
    spec = data.text_classification(
        'validation',
        4,
        **table('ab\tc\t0', 'd\tefg\t1', header='first\tsecond\tgold'),
        text='first',
        text_pair='second',
        label='gold',
    )
    dataset = spec.dataloader.dataset
    (batch,) = spec.dataloader
    assert batch['input_ids'].shape == (2, 8)
    assert dataset.tokenizer.decode(batch['input_ids'][0]) == '[CLS] ab [SEP] c [SEP] [PAD] [PAD]'
    assert batch['token_type_ids'].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0]]
    assert batch['attention_mask'].sum(dim=1).tolist() == [6, 7]
    assert batch['labels'].tolist() == [0, 1] and batch['labels'].dtype == torch.int64
    assert {name: value.tolist() for name, value in dataset[1].items()}['labels'] == 1
    assert (dataset.max_length, dataset.num_labels) == (128, 2)


@pytest.mark.parametrize('max_length', [5, 8, 11, 12])
def test_lengths_never_exceed_the_longest_allowed(table, max_length):
    spec = data.text_classification('validation', 2, **table('abcdefghijkl\t1', 'a\t0'), max_length=max_length)
    (batch,) = spec.dataloader
    assert batch['input_ids'].shape == (2, max_length)
    assert batch['attention_mask'].sum(dim=1).tolist() == [max_length, 3]
    assert batch['input_ids'][0, -1] == spec.dataloader.dataset.tokenizer.sep_token_id


def test_grades(table):
    spec = data.text_classification('validation', 4, **table('a\t2.5', 'b\t-1'), num_labels=1)
    (batch,) = spec.dataloader
    assert batch['labels'].tolist() == [2.5, -1.0] and batch['labels'].dtype == torch.float32
    assert spec.dataloader.dataset.num_labels == 1


def test_nothing_is_drawn_from_global_random_state(table):
    before = torch.get_rng_state()
    spec = data.text_classification('train', 2, **table('a\t1', 'b\t0'), shuffle_seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert len([*spec.dataloader]) == 1


MISTAKES = {
    'label': (('a\t1', 'b\t2'), {}, TextError, r"t.tsv:3: label is '2', which is not a class from 0 to 1$"),
    'half': (('a\t0.5',), {}, TextError, r"t.tsv:2: label is '0.5', which is not a class from 0 to 1$"),
    'word': (('a\tgood',), {}, TextError, r"t.tsv:2: label is 'good', which is not a class from 0 to 1$"),
    'grade': (('a\tnan',), {'num_labels': 1}, TextError, r"t.tsv:2: label is 'nan', which is no number$"),
    'column': (('a\t1',), {'text': 'txt'}, ValueError, r"t.tsv:2: there is no column 'txt', but: sentence, label$"),
    'pair': (('a\t1',), {'text_pair': 'b'}, ValueError, r"t.tsv:2: there is no column 'b', but: sentence, label$"),
    'empty': ((), {}, TextError, r't.tsv: there is not one row in it$'),
    'room': (
        ('a\t1',),
        {'max_length': 2},
        ValueError,
        r'max_length=2 leaves no room for text beside 2 special tokens$',
    ),
    'file': (('a\t1',), {'file': 'no.tsv'}, FileNotFoundError, r'no such file: no.tsv$'),
    'batch': (('a\t1',), {}, ValueError, r'1 samples, which is not one batch of batch_size=4'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_one_line(table, mistake):
    rows, more, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=message):
        data.text_classification('train', 4, **table(*rows) | more)


def test_text_that_is_none(table, tmp_path):
    (tmp_path / 't.jsonl').write_text('{"sentence": null, "label": 1}\n')
    with pytest.raises(TextError, match=r't.jsonl:1: sentence is no text but None$'):
        data.text_classification('train', 1, **table() | {'file': tmp_path / 't.jsonl'})


@pytest.mark.parametrize(
    ('since', 'before', 'left'),
    [
        *[(None, None, [0, 1, 1, 0]), ('2024-02-01', None, [1, 0]), (None, '2024-02-01', [0, 1])],
        *[('2024-01-31', '2024-02-01', [1]), ('2024-02-01T23:00', '2024-03-01 00:00', [1])],
    ],
)
def test_rows_of_a_time(table, since, before, left):
    rows = ('a\t0\t2024-01-30', 'b\t1\t2024-01-31T23:59:59Z', 'c\t1\t2024-02-01 00:00', 'd\t0\t2024-03-01')
    given = table(*rows, header='sentence\tlabel\tday')
    spec = data.text_classification('validation', 4, **given, date_column='day', since=since, before=before)
    (batch,) = spec.dataloader
    assert batch['labels'].tolist() == left


DATES = {
    'none': ('a\t1\tlast week', {}, TextError, r"t.tsv:2: day is 'last week', which is no date such as 2024-01-31; "),
    'column': (
        'a\t1\tx',
        {'date_column': 'd'},
        ValueError,
        r"t.tsv:2: there is no column 'd', but: sentence, label, day$",
    ),
    'no column': ('a\t1\tx', {'date_column': None, 'since': '2024-01-01'}, ValueError, r'set date_column$'),
    'option': ('a\t1\tx', {'before': 'May'}, ValueError, r"^before must be a date such as 2024-01-31, not 'May'$"),
    'left': (
        'a\t1\t2024-01-31',
        {'since': '2024-02-01'},
        TextError,
        r't.tsv, since 2024-02-01: there is not one row in it$',
    ),
}


@pytest.mark.parametrize('mistake', DATES)
def test_mistakes_with_dates_are_one_line(table, mistake):
    row, more, kind, message = DATES[mistake]
    given = table(row, header='sentence\tlabel\tday')
    with pytest.raises(kind, match=message):
        data.text_classification('train', 1, **given, **{'date_column': 'day', **more})


@pytest.mark.parametrize(
    ('value', 'labels', 'words', 'found'),
    [
        *[('1', 2, (), 1), (1.0, 2, (), 1), ('yes', 2, ('no', 'yes'), 1), (0, 2, ('no', 'yes'), 0)],
        *[('3.25', 1, (), 3.25), (4, 1, (), 4.0)],
    ],
)
def test_labels(value, labels, words, found):
    assert class_or_grade(value, labels, words) == found


@pytest.mark.parametrize('value', [-1, 2, '', None, 'maybe', [], float('inf'), '1e400'])
def test_what_is_no_label(value):
    with pytest.raises(ValueError, match=r'^not a class from 0 to 1, nor one of no, yes$'):
        class_or_grade(value, 2, ('no', 'yes'))


def test_two_ranks_share_the_examples(table, tmp_path):
    from helpers import on_two_ranks

    table(*(f'{letter}\t0' for letter in 'abcdefg'))
    code = """
from composer_kd import data
spec = data.text_classification('validation', 4, file='t.tsv', tokenizer='vocab.txt')
print('IDS', *[ids[1].item() for batch in spec.dataloader for ids in batch['input_ids']])
"""
    said = [
        line.split()[1:] for out in on_two_ranks(code, Path(tmp_path)) for line in out.splitlines() if 'IDS' in line
    ]
    assert [len(ids) for ids in said] == [4, 4]
    assert len({*said[0], *said[1]}) == 7
