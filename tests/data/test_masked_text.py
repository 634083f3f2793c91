import gzip
import inspect
import json
import os
import re

import pytest
import torch
from composer import Trainer
from composer.utils import dist

from composer_kd import data
from composer_kd.data.text_files import TextError
from helpers import shared_data
from text_runs import digest, stream, tiny_bert, train, unmasked, write_shards, write_vocabulary

DOCS = {'text': 'python_docs', 'vocabulary': 1000}


@pytest.fixture
def world(tmp_path):
    write_vocabulary(tmp_path)
    write_shards(tmp_path / 'text', [9, 14, 6, 11])
    return tmp_path


def local(world, split='train', batch_size=8, **options):
    options = {'path': world / 'text', 'max_length': 16, **options}
    return data.text(split, batch_size, tokenizer=str(world / 'vocab.txt'), **options)


def samples_of(spec):
    return [sample for batch in spec.dataloader for sample in unmasked(batch)]


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_text_is_all_there(world, split):
    spec = local(world, split, drop_last=False, max_length=30)
    tokenizer = spec.dataloader.dataset.tokenizer
    lines = [line for shard in sorted((world / 'text').iterdir()) for line in read_lines(shard)]
    expected = [tuple(tokenizer(line)['input_ids']) for line in lines]
    found = samples_of(spec)
    assert (found == expected) == (split == 'validation')
    assert sorted(found) == sorted(expected)
    assert spec.num_samples == 40
    assert spec.dataloader.dataset.max_length == 30


def read_lines(path):
    return [json.loads(line)['text'] for line in gzip.open(path)]


def test_several_paths_are_taken_together(world):
    (world / 'more.txt').write_text('w1 w2\n' * 3)
    alone, more = world / 'text', world / 'more.txt'
    alone, both = (local(world, path=path, batch_size=1).num_samples for path in (alone, [alone, more]))
    assert both == alone + 3


def test_packed_text(world):
    spec = local(world, 'validation', max_length=16, pack=True, batch_size=1)
    lengths = [len(sample) for sample in samples_of(spec)]
    assert set(lengths) - {16} and lengths.count(16) >= len(lengths) - 4  # the last of each file may be shorter
    whole = samples_of(local(world, 'validation', max_length=30))
    words = lambda samples: [word for sample in samples for word in sample if word not in (2, 3)]  # noqa: E731
    assert words(samples_of(spec)) == words(whole)


def test_training_sees_other_masks_in_every_epoch_and_evaluation_the_same(world):
    def labels(spec, epoch):
        spec.dataloader.sampler.set_epoch(epoch)
        found = {}
        for batch in spec.dataloader:
            for sample, row in zip(unmasked(batch), batch['labels'].tolist(), strict=True):
                found[sample] = row[: len(sample)]
        return found

    for num_workers in (0, 2):
        spec = local(world, num_workers=num_workers, drop_last=False)
        first = labels(spec, 0)
        assert labels(spec, 0) == first
        assert sum(labels(spec, 1)[sample] != row for sample, row in first.items()) > 20
        assert labels(local(world, mask_seed=1, drop_last=False), 0) != first
        evaluation = local(world, 'validation', num_workers=num_workers)
        assert labels(evaluation, 0) == labels(evaluation, 17)


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('stop', ['3ba', '2ep', '13ba'])
def test_resume_is_exact(world, num_workers, stop):
    """With masks that are drawn anew in every epoch, by workers that live on from one to the next."""

    def run(until, **options):
        evaluation = local(world, 'validation', num_workers=num_workers)
        return train(
            local(world, num_workers=num_workers), until, eval_dataloader=evaluation, eval_interval='2ba', **options
        )

    straight, watch = run('4ep')
    assert len(watch.batches) == 20
    run(stop, save_folder=str(world / 'run'), save_interval=stop, save_filename='stop.pt')
    resumed, _ = run('4ep', load_path=str(world / 'run' / 'stop.pt'))
    assert digest(straight) == digest(resumed)


@pytest.mark.parametrize('kind', ['text', 'c4'])
def test_accumulation_on_tokens_is_exact(world, kind):
    """A batch of 16 gives the gradient that four microbatches of 4 give together, however unequal their labels."""

    def run(microbatch, on_tokens=True):
        spec = local(world, batch_size=16) if kind == 'text' else stream(world, batch_size=16)
        return train(
            spec,
            '2ba',
            dropout=0.0,
            device_train_microbatch_size=microbatch,
            accumulate_train_batch_on_tokens=on_tokens,
        )

    (one, watch), (four, _), (by_samples, _) = run(16), run(4), run(4, on_tokens=False)
    counts = [int((part != -100).sum()) for part in watch.batches[0]['labels'].split(4)]
    assert len(set(counts)) > 1
    for key in one:
        torch.testing.assert_close(one[key], four[key], rtol=0, atol=1e-7)
    assert max(float((one[key] - by_samples[key]).abs().max()) for key in one) > 1e-5


