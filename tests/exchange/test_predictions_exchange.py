"""What tells one microbatch from another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer_kd.exchange import FolderExchange, PredictionsExchange, WeightsExchange, make_exchange
from composer_kd.exchange.predictions import fingerprints

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))

CHANGES = {
    'one value': lambda x: x.index_put(
        (torch.tensor(1), torch.tensor(2), torch.tensor(3), torch.tensor(4)), x.new_tensor(0)
    ),
    'mirrored': lambda x: x.flip(-1),
    'upside down': lambda x: x.flip(-2),
    'shifted': lambda x: x.roll(2, -1),
    'transposed': lambda x: x.transpose(-1, -2),
    'channels': lambda x: x.flip(1),
    'order of samples': lambda x: x.flip(0),
    'sign': lambda x: -x,
}


@pytest.mark.parametrize('change', CHANGES)
def test_samples_that_differ_have_other_fingerprints(change):
    labels = torch.arange(4)
    before, after = fingerprints((IMAGES, labels)), fingerprints((CHANGES[change](IMAGES), labels))
    assert before.shape == (4,) and before.dtype == torch.int64 and not torch.equal(before, after)


def test_all_that_is_in_a_batch_counts():
    batch = {
        'input_ids': torch.arange(12).reshape(3, 4),
        'labels': torch.ones(3, 4, dtype=torch.long),
        'positions': torch.arange(5),
    }
    prints = fingerprints(batch)
    assert torch.equal(prints, fingerprints(dict(reversed(batch.items()))))
    for key in ('input_ids', 'labels'):
        other = fingerprints({**batch, key: batch[key] + torch.tensor([[0], [1], [0]])})
        assert (other != prints).tolist() == [False, True, False]
    swapped = {**batch, 'input_ids': batch['labels'], 'labels': batch['input_ids']}
    assert (fingerprints(swapped) != prints).all()


@given(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool]))
def test_every_dtype_has_them(dtype):
    values = (torch.arange(6).reshape(2, 3) % 2).to(dtype)
    assert fingerprints(values).shape == (2,) and fingerprints(values.T.contiguous().T).equal(fingerprints(values))


def test_exchanges_by_their_names():
    assert isinstance(make_exchange('predictions'), PredictionsExchange)
    exchange = make_exchange({'name': 'weights', 'interval': '7ba', 'dtype': 'bfloat16'})
    assert isinstance(exchange, WeightsExchange) and (exchange.interval, exchange.dtype) == (7, torch.bfloat16)
    assert make_exchange(exchange) is exchange
    assert isinstance(make_exchange({'name': 'folder', 'path': 'x', 'team': 0, 'teams': 2}), FolderExchange)


@pytest.mark.parametrize(
    ('asked', 'message'),
    [
        ('logits', "unknown exchange 'logits'; known: predictions, weights, folder"),
        ({'interval': '5ba'}, 'unknown exchange None; known: '),
        ({'name': 'weights', 'every': 3}, "exchange 'weights' has no option 'every'; known: interval, dtype"),
        ({'name': 'weights', 'interval': '1ep'}, "interval must be a number of batches, such as '50ba', not '1ep'"),
        ({'name': 'weights', 'interval': 'often'}, "interval must be a number of batches, such as '50ba', not 'often'"),
        ({'name': 'weights', 'interval': '0ba'}, "interval must be a number of batches, such as '50ba', not '0ba'"),
        (
            {'name': 'weights', 'dtype': 'int8'},
            "dtype must name a floating point dtype of torch, such as 'bfloat16', not 'int8'",
        ),
        ({'name': 'predictions', 'top': 0}, 'top must be how many logits to send, 1 or more, not 0'),
        (
            {'name': 'folder', 'path': 'x'},
            "exchange 'folder': .*missing 2 required positional arguments: 'team' and 'teams'",
        ),
        ({'name': 'folder', 'path': 'x', 'team': 2, 'teams': 2}, 'two teams or more, numbered from 0, not team 2 of 2'),
        (
            {'name': 'folder', 'path': 'x', 'team': '0', 'teams': 2},
            "team and teams must be whole numbers, not '0' and 2",
        ),
        (
            {'name': 'folder', 'path': None, 'team': 0, 'teams': 2},
            'path must be a folder, or the URI of one, not None',
        ),
    ],
)
def test_exchanges_that_there_are_not(asked, message):
    with pytest.raises(ValueError, match=message):
        make_exchange(asked)
