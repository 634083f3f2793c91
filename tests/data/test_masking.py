import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_kd.data.masking import MaskedBatch, Sample, count_samples, count_tokens, mask, random_stream, split_batch
from composer_kd.tokenization import load_tokenizer
from text_runs import write_vocabulary

MASK, WORDS = 4, 1000
# The ids, and the labels where there are any.
EXPECTED = (
    [5, 6, 7, 4, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24],
    {3: 8},
)  # ids, and labels where there are any


def one(ids, *, sample=0, **options):
    special = np.asarray(ids) < 5
    return mask(ids, special, **{'seed': 0, 'mask_token_id': MASK, 'vocabulary': WORDS, **options, 'sample': sample})


def test_proportions():
    """15 % of the tokens are predicted; of these 80 % are masked, 10 % random, 10 % as they were."""
    ids = np.arange(5, 1000)
    chosen = masked = kept = total = 0
    for sample in range(400):
        inputs, labels = one(ids, sample=sample)
        picked = labels != -100
        assert (labels[picked] == ids[picked]).all()
        assert (inputs[~picked] == ids[~picked]).all()
        total += len(ids)
        chosen += picked.sum()
        masked += (inputs[picked] == MASK).sum()
        kept += (inputs[picked] == ids[picked]).sum()
    assert chosen / total == pytest.approx(0.15, abs=0.003)
    assert masked / chosen == pytest.approx(0.8, abs=0.006)
    assert kept / chosen == pytest.approx(0.1, abs=0.006)


def test_random_tokens_are_of_the_whole_vocabulary():
    ids = np.full(2000, 7)
    replaced = []
    for sample in range(60):
        inputs, labels = one(ids, sample=sample, probability=1.0, vocabulary=50)
        assert (labels == 7).all()
        replaced += [id for id in inputs if id not in (7, MASK)]
    assert set(replaced) == set(range(50)) - {7, MASK}
    counts = np.bincount(replaced)[list(set(replaced))]
    assert 180 < counts.min() < counts.max() < 300  # 240 each


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, WORDS - 1), max_size=40),
    st.integers(0, 2**63),
    st.tuples(*[st.integers(0, 2**63)] * 3),
    st.integers(0, 2**40),
    st.floats(0.01, 1),
)
def test_special_tokens_stay_and_something_is_always_predicted(ids, seed, sample, view, probability):
    inputs, labels = one(ids, seed=seed, sample=sample, view=view, probability=probability)
    ids = np.asarray(ids, dtype=np.int64)
    assert inputs.dtype == labels.dtype == np.int64
    assert inputs.shape == labels.shape == ids.shape
    assert (labels[ids < 5] == -100).all()
    assert (inputs[ids < 5] == ids[ids < 5]).all()
    assert (labels != -100).any() == (ids >= 5).any()
    again = one(ids, seed=seed, sample=sample, view=view, probability=probability)
    assert all((a == b).all() for a, b in zip(again, (inputs, labels), strict=True))


def test_is_a_function_of_seed_sample_and_view():
    ids = np.arange(5, 105)
    keys = [(seed, sample, view) for seed in (0, 1) for sample in (0, 1, (0, 1), (0, 0, 1)) for view in (0, 1)]
    found = {tuple(one(ids, seed=seed, sample=sample, view=view)[1]) for seed, sample, view in keys}
    assert len(found) == len(keys)
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    before = one(ids)
    assert (np.random.get_state()[1] == state).all()
    np.random.random(5)
    assert (one(ids)[0] == before[0]).all()


def test_random_streams_differ_in_every_argument():
    streams = [(0, 0, (0,)), (1, 0, (0,)), (0, 1, (0,)), (0, 0, (1,)), (0, 0, (0, 1)), (0, 0, (0, 0, 1))]
    firsts = {random_stream(*arguments).random() for arguments in streams} | {random_stream(0, 0, (0,), 1).random()}
    assert len(firsts) == 7


def test_the_masks_are_settled():
    """A change here would give every resumed run other masks than it began with."""
    inputs, labels = one(np.arange(5, 25), seed=1, sample=(2, 3, 4), view=5)
    assert inputs.tolist() == EXPECTED[0]
    assert {place: label for place, label in enumerate(labels.tolist()) if label != -100} == EXPECTED[1]


