from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import composer.algorithms
import composer.callbacks
import composer.optim
import pytest
import torch
from composer import Trainer
from composer.core import Time

from composer_kd.recipes.bind import bind
from composer_kd.recipes.load import Recipe, RecipeError

if TYPE_CHECKING:
    from nowhere import Unknown  # pyright: ignore

RECIPE = Recipe(Path('x.yaml'), {})


def builder(
    number: float,
    split: Literal['train', 'test'] = 'train',
    pair: tuple[float, float] | None = None,
    size: int | None = None,
    times: list[str | Time] | None = None,
    when: int | str | Time = 0,
    names: Sequence[str] = (),
    choose: Callable[[], int] | None = None,
    unknown: Unknown = None,
    bare=None,
):
    raise AssertionError('binding must not call')


def open_ended(number: int = 1, **kwargs: Any): ...


class Plain:
    pass


GOOD = [
    (builder, {'number': 1}),
    (
        builder,
        {'number': 1.5, 'split': 'test', 'size': None, 'times': ['1ep', '0.5dur'], 'when': '10ba', 'names': ['a']},
    ),
    (builder, {'number': 1, 'when': 3, 'unknown': [1], 'bare': {'a': 1}}),
    (open_ended, {'number': 3, 'anything': [1]}),
    (Plain, None),
    (Plain, {}),
    (composer.callbacks.LRMonitor, None),
    (composer.algorithms.EMA, {'half_life': '100ba', 'update_interval': '20ba'}),
    (composer.optim.CosineAnnealingWithWarmupScheduler, {'t_warmup': '1ep', 'alpha_f': 0}),
]


@pytest.mark.parametrize(('target', 'given'), GOOD)
def test_good_arguments_are_as_they_were(target, given):
    assert bind(RECIPE, ('key',), target, given) == (given or {})


def test_a_list_becomes_a_tuple_where_one_is_wanted():
    assert bind(RECIPE, (), builder, {'number': 1, 'pair': [1, 2]})['pair'] == (1, 2)
    arguments = bind(RECIPE, (), composer.optim.DecoupledAdamW, {'lr': 1e-3, 'betas': [0.9, 0.98]}, {'params'})
    assert arguments['betas'] == (0.9, 0.98)


@pytest.mark.parametrize(
    ('target', 'given', 'message'),
    [
        (builder, {'numbr': 1}, "key.numbr: builder has no argument 'numbr'; did you mean 'number'?"),
        (builder, {}, "key: builder needs the argument 'number'; add it"),
        (builder, None, "key: builder needs the argument 'number'; add it"),
        (builder, [1], 'key: must be a mapping of arguments, not [1]'),
        (builder, False, 'key: must be a mapping of arguments, not False'),
        (builder, {'number': 'many'}, "key.number: must be float, not 'many'"),
        (builder, {'number': True}, 'key.number: must be float, not True'),
        (builder, {'number': None}, 'key.number: must be float, not None'),
        (builder, {'number': 1, 'size': 1.5}, 'key.size: must be int | None, not 1.5'),
        (builder, {'number': 1, 'split': 'val'}, "key.split: must be Literal['train', 'test'], not 'val'"),
        (builder, {'number': 1, 'pair': [1]}, 'key.pair: must be tuple[float, float] | None, not [1]'),
        (builder, {'number': 1, 'names': [1]}, 'key.names: must be Sequence[str], not [1]'),
        (builder, {'number': 1, 'when': 'soon'}, "key.when: 'soon' is no time; write '90ep', '5000ba', '0.3dur', ..."),
        (
            builder,
            {'number': 1, 'times': ['1ep', '2x']},
            "key.times: '2x' is no time; write '90ep', '5000ba', '0.3dur',",
        ),
        (builder, {'number': 1, 'choose': 'random'}, "key.choose: must be Callable[[], int] | None, not 'random'"),
        (open_ended, {'number': 'x'}, "key.number: must be int, not 'x'"),
        (Plain, {'x': 1}, "key.x: Plain has no argument 'x'; it takes no arguments"),
        (composer.callbacks.NaNMonitor, {'x': 1}, "key.x: NaNMonitor has no argument 'x'; it takes no arguments"),
        (composer.optim.StepScheduler, {'step_size': '1epp'}, "key.step_size: '1epp' is no time; "),
        (
            Trainer,
            {'precision': 'amp_bf61'},
            "key.precision: there is no Precision 'amp_bf61'; did you mean 'amp_bf16'?",
        ),
    ],
)
def test_bad_arguments(target, given, message):
    with pytest.raises(RecipeError) as error:
        bind(RECIPE, ('key',), target, given, {'model'})
    assert str(error.value).startswith(f'x.yaml:1: {message}')


def test_what_the_run_supplies_is_not_for_the_recipe():
    with pytest.raises(RecipeError, match=r'key.params: is not for a recipe to give'):
        bind(RECIPE, ('key',), torch.optim.SGD, {'lr': 1, 'params': []}, {'params'})


@pytest.mark.parametrize('optimizer', [composer.optim.DecoupledSGDW, composer.optim.DecoupledAdamW])
def test_required_argument_of_an_optimizer_of_old(optimizer):
    if 'required' in repr(optimizer.__init__.__defaults__):
        with pytest.raises(RecipeError, match="needs the argument 'lr'"):
            bind(RECIPE, ('key',), optimizer, {}, {'params'})
    else:
        assert bind(RECIPE, ('key',), optimizer, {}, {'params'}) == {}