@pytest.mark.parametrize('kind', ['text', 'c4'])
def test_text_of_unknown_words_alone_leaves_no_batch_without_labels(world, kind):
    write_shards(world / 'text', [3])
    (world / 'text' / 'part-01.txt').write_text('! ! !\n' * 9)
    options = {'batch_size': 1, 'shuffle': False}
    spec = local(world, **options) if kind == 'text' else stream(world, **options)
    _, watch = train(spec, '3ba', accumulate_train_batch_on_tokens=True)
    assert len({*watch.samples}) == 3


@pytest.mark.parametrize('kind', ['text', 'c4'])
def test_tokens_are_counted(world, kind):
    spec = local(world) if kind == 'text' else stream(world)
    batch = next(iter(spec.dataloader))
    assert spec.get_num_tokens_in_batch(batch) == sum(len(sample) for sample in unmasked(batch))
    predicted = int((batch['labels'] != -100).sum())
    assert spec.get_num_tokens_in_batch(batch, 'loss_generating') == predicted > 0
    assert spec.get_num_samples_in_batch(batch) == len(batch['input_ids'])


def test_holdout(world):
    write_shards(world / 'text', [300])
    parts = {split: samples_of(local(world, split, batch_size=1, holdout=0.2)) for split in ('train', 'validation')}
    assert 40 < len(parts['validation']) < 80
    assert sorted(parts['train'] + parts['validation']) == sorted(samples_of(local(world, batch_size=1)))
    assert not set(parts['train']) & set(parts['validation'])
    # A document is on its side because of its text: neither other documents nor its place matter.
    lines = read_lines(world / 'text' / 'part-00.json.gz')
    (world / 'text' / 'part-00.json.gz').unlink()
    (world / 'text' / 'a.txt').write_text('\n'.join(reversed(lines[:200])))
    assert set(samples_of(local(world, 'validation', batch_size=1, holdout=0.2))) < set(parts['validation'])
    with pytest.raises(ValueError, match=r'holdout is a share of the documents, from 0 up to 1, not 1\.5'):
        local(world, holdout=1.5)


def test_a_split_without_samples(world):
    write_shards(world / 'text', [20])
    for split, holdout, todo in [
        ('validation', 0.001, 'evaluate on: take a larger'),
        ('train', 0.999, 'train on: take a smaller'),
    ]:
        with pytest.raises(ValueError, match=f'^holdout={holdout} leaves no samples to {todo} share, or more text$'):
            local(world, split, holdout=holdout)
    (world / 'unknown.txt').write_text('! ! !\n' * 9)
    with pytest.raises(ValueError, match=r'^the data set has no samples$'):
        local(world, path=world / 'unknown.txt')


def test_masking_options(world):
    spec = local(world, masking_probability=1.0)
    batch = next(iter(spec.dataloader))
    inside = (batch['input_ids'] != 2) & (batch['input_ids'] != 3) & (batch['attention_mask'] == 1)
    assert (batch['labels'][inside] != -100).float().mean() > 0.9
    with pytest.raises(ValueError, match='masking_probability must be'):
        local(world, masking_probability=0)
    (world / 'letters').mkdir()
    (world / 'letters' / 'a.txt').write_text('abcdefgh\n' * 50)
    labels = next(iter(local(world, path=world / 'letters', whole_word_masking=True).dataloader))['labels']
    assert (labels[:, 1:9] != -100).all()  # one word, and one is always chosen


def test_errors_of_files(world):
    with pytest.raises(FileNotFoundError, match='no file or folder'):
        local(world, path=world / 'nowhere')
    (world / 'text' / 'bad.jsonl').write_text('{"text": "w1"}\n{"text": 1}\n')
    with pytest.raises(TextError, match=r"bad.jsonl, line 2: 'text' is no text but int; repair it, or"):
        local(world)
    with pytest.warns(UserWarning, match='left out 1 lines'):
        assert local(world, on_error='skip').num_samples == 41
    (world / 'text' / 'bad.jsonl').write_text('')
    with pytest.raises(TextError, match=r'bad\.jsonl has no text in it: remove it'):
        local(world)


def test_c4_takes_the_files_of_its_split(world):
    write_shards(world / 'text', [3, 20])
    (world / 'text' / 'part-00.json.gz').rename(world / 'text' / 'c4-validation.00000-of-00001.json.gz')
    (world / 'text' / 'part-01.json.gz').rename(world / 'text' / 'c4-train.00000-of-00001.json.gz')
    options = {'data_dir': world / 'text', 'tokenizer': str(world / 'vocab.txt'), 'max_length': 16}
    evaluation = data.c4('validation', 2, **options)
    assert evaluation.num_samples == 3
    assert len(samples_of(evaluation)) == 3
    assert data.c4('validation', 2, samples=2, **options).num_samples == 2
    training = data.c4('train', 2, num_workers=0, **options)
    assert training.num_samples is None
    assert [shard.name for shard in training.dataloader.dataset.shards] == ['c4-train.00000-of-00001.json.gz']
    assert training.dataloader.dataset.max_length == evaluation.dataloader.dataset.max_length == 16
    assert training.dataloader.dataset.tokenizer.mask_token == '[MASK]'


