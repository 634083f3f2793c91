"""Several teachers of a student that scores labelled positions alone, against one that scores all of them."""

import pytest
import torch
import transformers
from composer import Callback
from composer.core import DataSpec
from composer.models import HuggingFaceModel
from test_masked_lm import SPEC, WORDS, MaskedLM, assert_close, logged, network, samples, train, weights
from torch.utils.data import DataLoader

from composer_kd import KnowledgeDistillation, NetworkTeacher, TeacherSampling
from composer_kd.losses import kl

transformers.logging.set_verbosity_error()


def teachers(wrap):
    seeds_and_shapes = [(2, {}), (3, {'hidden_size': 24}), (4, {'num_hidden_layers': 2})]
    return [NetworkTeacher(wrap(network(seed, dropout=0.5, **shape))) for seed, shape in seeds_and_shapes]


POOLS = {
    'weights': ({'weights': [1, 2, 4]}, []),
    'random': ({'weights': 'random'}, []),
    'probabilities': ({'average': 'probabilities'}, []),
    'probabilities_mse': ({'average': 'probabilities', 'loss': 'mse'}, []),
    'only_correct': ({'only_correct': True}, []),
    'all': ({'weights': 'random', 'average': 'probabilities', 'only_correct': True}, [TeacherSampling(2)]),
    'per_sample': ({}, [TeacherSampling(per='sample')]),
    'two_per_sample': ({'average': 'probabilities', 'only_correct': True}, [TeacherSampling(2, per='sample')]),
    'host': ({'residency': 'host'}, [TeacherSampling()]),
}


@pytest.mark.parametrize('student', [5, None])
@pytest.mark.parametrize('spec', [{}, SPEC], ids=['plain', 'with_positions'])
@pytest.mark.parametrize('name', POOLS)
def test_a_pool_says_the_same_to_all_students(name, student, spec):
    options, sampling = POOLS[name]

    def run(model, wrap, spec, **changes):
        distill = KnowledgeDistillation(teachers(wrap), **{'temperature': 2.0, **options})
        return train(
            model,
            [distill, *sampling],
            train_dataloader=DataSpec(DataLoader(samples(), batch_size=8), **spec),
            max_duration='1ep',
            **changes,
        )

    found = run(MaskedLM(network(1), chunk_size=student), MaskedLM, spec)
    expected = run(HuggingFaceModel(network(1)), HuggingFaceModel, {})
    assert_close(weights(found), weights(expected))
    assert logged(found, 'loss/train/kd') == pytest.approx(logged(expected, 'loss/train/kd'), rel=1e-9)


def gpt(seed):
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.GPT2LMHeadModel(config)


class OnlyCorrect(Callback):
    """Recomputes the loss of a causal student from those of its teachers that foresee the next token."""

    def __init__(self, networks):
        self.networks = networks
        self.batches = 0

    def before_backward(self, state, logger):
        inputs = {name: value for name, value in state.batch.items() if name != 'labels'}
        labels = state.batch['labels'][:, 1:]
        with torch.no_grad():
            said = torch.stack([network.eval()(**inputs).logits[:, :-1] for network in self.networks])
        right = (said.argmax(-1) == labels).float()
        share = torch.where(right.sum(0) > 0, right / right.sum(0).clamp(min=1), 1 / len(said))
        expected = kl(
            student_logits=state.outputs.logits[:, :-1],
            teacher_logits=(share.unsqueeze(-1) * said).sum(0),
            temperature=4.0,
            where=labels != -100,
        )
        torch.testing.assert_close(state.loss['kd'], expected)
        assert 0 < right[:, labels != -100].mean() < 1
        self.batches += 1


def test_what_is_right_for_a_causal_model_is_the_next_token():
    networks = [gpt(seed) for seed in range(2, 5)]
    ids = torch.randint(4, (32, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for x in networks:  # so that each is right at times
            x.transformer.wte.weight[4:] *= 0.01
    watch = OnlyCorrect(networks)
    student = HuggingFaceModel(gpt(1), use_logits=False, shift_labels=True)
    pool = [NetworkTeacher(x) for x in networks]
    rows = [{'input_ids': row, 'labels': torch.where(row == 0, -100, row)} for row in ids]
    loader = DataLoader(rows, batch_size=8)
    distill = KnowledgeDistillation(pool, only_correct=True)
    train(student, [distill], callbacks=watch, max_duration='1ep', train_dataloader=loader)
    assert watch.batches == 4
