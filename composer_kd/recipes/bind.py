"""The arguments in a recipe against the signature of what they are for."""

import functools
import inspect
import re
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

import typeguard

from composer_kd.recipes.load import Recipe, nearest
from composer_kd.recipes.resolve import Target


def bind(
    recipe: Recipe, key: tuple[object, ...], target: Target, given: object, supplied: Collection[str] = ()
) -> dict[str, Any]:
    """Check the arguments that a recipe gives to a function or class, without calling it.

    Args:
        recipe: The recipe.
        key: Where the arguments stand.
        target: What is to be called with them.
        given: A mapping of argument names to values, or None for no arguments.
        supplied: Arguments that do not come from the recipe.

    Returns:
        The arguments, lists turned into tuples where a tuple is called for.

    Raises:
        RecipeError: If an argument is unknown, missing or of a wrong type.
    """
    if not isinstance(given, Mapping | None):
        raise recipe.error(key, f'must be a mapping of arguments, not {given!r}')
    given = given or {}
    parameters = signature(target)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for name in given:
        if name in supplied:
            raise recipe.error((*key, name), 'is not for a recipe to give: it comes with the run; remove it')
        if name not in named and not open_ended:
            known = [n for n in named if n not in supplied]
            hint = nearest(name, known) if known else 'it takes no arguments'
            raise recipe.error((*key, name), f'{target.__name__} has no argument {name!r}; {hint}')
    for name, parameter in named.items():
        if name not in given and name not in supplied and _is_required(parameter):
            raise recipe.error(key, f'{target.__name__} needs the argument {name!r}; add it')
    hints = _hints(target)
    return {
        name: check_value(recipe, (*key, name), value, hints.get(name, Any), named[name].default)
        if name in named
        else value
        for name, value in given.items()
    }


def check_value(recipe: Recipe, key: tuple[object, ...], value: Any, annotation: Any, default: Any) -> Any:
    """The value, fit for a parameter of this annotation and default.

    Raises:
        RecipeError: If it is of a wrong type, or no time string where a time is called for.
    """
    if value is None and default is None:
        return value
    choices = _choices(annotation)
    candidates = [value, tuple(value)] if isinstance(value, list) else [value]
    for candidate in candidates:
        if not _is(candidate, annotation) or (isinstance(value, bool) and not {bool, Any, object} & set(choices)):
            continue
        _check_words(recipe, key, value, choices)
        return candidate
    expected = re.sub(r'\b(?:\w+\.)+', '', inspect.formatannotation(annotation).replace('NoneType', 'None'))
    raise recipe.error(key, f'must be {expected}, not {value!r}')


def signature(target: Target) -> Mapping[str, inspect.Parameter]:
    """The parameters of a callable."""
    from composer.core import Callback

    if getattr(target, '__init__', None) is Callback.__init__:
        return {}  # it takes anything, and does nothing with it
    return inspect.signature(target).parameters


def _is_required(parameter: inspect.Parameter) -> bool:
    # Optimizers of torch mark what must be given by a default value of this class.
    return parameter.default is parameter.empty or type(parameter.default).__name__ == '_RequiredParameter'


def _is(value: Any, annotation: Any) -> bool:
    try:
        typeguard.check_type(
            value,
            annotation,
            forward_ref_policy=typeguard.ForwardRefPolicy.IGNORE,
            collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS,
        )
    except typeguard.TypeCheckError:
        return False
    return True


def _choices(annotation: Any) -> list[Any]:
    """The members of a union, and of unions within; otherwise the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [choice for member in typing.get_args(annotation) for choice in _choices(member)]
    return [annotation]


def _check_words(recipe: Recipe, key: tuple[object, ...], value: Any, choices: list[Any]) -> None:
    """Check text that Composer reads as a time, or as one of a few words."""
    from composer.core import Time
    from composer.utils import StringEnum

    if isinstance(value, list):
        members = [choice for c in choices for member in typing.get_args(c) for choice in _choices(member)]
        for item in value:
            _check_words(recipe, key, item, members)
    if isinstance(value, str) and any(choice is Time or typing.get_origin(choice) is Time for choice in choices):
        try:
            Time.from_timestring(value)
        except ValueError as error:
            raise recipe.error(key, f"{value!r} is no time; write '90ep', '5000ba', '0.3dur', ...") from error
    for choice in choices:
        if isinstance(value, str) and inspect.isclass(choice) and issubclass(choice, StringEnum):
            try:
                choice(value)
            except ValueError as error:
                words = [word.value for word in choice]
                raise recipe.error(key, f'there is no {choice.__name__} {value!r}; {nearest(value, words)}') from error


@functools.lru_cache
def _hints(target: Target) -> dict[str, Any]:
    """Resolved annotations, one by one, because some name what is imported for type checkers only."""
    function = target.__init__ if inspect.isclass(target) else inspect.unwrap(target)
    hints = {}
    for name, annotation in getattr(function, '__annotations__', {}).items():
        single = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            hints |= typing.get_type_hints(single, getattr(function, '__globals__', {}))
        except Exception:  # evaluating what somebody wrote can raise anything; then any value will do
            hints[name] = Any
    return hints
