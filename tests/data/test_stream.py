import itertools
import re
from pathlib import Path

import pytest
import torch
from composer import Trainer
from composer.utils import dist

from composer_kd import data
from composer_kd.checkpoints import read_checkpoint
from composer_kd.data.text_files import TextError
from helpers import on_two_ranks
from text_runs import digest, stream, tiny_bert, train, unmasked, write_shards, write_vocabulary

SIZES = [9, 14, 5, 11]
EVEN = [25, 25, 25, 25]
SPECIAL = (2, 3)


@pytest.fixture
def world(tmp_path):
    write_vocabulary(tmp_path)
    write_shards(tmp_path / 'text', SIZES)
    return tmp_path


def take(spec, batches):
    """Batches as a Trainer takes them."""
    return [spec.batch_transforms(batch) for batch in itertools.islice(spec.dataloader, batches)]


def pass_samples(spec, number=0):
    """The samples of one pass of the one stream of this rank."""
    rest = itertools.dropwhile(lambda item: item[1][0] < number, spec.dataloader.dataset)
    return [sample for sample, _ in itertools.takewhile(lambda item: item[1][0] == number, rest)]


def originals(samples):
    return [tuple(sample.ids.tolist()) for sample in samples]


def as_rank(monkeypatch, rank, ranks):
    monkeypatch.setattr(dist, 'get_world_size', lambda: ranks)
    monkeypatch.setattr(dist, 'get_global_rank', lambda: rank)


@pytest.mark.parametrize('pack', [False, True])
@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('stop', [3, 11])
def test_resume_is_exact(world, num_workers, pack, stop):
    """Stopped within a block, a packed shard, and the first pass or the second, a run goes on to the bit."""
    options = {'num_workers': num_workers, 'pack': pack}
    straight, watch = train(stream(world, **options), '14ba')
    folder = str(world / 'run')
    _, first = train(
        stream(world, **options), f'{stop}ba', save_folder=folder, save_interval=f'{stop}ba', save_filename='stop.pt'
    )
    resumed, second = train(stream(world, **options), '14ba', load_path=f'{folder}/stop.pt')
    assert len(second.batches) == 14 - stop
    assert first.samples + second.samples == watch.samples
    for batch, again in zip(watch.batches, first.batches + second.batches, strict=True):
        assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert digest(straight) == digest(resumed)
    assert read_checkpoint(f'{folder}/stop.pt')['state']['dataset_state']['train']['turn'] == stop % max(num_workers, 1)


RUNS = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from text_runs import digest, stream, train

for number, options in enumerate([dict(num_workers=0, pack=True), dict(num_workers=2, pack=False)]):
    run = lambda until, **more: train(stream(Path(), batch_size=4, **options), until, **more)
    straight, watch = run('9ba')
    _, first = run('5ba', save_folder='run', save_interval='5ba', save_filename=f'{{number}}.pt')
    resumed, second = run('9ba', load_path=f'run/{{number}}.pt')
    assert first.samples + second.samples == watch.samples
    assert digest(straight) == digest(resumed)
    print(digest(resumed), watch.samples, sep='@')
