"""A masked language model that scores labelled positions alone, against one that scores all of them."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from composer import Algorithm, Trainer
from composer.core import DataSpec
from composer.loggers import InMemoryLogger
from composer.models import HuggingFaceModel
from composer.utils import dist
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForMaskedLM, logging

from composer_kd import EarlyStopDistillation, KnowledgeDistillation, NetworkTeacher, TeacherError, TeacherSampling
from composer_kd.data.masking import SPEC
from composer_kd.losses import kl
from composer_kd.models.masked_lm import MaskedLM
from composer_kd.tokenization import load_tokenizer
from helpers import make_vocabulary, on_two_ranks

WORDS, LENGTH, SAMPLES = 50, 12, 32
SHAPES = {
    'bert': {'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 32},
    'distilbert': {'dim': 16, 'n_layers': 1, 'n_heads': 2, 'hidden_dim': 32},
    'roberta': {'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 32},
    'albert': {'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 32},
}
DROPOUTS = {'hidden_dropout_prob', 'attention_probs_dropout_prob', 'dropout', 'attention_dropout'}


@pytest.fixture(autouse=True)
def _quiet():
    logging.set_verbosity_error()


def network(seed, family='bert', dropout=0.0, dtype=torch.float64, **changes):
    shape = {'vocab_size': WORDS, 'max_position_embeddings': 16, 'pad_token_id': 0} | SHAPES[family] | changes
    config = AutoConfig.for_model(family, **shape)
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForMaskedLM.from_config(config)
        for parameter in model.parameters():  # biases too, which start as 0
            torch.nn.init.normal_(parameter, std=0.2)
        return model.to(dtype)


def samples():
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(SAMPLES):
        ids = torch.randint(1, WORDS, (LENGTH,), generator=generator)
        counts = (torch.rand(LENGTH, generator=generator) < 0.3) & (torch.arange(LENGTH) < LENGTH - i % 5)
        mask = (torch.arange(LENGTH) < LENGTH - i % 5).long()
        found.append({'input_ids': ids, 'attention_mask': mask, 'labels': torch.where(counts, ids, -100)})
    return found


def batch(size=SAMPLES):
    return next(iter(DataLoader(samples(), batch_size=size)))


def train(model, algorithms: list[Algorithm], **changes):
    settings = {
        'train_dataloader': DataLoader(samples(), batch_size=8),
        'max_duration': '2ep',
        'optimizers': torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9),
        'loggers': InMemoryLogger(),
        'progress_bar': False,
        'device': 'cpu',
        'seed': 3,
    }
    run = Trainer(model=model, algorithms=algorithms, **settings | changes)
    try:
        run.fit()
    finally:
        run.close()
    return run


def weights(run):
    return copy.deepcopy(run.state.model.state_dict())


def logged(run, name):
    (memory,) = (logger for logger in run.logger.destinations if isinstance(logger, InMemoryLogger))
    return [float(value) for _, value in memory.data[name]]


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('family', SHAPES)
@pytest.mark.parametrize('chunk_size', [5, None])
def test_scores_and_gradients_are_those_of_all_positions(family, chunk_size):
    ours, theirs = (network(1, family) for _ in range(2))
    model, given = MaskedLM(ours, chunk_size=chunk_size), batch()
    model.train()
    loss = model.loss(model(given), given)
    expected = theirs.train()(**given)
    torch.testing.assert_close(loss, expected.loss)
    loss.backward()
    expected.loss.backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=lambda m, name=name: f'{name}: {m}')
    counts = given['labels'] != -100
    torch.testing.assert_close(model.eval_forward(given), expected.logits[counts])
    torch.testing.assert_close(model({k: v for k, v in given.items() if k != 'labels'})['logits'], expected.logits)


@pytest.mark.parametrize('softmax_axis', ['vocabulary', 'sequence'])
@pytest.mark.parametrize('student', [5, None, 'all'])
@pytest.mark.parametrize('teacher', ['masked_lm', 'composer', 'bare'])
@pytest.mark.parametrize('spec', [{}, SPEC], ids=['plain', 'with_positions'])
def test_a_run_with_a_teacher_is_that_of_all_positions(softmax_axis, student, teacher, spec):
    """Widths and depths differ; every way to hold the two networks trains the same student."""

    def run(kind, teacher_kind, spec):
        model = HuggingFaceModel(network(1)) if kind == 'all' else MaskedLM(network(1), chunk_size=kind)
        taught_by = network(2, hidden_size=24, num_hidden_layers=2, max_position_embeddings=20, dropout=0.5)
        wrap = {'masked_lm': MaskedLM, 'composer': HuggingFaceModel, 'bare': lambda network: network}[teacher_kind]
        teachers = [NetworkTeacher(wrap(taught_by))]
        distill = KnowledgeDistillation(teachers, temperature=2.0, softmax_axis=softmax_axis)
        return train(model, [distill], train_dataloader=DataSpec(DataLoader(samples(), batch_size=8), **spec))

    found, expected = run(student, teacher, spec), run('all', 'composer', {})
    assert_close(weights(found), weights(expected))
    for name in ('loss/train/kd', 'loss/train/label', 'loss/train/total'):
        assert logged(found, name) == pytest.approx(logged(expected, name), rel=1e-9)
    assert len(logged(found, 'loss/train/kd')) == 8


def own_loss(*, student_logits, teacher_logits, where):
    squares = (student_logits - teacher_logits).square().mean(-1)
    return squares.mean() if where is None else squares[where].mean()


@pytest.mark.parametrize('loss', ['mse', 'cosine', 'reverse_kl', 'jsd', own_loss, partial(kl, temperature=3.0)])
def test_other_losses_and_a_pool(loss):
    def run(model):
        teachers = [NetworkTeacher(MaskedLM(network(seed))) for seed in (2, 3)]
        return train(model, [KnowledgeDistillation(teachers, loss=loss)])

    ours, theirs = run(MaskedLM(network(1), chunk_size=7)), run(HuggingFaceModel(network(1)))
    assert_close(weights(ours), weights(theirs))


def algorithms():
    teachers = [NetworkTeacher(MaskedLM(network(seed, dtype=torch.float32, dropout=0.5))) for seed in (2, 3)]
    return [KnowledgeDistillation(teachers), TeacherSampling(), EarlyStopDistillation('0.75dur')]


def test_resume_is_exact(tmp_path):
    def model():
        return MaskedLM(network(1, dtype=torch.float32, dropout=0.1), chunk_size=5)

    whole = train(model(), algorithms(), save_folder=str(tmp_path), save_interval='3ba')
    resumed = train(model(), algorithms(), load_path=str(tmp_path / 'ep0-ba3-rank0.pt'))
    assert all(torch.equal(value, weights(whole)[key]) for key, value in weights(resumed).items())


def test_without_a_teacher_it_is_the_plain_run():
    """From the batch on that distills no more, and with an algorithm that never does, bit for bit."""
    taught = [KnowledgeDistillation([NetworkTeacher(MaskedLM(network(2)))], kd_weight=0.0, label_weight=1.0)]
    runs = [train(MaskedLM(network(1, dropout=0.1)), algorithms) for algorithms in (taught, [])]
    assert all(torch.equal(a, b) for a, b in zip(*(weights(run).values() for run in runs), strict=True))


def count(given):
    return {'total': given['input_ids'].numel(), 'loss_generating': int((given['labels'] != -100).sum())}


def run_by_tokens(microbatch_size, chunk_size=5, *algorithms):
    """A run whose loss is the mean over all labelled tokens of a batch, on all ranks and in all microbatches."""
    data = samples()
    loader = DataLoader(data, batch_size=16 // dist.get_world_size(), sampler=dist.get_sampler(data))
    distill = KnowledgeDistillation([NetworkTeacher(MaskedLM(network(2)))])
    return train(
        MaskedLM(network(1), chunk_size=chunk_size),
        [distill, *algorithms],
        train_dataloader=DataSpec(loader, get_num_tokens_in_batch=count),
        device_train_microbatch_size=microbatch_size,
        accumulate_train_batch_on_tokens=True,
    )


@pytest.mark.parametrize('chunk_size', [5, None])
def test_microbatches_weighed_by_their_tokens_are_the_whole_batch(chunk_size):
    assert_close(weights(run_by_tokens(4, chunk_size)), weights(run_by_tokens(16, chunk_size)))


@pytest.mark.dist
def test_two_ranks_are_one(tmp_path):
    on_two_ranks(
        f"""