@pytest.mark.parametrize(
    ('split', 'option'),
    [('train', {'samples': 3}), ('train', {'drop_last': False}), ('train', {'persistent_workers': True})],
)
def test_options_of_the_other_split(world, split, option):
    with pytest.raises(ValueError, match=f'{next(iter(option))} is for split=validation: training streams'):
        data.c4(split, 2, data_dir=world / 'text', tokenizer=str(world / 'vocab.txt'), **option)


def test_c4_without_files_or_network(world, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', True)
    for split in ('train', 'validation'):
        with pytest.raises(FileNotFoundError, match=r'cannot read allenai/c4 .*: set data_dir to a folder') as caught:
            data.c4(split, 2, tokenizer=str(world / 'vocab.txt'))
        assert '\n' not in str(caught.value)


def test_c4_options_reach_the_loader(world):
    options = {'data_dir': world / 'text', 'tokenizer': str(world / 'vocab.txt')}
    loader = data.c4('train', 2, num_workers=2, prefetch_factor=3, pin_memory=False, **options).dataloader
    assert (loader.num_workers, loader.prefetch_factor, loader.pin_memory, loader.batch_size) == (2, 3, False, 2)
    (world / 'text' / 'validation.txt').write_text('w1\n' * 2)
    assert data.c4('validation', 2, **options).dataloader.num_workers == 0
    names = set(inspect.signature(data.c4).parameters)
    assert {'shuffle', 'shuffle_seed', 'shuffle_buffer', 'data_dir', 'tokenizer', 'pack'} <= names


@pytest.mark.parametrize(('cores', 'ranks', 'workers'), [(64, 2, 8), (64, 16, 4), (3, 1, 3), (2, 4, 1)])
def test_c4_takes_no_more_workers_than_cores(world, monkeypatch, cores, ranks, workers):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(dist, 'get_local_world_size', lambda: ranks)
    spec = data.c4('train', 2, data_dir=world / 'text', tokenizer=str(world / 'vocab.txt'))
    assert spec.dataloader.num_workers == workers


def test_c4_never_evaluates_on_what_it_trains_on(world):
    options = {'data_dir': world / 'text', 'tokenizer': str(world / 'vocab.txt')}
    assert data.c4('train', 2, num_workers=0, **options)
    todo = 'put one there, or take another eval_data, or none'
    with pytest.raises(FileNotFoundError, match=f"/text has 'validation' in its name: {todo}$"):
        data.c4('validation', 2, **options)


def test_python_docs():
    parts = {}
    for split in ('train', 'validation'):
        spec = data.python_docs(split, 8, tokenizer=DOCS, drop_last=False, max_length=512)
        tokenizer = spec.dataloader.dataset.tokenizer
        parts[split] = {tokenizer.decode(sample) for sample in samples_of(spec)}
        assert len(parts[split]) == spec.num_samples
    assert not parts['train'] & parts['validation']
    total = sum(map(len, parts.values()))
    assert total > 800
    assert len(parts['validation']) / total == pytest.approx(0.1, abs=0.04)
    text = ' '.join(text for part in parts.values() for text in part)
    assert 150_000 < len(text) < 600_000
    assert not re.search(r'::=|> > >|\* \* \* \* \*', text)
    packed = data.python_docs('train', 8, tokenizer=DOCS, pack=True)
    assert sum(batch['attention_mask'].sum() < batch['attention_mask'].numel() for batch in packed.dataloader) <= 1


def test_learns():
    """The loss falls on real English, from the documents that come with Python."""
    spec = data.python_docs('train', 32, tokenizer=DOCS, max_length=32, pack=True)
    model = tiny_bert(spec.dataloader.dataset.tokenizer, dropout=0.0)
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        optimizers=torch.optim.Adam(model.parameters(), lr=3e-3),
        max_duration='60ba',
        seed=0,
        progress_bar=False,
        device='cpu',
    )
    trainer.fit()
    loss = float(trainer.state.loss)
    trainer.close()
    assert loss < 6.2  # of 6.9 for all words alike


def test_the_dictionary():
    path = shared_data('text') / 'dictionary_validation.txt.gz'
    vocabulary = str(shared_data('text') / 'bert_uncased_vocab.txt')
    train_part, part = (data.text(s, 16, path=path, tokenizer=vocabulary, holdout=0.1) for s in ('train', 'validation'))
    assert train_part.num_samples + part.num_samples > 2000
    batch = next(iter(part.dataloader))
    assert (batch['input_ids'] != part.dataloader.dataset.tokenizer.unk_token_id).float().mean() > 0.99