"""


def test_resume_is_exact_on_two_ranks(world):
    write_shards(world / 'text', EVEN)
    said = on_two_ranks(RUNS.format(tests=str(Path(__file__).parents[1])), world)
    for number in range(2):
        (weights, samples), (other_weights, other_samples) = (ranks.splitlines()[number].split('@') for ranks in said)
        assert weights == other_weights
        samples = eval(samples) + eval(other_samples)
        assert len(samples) == len(set(samples)) == 36  # of 100 in the first pass


@pytest.mark.parametrize('pack', [False, True])
@pytest.mark.parametrize(('streams', 'sizes'), [(1, SIZES), (2, EVEN), (4, EVEN), (2, SIZES), (3, EVEN), (7, SIZES)])
def test_streams_are_disjoint_and_complete(world, monkeypatch, streams, sizes, pack):
    """Whether they have shards of their own (2 and 4 streams of 4 even shards) or every n-th document."""
    write_shards(world / 'text', sizes)
    documents = originals(pass_samples(stream(world, shuffle=False, max_length=30)))
    parts = []
    for rank in range(streams):
        as_rank(monkeypatch, rank, streams)
        for number in (0, 1):
            parts.append(originals(pass_samples(stream(world, batch_size=streams, max_length=30, pack=pack), number)))
            assert parts[-1]
    for number in (0, 1):
        samples = [sample for part in parts[number::2] for sample in part]
        assert len(samples) == len(set(samples))
        if pack:
            words = sorted(word for sample in samples for word in sample if word not in SPECIAL)
            assert words == sorted(word for sample in documents for word in sample if word not in SPECIAL)
        else:
            assert sorted(samples) == sorted(documents)


def test_workers_share_the_text(world):
    """Two workers take turns; dealt out by documents, each has half of them."""
    write_shards(world / 'text', [40])
    batches = take(stream(world, batch_size=1, num_workers=2), 40)
    seen = [sample for batch in batches for sample in unmasked(batch)]
    assert sorted(seen) == sorted(originals(pass_samples(stream(world))))


def test_a_sample_and_its_masks_do_not_depend_on_the_streams(world, monkeypatch):
    write_shards(world / 'text', EVEN)

    def masks(ranks):
        found = {}
        for rank in range(ranks):
            as_rank(monkeypatch, rank, ranks)
            spec = stream(world, batch_size=2 * ranks, pack=True)
            samples = pass_samples(spec)
            batch = spec.dataloader.collate_fn.masked_batch(samples)
            for sample, labels in zip(unmasked(batch), batch['labels'].tolist(), strict=True):
                found[sample] = labels[: len(sample)]
        return found

    assert masks(1) == masks(2) == masks(4)


def test_every_pass_has_another_order_and_other_masks(world):
    spec = stream(world)
    first, second = pass_samples(spec), pass_samples(spec, 1)
    assert originals(first) != originals(second)
    assert sorted(originals(first)) == sorted(originals(second))
    again = {sample.where: sample for sample in second}
    pairs = [(sample, again[sample.where]) for sample in first]
    one, other = (spec.dataloader.collate_fn.masked_batch([pair[i] for pair in pairs]) for i in range(2))
    assert not torch.equal(one['labels'], other['labels'])


def test_shuffles_within_blocks(world):
    in_order = originals(pass_samples(stream(world, shuffle=False)))
    assert originals(pass_samples(stream(world, shuffle=False), 1)) == in_order
    whole = originals(pass_samples(stream(world, shuffle_buffer=1000)))
    other_seed = originals(pass_samples(stream(world, shuffle_buffer=1000, shuffle_seed=1)))
    assert sorted(whole) == sorted(other_seed) == sorted(in_order)
    assert len({tuple(order) for order in (in_order, whole, other_seed)}) == 3
    # A block of seven are seven neighbours in their files, but for where two of these meet.
    spec = stream(world, shuffle_buffer=7)
    order = [sample.where[:2] for sample in pass_samples(spec)]
    shards = list(dict.fromkeys(shard for shard, _ in sorted(order, key=order.index)))
    read = [(shard, document) for shard in shards for document in range(SIZES[shard])]
    assert sorted(read) == sorted(order)
    for start in range(0, len(order), 7):
        assert len({shard for shard, _ in order[start : start + 7]}) <= 3


def test_draws_no_random_numbers_of_the_run(world):
    for num_workers in (0, 2):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        take(stream(world, num_workers=num_workers), 5)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_goes_on_behind_what_was_used(world, num_workers):
    straight = take(stream(world, num_workers=num_workers), 9)
    spec = stream(world, num_workers=num_workers)
    for _ in range(2):  # whoever only looks uses nothing
        looked = list(itertools.islice(spec.dataloader, 3))
        assert all(torch.equal(a['input_ids'], b['input_ids']) for a, b in zip(looked, straight))
    parts = take(spec, 3) + take(spec, 1)
    again = stream(world, num_workers=num_workers)
    again.dataloader.dataset.load_state_dict(spec.dataloader.dataset.state_dict(12, True))
    parts += take(again, 2) + take(again, 3)
    assert all(torch.equal(a['input_ids'], b['input_ids']) for a, b in zip(straight, parts, strict=True))


@pytest.mark.parametrize('pack', [False, True])
def test_goes_on_exactly_past_text_of_unknown_words(world, pack):
    for part in range(3):
        (world / 'text' / f'part-{part:02d}-unknown.txt').write_text('! ! !\n! ! w1\n' * 9 + '! ! !\n' * 9)
    options = {'shuffle_buffer': 3, 'batch_size': 2, 'pack': pack}
    straight = [sample for batch in take(stream(world, **options), 20) for sample in unmasked(batch)]
    assert all(set(sample) - {1, 2, 3} for sample in straight)
    for stop in range(1, 20, 3):
        spec, again = stream(world, **options), stream(world, **options)
        parts = take(spec, stop)
        again.dataloader.dataset.load_state_dict(spec.dataloader.dataset.state_dict(2 * stop, True))
        assert [sample for batch in parts + take(again, 20 - stop) for sample in unmasked(batch)] == straight


@pytest.mark.parametrize('num_workers', [0, 2])
def test_an_epoch_may_end(world, num_workers):
    """As `train_subset_num_batches` makes it; and a new epoch goes on with the text."""
    _, watch = train(stream(world, num_workers=num_workers), '9ba')
    _, epochs = train(stream(world, num_workers=num_workers), '3ep', train_subset_num_batches=3)
    assert epochs.samples == watch.samples


@pytest.mark.parametrize('epoch', [-1, 3])
@pytest.mark.parametrize('load', [False, True])
@pytest.mark.parametrize('num_workers', [0, 2])
def test_fit_twice_is_fit_once(world, num_workers, epoch, load):
    save = {'save_folder': str(world / 'run'), 'save_interval': '2ba', 'save_filename': 'stop.pt'}
    straight, _ = train(stream(world, num_workers=num_workers), '7ba')
    train(stream(world, num_workers=num_workers), '2ba', **save)
    spec = stream(world, num_workers=num_workers)
    model = tiny_bert(spec.dataloader.dataset.tokenizer)
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        seed=3,
        progress_bar=False,
        device='cpu',
        load_path=str(world / 'run' / 'stop.pt') if load else None,
        train_subset_num_batches=epoch,
    )
    trainer.fit(duration='2ba' if load else '4ba')
    trainer.fit(duration='3ba')
    trainer.close()
    assert digest(straight) == digest(model.state_dict())


@pytest.mark.parametrize('num_workers', [0, 2])
def test_resume_is_exact_with_evaluation_in_between(world, num_workers):
    write_shards(world / 'validation', [8])

    def run(until, **options):
        evaluation = data.text(
            'validation',
            4,
            path=world / 'validation',
            tokenizer=str(world / 'vocab.txt'),
            max_length=10,
            num_workers=num_workers,
        )
        return train(
            stream(world, num_workers=num_workers), until, eval_dataloader=evaluation, eval_interval='2ba', **options
        )

    straight, _ = run('8ba')
    run('4ba', save_folder=str(world / 'run'), save_interval='4ba', save_filename='stop.pt')
    resumed, _ = run('8ba', load_path=str(world / 'run' / 'stop.pt'))
    assert digest(straight) == digest(resumed)


@pytest.mark.parametrize(
    ('change', 'what'),
    [
        ({'num_workers': 0}, 'num_workers=2, not 1'),
        ({'max_length': 11}, 'max_length=10, not 11'),
        ({'pack': True}, 'pack=False, not True'),
        ({'shuffle_seed': 1}, 'shuffle_seed=0, not 1'),
        ({'shuffle_buffer': 8}, 'shuffle_buffer=7, not 8'),
        ({'mask_seed': 1}, 'mask_seed=0, not 1'),
        ({'masking_probability': 0.3}, 'masking_probability=0.15, not 0.3'),
        ({'whole_word_masking': True}, 'whole_word_masking=False, not True'),
        ({'text_key': 'content'}, 'other text_key'),
        ({'on_error': 'skip'}, 'other on_error'),
    ],
)
def test_another_stream_is_refused(world, change, what):
    state = stream(world, num_workers=2).dataloader.dataset.state_dict(0, True)
    stream(world, num_workers=2).dataloader.dataset.load_state_dict(state)
    with pytest.raises(ValueError, match=re.escape(f'in a stream of text with {what}: go on with')):
        stream(world, **{'num_workers': 2, **change}).dataloader.dataset.load_state_dict(state)


def test_other_ranks_files_and_tokenizers_are_refused(world, monkeypatch):
    state = stream(world).dataloader.dataset.state_dict(0, True)
    vocabulary = world / 'vocab.txt'
    words = vocabulary.read_text()
    vocabulary.write_text(words.replace('w17', 'v17'))
    with pytest.raises(ValueError, match='other tokens'):
        stream(world).dataloader.dataset.load_state_dict(state)
    vocabulary.write_text(words)
    (world / 'text' / 'part-02.json.gz').rename(world / 'text' / 'part-09.json.gz')
    with pytest.raises(ValueError, match='other files'):
        stream(world).dataloader.dataset.load_state_dict(state)
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(ValueError, match='ranks=1, not 2'):
        stream(world).dataloader.dataset.load_state_dict(state)


def test_a_checkpoint_of_other_data_is_refused(world):
    spec = data.text('train', 4, path=world / 'text', tokenizer=str(world / 'vocab.txt'), max_length=10)
    train(spec, '2ba', save_folder=str(world / 'run'), save_interval='2ba', save_filename='stop.pt')
    with pytest.raises(ValueError, match='the checkpoint does not say how far its run had read'):
        train(stream(world), '4ba', load_path=str(world / 'run' / 'stop.pt'))


@pytest.mark.parametrize('num_workers', [0, 2])
def test_an_error_is_one_line_in_its_turn(world, num_workers):
    with (world / 'text' / 'part-04.json').open('w') as file:
        file.write('{"text": "w1"}\n' * 3 + 'no JSON\n')
    with pytest.raises(TextError) as caught:
        take(stream(world, num_workers=num_workers), 100)
    assert re.fullmatch(
        r'\S+part-04.json, line 4: not JSON \(.*\); repair it, or set on_error=skip .*', str(caught.value)
    )
    (world / 'text' / 'part-04.json').write_text('')
    with pytest.raises(TextError, match=r'part-04\.json has no text in it: remove it'):
        take(stream(world, num_workers=num_workers), 100)


def test_a_loader_without_its_spec_is_refused(world):
    with pytest.raises(RuntimeError, match='needs its whole DataSpec in the Trainer'):
        model = tiny_bert(stream(world).dataloader.dataset.tokenizer)
        trainer = Trainer(
            model=model,
            train_dataloader=stream(world).dataloader,
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
            max_duration='2ba',
            progress_bar=False,
            save_folder=str(world / 'run'),
        )
        trainer.fit()
    trainer.close()


def test_small_files_are_dealt_out_evenly(world, monkeypatch):
    """The first document of each is not always the same stream's."""
    write_shards(world / 'text', [1] * 6 + [8])
    counts = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        counts.append(len(pass_samples(stream(world, batch_size=3))))
    assert sum(counts) == 14
    assert max(counts) - min(counts) <= 1


def test_less_text_than_streams(world, monkeypatch):
    write_shards(world / 'text', [1, 1])
    as_rank(monkeypatch, 1, 3)
    with pytest.raises(TextError, match='2 files have no text left for one of 3 streams: take fewer workers'):
        take(stream(world, batch_size=3), 6)


def test_options_out_of_range(world):
    with pytest.raises(ValueError, match='shuffle_buffer must be at least 1, not 0'):
        stream(world, shuffle_buffer=0)
    with pytest.raises(ValueError, match='shuffle_seed must be from 0'):
        stream(world, shuffle_seed=-1)
    with pytest.raises(ValueError, match='batch_size=0 counts all ranks'):
        stream(world, batch_size=0)