import sys, torch
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from test_masked_lm import *
from composer.algorithms import LayerFreezing
run_by_tokens(16, 5, LayerFreezing())  # which has DDP look for unused parameters
for chunk_size in (5, None):
    run = run_by_tokens(4, chunk_size)
    if dist.get_global_rank() == 0:
        torch.save(run.state.model.module.state_dict(), f'{{chunk_size}}.pt')
""",
        tmp_path,
    )
    for chunk_size in (5, None):
        assert_close(torch.load(tmp_path / f'{chunk_size}.pt'), weights(run_by_tokens(16, chunk_size)))


def test_evaluation_metrics_are_those_of_all_positions():
    ours, theirs = network(1), network(1)
    still = torch.optim.SGD(ours.parameters(), lr=0.0)
    loader = DataLoader(samples(), batch_size=8)
    run = train(MaskedLM(ours), [], max_duration='1ba', optimizers=still, eval_dataloader=loader, eval_interval='1ba')
    given = batch()
    with torch.no_grad():
        logits = theirs.eval()(**{k: v for k, v in given.items() if k != 'labels'}).logits
    counts = given['labels'] != -100
    found = {name: float(metric.compute()) for name, metric in run.state.eval_metrics['eval'].items()}
    assert found['LanguageCrossEntropy'] == pytest.approx(
        float(F.cross_entropy(logits[counts], given['labels'][counts]))
    )
    assert found['MaskedAccuracy'] == pytest.approx(
        float((logits.argmax(-1) == given['labels'])[counts].double().mean())
    )


def test_a_batch_without_a_label_is_no_nan():
    given = batch() | {'labels': torch.full((SAMPLES, LENGTH), -100)}
    for chunk_size in (4, None):
        model = MaskedLM(network(1), chunk_size=chunk_size)
        loss = model.loss(model(given), given)
        loss.backward()
        assert float(loss) == 0.0
        assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())


def test_another_vocabulary_is_refused(tmp_path):
    other = NetworkTeacher(MaskedLM(network(2, vocab_size=WORDS + 1)))
    with pytest.raises(TeacherError, match=r'51 classes.*50'):
        train(MaskedLM(network(1)), [KnowledgeDistillation([other])])
    words = make_vocabulary(tmp_path / 'one.txt')
    (tmp_path / 'other.txt').write_text(Path(words).read_text().replace('\na\n##a\n', '\n##a\na\n'))
    one, two = (load_tokenizer(str(tmp_path / name)) for name in ('one.txt', 'other.txt'))
    student, teacher = (MaskedLM(network(1, vocab_size=len(one)), tokenizer) for tokenizer in (one, two))
    with pytest.raises(TeacherError, match=r"tokenizer of teacher .* is not the student's .*'##a' against 'a'"):
        KnowledgeDistillation([NetworkTeacher(teacher)]).check(student)
    same = MaskedLM(network(2, vocab_size=len(one)), load_tokenizer(words))
    KnowledgeDistillation([NetworkTeacher(same)]).check(student)


@pytest.mark.parametrize(
    ('where', 'value'),
    [
        ('bert.embeddings.word_embeddings.weight', float('nan')),
        ('cls.predictions.bias', float('nan')),
        ('cls.predictions.bias', float('inf')),
        ('cls.predictions.transform.LayerNorm.bias', float('-inf')),
    ],
)
@pytest.mark.parametrize('chunk_size', [5, None])
def test_a_teacher_that_says_nan_is_named(where, value, chunk_size):
    broken = network(2)
    broken.get_parameter(where).data.view(-1)[3] = value
    with pytest.raises(TeacherError, match=r'broken.*NaN.*batch 0'):
        train(
            MaskedLM(network(1), chunk_size=chunk_size),
            [KnowledgeDistillation([NetworkTeacher(MaskedLM(broken), name='broken')])],
        )


def test_chunks_of_no_position_are_refused():
    with pytest.raises(ValueError, match='chunk_size'):
        MaskedLM(network(1), chunk_size=0)


def test_the_sequence_axis_is_for_tokens_and_for_losses_of_distributions():
    teacher = NetworkTeacher(MaskedLM(network(2)))
    with pytest.raises(ValueError, match='mse'):
        KnowledgeDistillation([teacher], loss='mse', softmax_axis='sequence')
    with pytest.raises(ValueError, match='vocab'):
        KnowledgeDistillation([teacher], softmax_axis='vocab')
    with pytest.raises(ValueError, match='axis of the classes'):
        KnowledgeDistillation([teacher], loss=own_loss, softmax_axis='sequence')