def test_whole_words():
    words = np.repeat(np.arange(20), 3)
    ids = np.concatenate([[2], np.arange(5, 62), [3, 3]])
    words[0], words[-2:] = 0, 19
    picked = 0
    for sample in range(300):
        _, labels = one(ids, sample=sample, words=words)
        chosen = labels != -100
        for word in range(20):
            assert len(set(chosen[(words == word) & (ids >= 5)])) == 1
        picked += chosen.sum()
    assert picked / (300 * 57) == pytest.approx(0.15, abs=0.02)
    # When chance picks no word, it is still a whole one.
    assert (one(ids, probability=1e-9, words=words)[1] != -100).sum() in (2, 3)


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(str(write_vocabulary(tmp_path)))


def samples_of(tokenizer, *texts):
    return [Sample(np.array(tokenizer(text)['input_ids']), (number,), 0) for number, text in enumerate(texts)]


def test_a_batch_is_its_samples_padded(tokenizer):
    samples = samples_of(tokenizer, 'w1 w2 w3', 'w4 w5 w6 w7 w8 w9 w10 w11', 'w1')
    masked_batch = MaskedBatch(tokenizer, 128)
    batch = masked_batch(samples)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == dict.fromkeys(
        ['input_ids', 'attention_mask', 'labels'], (torch.Size([3, 16]), torch.int64)
    )
    assert batch['attention_mask'].sum(dim=1).tolist() == [5, 10, 3]
    for row, sample in enumerate(samples):
        alone = masked_batch([sample])
        length = len(sample.ids)
        for key in batch:
            assert torch.equal(batch[key][row, :length], alone[key][0, :length])
        assert (batch['input_ids'][row, length:] == tokenizer.pad_token_id).all()
        assert (batch['labels'][row, length:] == -100).all()
        assert batch['labels'][row, 0] == batch['labels'][row, length - 1] == -100
    assert count_tokens(batch) == {'total': 18, 'loss_generating': int((batch['labels'] != -100).sum())}


@pytest.mark.parametrize(('max_length', 'length'), [(128, 16), (12, 12), (10, 10)])
def test_length_is_a_multiple_of_eight_or_the_maximum(tokenizer, max_length, length):
    batch = MaskedBatch(tokenizer, max_length)(samples_of(tokenizer, 'w4 w5 w6 w7 w8 w9 w10 w11'))
    assert batch['input_ids'].shape == (1, length)


def test_whole_words_of_pieces(tokenizer):
    """`abc` is not in the vocabulary: it is the pieces a, ##b, ##c."""
    samples = [Sample(np.array(tokenizer('abc w1 xyz')['input_ids']), (number,), 0) for number in range(200)]
    labels = MaskedBatch(tokenizer, 128, whole_words=True)(samples)['labels']
    chosen = (labels != -100)[:, 1:8]
    for word in (chosen[:, :3], chosen[:, 4:]):
        assert torch.equal(word.any(dim=1), word.all(dim=1))
        assert 0 < word.all(dim=1).sum() < 200
    assert not torch.equal(chosen[:, 0], chosen[:, 4])


def test_options_out_of_range(tokenizer):
    for probability in (0, 1.5):
        with pytest.raises(ValueError, match='masking_probability must be above 0 and at most 1'):
            MaskedBatch(tokenizer, 128, probability=probability)
    with pytest.raises(ValueError, match='mask_seed must be from 0 up to 2\\^64, not -1'):
        MaskedBatch(tokenizer, 128, seed=-1)


def test_parts_of_a_batch_know_where_their_labels_are(tokenizer):
    samples = samples_of(tokenizer, 'w1 w2 w3', 'w4 w5 w6 w7 w8 w9 w10 w11', 'w1', 'w2 w3')
    batch = MaskedBatch(tokenizer, 128, probability=0.4)(samples)
    parts = split_batch(batch, 3)
    assert [count_samples(part) for part in parts] == [3, 1]
    for part in parts:
        assert torch.equal(part['labels'].flatten()[part['positions']], part['labels'][part['labels'] != -100])
        assert count_tokens(part)['loss_generating'] == len(part['positions']) == (part['labels'] != -100).sum()
    again = split_batch(parts[0], 1)
    assert len(again) == 3 and all(part['positions'].max() < 16 for part in again)
    assert torch.equal(torch.cat([part['input_ids'] for part in again]), parts[0]['input_ids'])
