import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_kd.data.sequences import Sequences
from composer_kd.tokenization import load_tokenizer
from text_runs import write_vocabulary

CLS, SEP = 2, 3


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(write_vocabulary(tmp_path_factory.mktemp('vocabulary'))))


def words(*numbers):
    return ' '.join(f'w{number}' for number in numbers)


def ids(tokenizer, *numbers):
    return tokenizer.convert_tokens_to_ids([f'w{number}' for number in numbers])


def test_a_document_is_a_sequence(tokenizer):
    documents = [(0, words(1, 2, 3)), (4, words(*range(10))), (5, '\u200b'), (7, words(9))]
    found = list(Sequences(tokenizer, 6, pack=False)(documents))
    assert [(document, offset) for document, offset, _ in found] == [(0, 0), (4, 0), (7, 0)]
    assert found[0].ids.tolist() == [CLS, *ids(tokenizer, 1, 2, 3), SEP]
    assert found[1].ids.tolist() == [CLS, *ids(tokenizer, 0, 1, 2, 3), SEP]
    assert found[2].ids.tolist() == tokenizer(words(9))['input_ids']


def test_packs_documents(tokenizer):
    w = lambda *numbers: ids(tokenizer, *numbers)  # noqa: E731
    documents = [(0, words(1, 2)), (2, words(*range(10, 17))), (3, ''), (5, words(3)), (6, words(4, 5))]
    found = list(Sequences(tokenizer, 7, pack=True)(documents))
    assert [(document, offset, [int(id) for id in row]) for document, offset, row in found] == [
        (0, 0, [CLS, *w(1, 2), SEP, *w(10, 11), SEP]),
        (2, 2, [CLS, *w(12, 13, 14, 15, 16), SEP]),
        (5, 0, [CLS, *w(3), SEP, *w(4, 5), SEP, SEP]),
    ]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=12), st.integers(3, 9))
def test_packing_loses_nothing_and_leaves_no_room(tokenizer, sizes, max_length):
    """Every token comes once, in order; all sequences but the last are full; and each can be begun with."""
    numbers = iter(range(400))
    documents = [(number, words(*(next(numbers) for _ in range(size)))) for number, size in enumerate(sizes)]
    cut = Sequences(tokenizer, max_length, pack=True)
    found = list(cut(documents))
    tokens = [id for sequence in found for id in sequence.ids if id not in (CLS, SEP)]
    assert tokens == ids(tokenizer, *range(sum(sizes)))
    assert [len(sequence.ids) for sequence in found[:-1]] == [max_length] * (len(found) - 1)
    for number, (document, offset, row) in enumerate(found):
        assert (row[0], row[-1], row[1] != SEP) == (CLS, SEP, True)
        assert 3 <= len(row) <= max_length
        assert int(row[1]) == cut.encode(documents[document][1])[offset]
        again = list(cut(documents[document:], offset))
        assert [sequence.ids.tolist() for sequence in again] == [sequence.ids.tolist() for sequence in found[number:]]


@pytest.mark.parametrize('pack', [False, True])
def test_a_sequence_of_special_tokens_alone_is_left_out(tokenizer, pack):
    """[UNK] is one of them: there would be nothing to predict. The others stay where they are."""
    documents = [(0, '! ! !'), (1, words(1)), (2, '! ' * 20), (3, words(2, 3)), (4, '! ' * 4 + words(4)), (5, '!')]
    cut = Sequences(tokenizer, 6, pack)
    found = list(cut(documents))
    places = [(1, 0), (2, 18), (3, 1), (4, 2)] if pack else [(1, 0), (3, 0)]
    assert [(document, offset) for document, offset, _ in found] == places
    assert all(set(row.tolist()) - {*tokenizer.all_special_ids} for _, _, row in found)
    for number, (document, offset, _) in enumerate(found):
        again = list(cut(documents[document:], offset))
        assert [sequence.ids.tolist() for sequence in again] == [sequence.ids.tolist() for sequence in found[number:]]


def test_options_out_of_range(tokenizer):
    with pytest.raises(ValueError, match='max_length=2 leaves no room'):
        Sequences(tokenizer, 2, pack=False)


def test_a_tokenizer_without_special_tokens(tokenizer):
    import copy

    without = copy.deepcopy(tokenizer)
    without.mask_token = without.cls_token = None
    with pytest.raises(ValueError, match='has no cls and no mask token, which masked language modelling needs'):
        Sequences(without, 8, pack=False)
