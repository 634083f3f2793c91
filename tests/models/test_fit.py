from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from composer_kd import data, models
from composer_kd.models.fit import misfit
from helpers import TINY_BERT, make_glue, make_vocabulary


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
    return make_vocabulary(tmp_path_factory.mktemp('vocabulary') / 'vocab.txt')


def spec(tokenizer=None, **facts):
    loader = torch.utils.data.DataLoader(SimpleNamespace(tokenizer=tokenizer, **facts))
    return SimpleNamespace(dataloader=loader)


@pytest.mark.parametrize(
    ('kind', 'positions', 'longest'),
    [
        *[('bert', 64, 64), ('roberta', 66, 65), ('distilbert', 64, 64), ('electra', 64, 64), ('mpnet', 66, 64)],
        *[('deberta-v2', 64, 64), ('modernbert', 64, None)],
    ],
)
def test_the_longest_sequence_is_what_the_network_can_read(kind, positions, longest, vocabulary):
    config = {'model_type': kind} | TINY_BERT | {'max_position_embeddings': positions}
    if kind == 'distilbert':
        config = {'model_type': kind, 'dim': 16, 'n_layers': 1, 'n_heads': 2, 'hidden_dim': 32} | {
            'max_position_embeddings': positions
        }
    if kind == 'electra':
        config['embedding_size'] = 16
    model = models.masked_lm(config=config, tokenizer=vocabulary).eval()

    def read(length):
        # A word that is not the padding: RoBERTa counts positions by it.
        ids = torch.full((1, length), 7)
        with torch.no_grad():
            return model({'input_ids': ids, 'attention_mask': torch.ones_like(ids)})

    if longest is None:
        read(1000)
        assert misfit(model, spec(max_length=1000)) is None
        return
    read(longest)
    with pytest.raises((IndexError, RuntimeError)):
        read(longest + 1)
    assert misfit(model, spec(max_length=longest)) is None
    assert misfit(model, spec(max_length=longest + 1)) == (
        f'train_data.max_length is {longest + 1}, but model has {longest} positions (max_position_embeddings): '
        f'set train_data.max_length={longest}, or take a model with more'
    )


def test_relative_positions_have_no_end(vocabulary):
    config = TINY_BERT | {'model_type': 'deberta-v2', 'relative_attention': True, 'position_biased_input': False}
    model = models.masked_lm(config=config, tokenizer=vocabulary)
    assert misfit(model, spec(max_length=1000)) is None


def test_the_tokenizer_is_that_of_the_model(vocabulary, tmp_path):
    model = models.masked_lm(config=TINY_BERT, tokenizer=vocabulary)
    other = tmp_path / 'vocab.txt'
    other.write_text(Path(vocabulary).read_text() + 'word\n')
    given = models.masked_lm(config=TINY_BERT, tokenizer=str(other)).tokenizer
    assert misfit(model, spec(model.tokenizer)) is None
    assert misfit(model, spec(given), model_key='teachers.0', data_key='eval_data') == (
        'eval_data.tokenizer is not the tokenizer of teachers.0 (78 words against 77): '
        'give eval_data the one that teachers.0 was made with'
    )


@pytest.mark.parametrize(
    ('outputs', 'labels', 'message'),
    [
        *[(3, 3, None), (3, 2, None), (1, 1, None)],
        (2, 3, 'train_data has 3 classes, model 2 classes: set model.num_labels=3'),
        (1, 2, 'train_data has 2 classes, model grades (num_labels=1): set model.num_labels=2'),
        (2, 1, 'train_data has grades (num_labels=1), model 2 classes: set model.num_labels=1'),
    ],
)
def test_labels_are_among_the_outputs(outputs, labels, message, vocabulary):
    model = models.text_classifier(config=TINY_BERT, tokenizer=vocabulary, num_labels=outputs)
    assert misfit(model, spec(num_labels=labels)) == message


def test_every_evaluator_is_looked_at(vocabulary, tmp_path):
    make_glue(tmp_path)
    evaluators = data.glue('validation', 4, task='mnli', tokenizer=vocabulary, data_dir=tmp_path, max_length=64)
    model = models.text_classifier(config=TINY_BERT, tokenizer=vocabulary, num_labels=3)
    assert misfit(model, evaluators) is None
    evaluators[1].dataloader.dataloader.dataset.max_length = 65
    assert misfit(model, evaluators, data_key='eval_data') is not None


def test_what_is_not_text_fits():
    assert misfit(models.small_convnet(), spec(max_length=9)) is None
    assert misfit(models.small_convnet(), None) is None
