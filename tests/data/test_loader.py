import inspect
import typing

import pytest
import torch
import typeguard
from composer import Trainer
from composer.core import DataSpec, Evaluator
from composer.utils import dist

from composer_kd import data, models
from composer_kd.data.loader import LoaderOptions

TEXT = ['c4', 'glue', 'python_docs', 'text', 'text_classification']  # which need more than a split


def test_parts_are_disjoint_and_of_one_size(monkeypatch):
    """However many there are, and on however many ranks; a sample is the same one whichever part has it."""
    whole = data.digits('train', 10, views=2).dataloader
    for number, ranks in ((2, 1), (3, 2)):
        monkeypatch.setattr(dist, 'get_world_size', lambda ranks=ranks: ranks)
        seen = []
        for index in range(number):
            of_part = []
            for rank in range(ranks):
                monkeypatch.setattr(dist, 'get_global_rank', lambda rank=rank: rank)
                loader = data.digits('train', 10, part=[index, number], drop_last=False).dataloader
                of_part.append([int(key) for _ in loader for key in loader.keys[:, 0]])
            assert len({len(keys) for keys in of_part}) == 1
            seen.append({key for keys in of_part for key in keys})
            assert {key % number for key in seen[-1]} == {index}
        assert len({len(keys) for keys in seen}) == 1 and len(seen[0]) == whole.samples // number
    monkeypatch.undo()
    second = data.digits('train', 10, part=[1, 2], shuffle=False).dataloader
    images = next(iter(second))[0]
    assert torch.equal(images, torch.stack([whole.dataset[1 + 2 * place][0] for place in range(10)]))


@pytest.mark.parametrize('part', [[2, 2], [-1, 2], [0], [0, 1, 2]])
def test_parts_that_there_are_not(part):
    with pytest.raises(ValueError, match=r'part must be \[i, n\], the i-th of n parts, i from 0 to n - 1, not'):
        data.digits('train', 10, part=part)
    with pytest.raises(ValueError, match='part is for split=train'):
        data.digits('test', 10, part=[0, 2])


def labels_of(spec):
    return torch.cat([labels for _, labels in spec.dataloader])


@pytest.mark.parametrize('name', data.__all__)
def test_signature_names_every_option(name):
    build = getattr(data, name)
    signature = inspect.signature(build)
    assert build.__name__ == name
    assert list(signature.parameters)[:2] == ['split', 'batch_size']
    assert set(LoaderOptions.__annotations__) <= set(signature.parameters)
    returns = DataSpec | list[Evaluator] if name == 'glue' else DataSpec
    assert signature.return_annotation == returns
    assert typing.get_type_hints(build) == {
        **{key: parameter.annotation for key, parameter in signature.parameters.items()},
        'return': returns,
    }
    for parameter in signature.parameters.values():
        assert parameter.kind is not parameter.VAR_KEYWORD
        if parameter.default is not parameter.empty:
            typeguard.check_type(parameter.default, parameter.annotation)
    with pytest.raises(TypeError, match='shufle'):
        signature.bind_partial('train', 8, shufle=True)


def test_builders_have_the_options_of_views_that_do_something():
    images, masks = {'views', 'view_seed'}, {'views'}
    expected = {name: set() for name in data.__all__} | dict.fromkeys(['text', 'python_docs'], masks)
    expected |= dict.fromkeys(['imagenet', 'cifar10', 'cifar100', 'fashion_mnist'], images)
    assert {name: images & {*inspect.signature(getattr(data, name)).parameters} for name in data.__all__} == expected


@pytest.mark.parametrize('name', [name for name in data.__all__ if name not in TEXT])
def test_unknown_split(name):
    with pytest.raises(ValueError, match="unknown split 'validation': choose train or"):
        getattr(data, name)('validation', 8)


def test_options_reach_the_loader():
    spec = data.digits('train', 64, num_workers=2, prefetch_factor=3, persistent_workers=False, pin_memory=False)
    loader = spec.dataloader
    assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (2, 3, False)
    assert data.digits('train', 64, num_workers=2).dataloader.persistent_workers
    assert not data.digits('train', 64).dataloader.persistent_workers
    assert loader.pin_memory is False
    assert data.digits('train', 64).dataloader.pin_memory is torch.cuda.is_available()


def test_training_split_is_shuffled_anew_each_epoch():
    spec = data.digits('train', 100)
    first, again = labels_of(spec), labels_of(spec)
    spec.dataloader.sampler.set_epoch(1)
    second = labels_of(spec)
    assert len(first) == 1200  # the last 97 are no full batch
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, labels_of(data.digits('train', 100, shuffle_seed=7)))


def test_test_split_is_whole_and_in_order():
    spec = data.digits('test', 64)
    assert torch.equal(labels_of(spec), spec.dataloader.dataset.labels)
    assert spec.num_samples == 500


def test_defaults_can_be_overruled():
    spec = data.digits('train', 100, shuffle=False, drop_last=False)
    assert torch.equal(labels_of(spec), spec.dataloader.dataset.labels)
    shuffled = data.digits('test', 64, shuffle=True, drop_last=True)
    assert len(labels_of(shuffled)) == 448


def test_batch_size_is_over_all_ranks(monkeypatch):
    monkeypatch.setattr(dist, 'get_world_size', lambda: 4)
    order = []
    for rank in range(4):
        monkeypatch.setattr(dist, 'get_global_rank', lambda rank=rank: rank)
        spec = data.digits('train', 64)
        assert {len(labels) for _, labels in spec.dataloader} == {16}
        order.append(list(spec.dataloader.sampler))
    seen = [index for indices in order for index in indices]
    assert len(seen) == len(set(seen)) == 1296

    with pytest.raises(ValueError, match='batch_size=66 counts all ranks and must be a multiple of their number, 4'):
        data.digits('train', 66)


def test_less_than_one_batch():
    with pytest.raises(ValueError, match='1297 samples, which is not one batch of batch_size=2000'):
        data.digits('train', 2000)
    assert len(data.digits('train', 2000, drop_last=False).dataloader) == 1


@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('stop', ['2ba', '1ep', '6ba'])
def test_resume_is_exact(tmp_path, stop, num_workers):
    """Stopping inside or at the end of an epoch changes neither the order nor the augmentation that follows."""

    def train(max_duration, **kwargs):
        torch.manual_seed(99)
        model = models.small_convnet(in_channels=3, width=2)
        trainer = Trainer(
            model=model,
            train_dataloader=data.cifar10('train', 16, synthetic=True, subset=64, num_workers=num_workers),
            eval_dataloader=data.cifar10('test', 16, synthetic=True, subset=32),
            eval_interval='1ep',
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            max_duration=max_duration,
            seed=3,
            progress_bar=False,
            **kwargs,
        )
        trainer.fit()
        trainer.close()
        return model.state_dict()

    straight = train('8ba')
    train(stop, save_folder=str(tmp_path), save_interval=stop, save_filename='stop.pt')
    resumed = train('8ba', load_path=str(tmp_path / 'stop.pt'))
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
