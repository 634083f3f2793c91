"""A recipe file and its overrides -> one plain dict that knows on which line each value stands."""

import difflib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

NAMED_SECTIONS = ('schedulers', 'algorithms', 'callbacks', 'loggers')  # mappings of a name to its arguments
SECTIONS = ('model', 'teachers', 'train_data', 'eval_data', 'optimizer', *NAMED_SECTIONS)
COMMAND_LINE = 'command line'

Key = tuple[str, ...]


class RecipeError(ValueError):
    """A recipe that cannot be run, in one line: where, what is wrong, what to do.

    Args:
        message: The line.
        exit_code: 2 for a recipe that is wrong, 1 for one whose run failed (missing data, a bad checkpoint, ...).
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(' '.join(message.split()))
        self.exit_code = exit_code


@dataclass
class Recipe:
    """One recipe: its file, its values with overrides and interpolations resolved, and where each value stands.

    Args:
        path: The file.
        config: The values.
        lines: Position of each key: a line of the file, or where the override stands that set it.
    """

    path: Path
    config: dict[str, Any]
    lines: dict[Key, int | str] = field(default_factory=dict)

    def where(self, key: Sequence[object] = ()) -> str:
        """`FILE:LINE` of a key, or of the nearest key around it; for a value that was overridden, where that was."""
        path = tuple(map(str, key))
        while path and path not in self.lines:
            path = path[:-1]
        line = self.lines.get(path, 1)
        return line if isinstance(line, str) else f'{self.path}:{line}'

    def error(self, key: Sequence[object], message: str, exit_code: int = 2) -> RecipeError:
        """The error to raise for what stands at a key."""
        name = '.'.join(map(str, key))
        return RecipeError(f'{self.where(key)}: {name + ": " if name else ""}{message}', exit_code)


def nearest(name: str, names: Collection[str]) -> str:
    """A hint that ends an error message: the name that was probably meant, or all of them."""
    close = difflib.get_close_matches(name, names, n=1)
    return f'did you mean {close[0]!r}?' if close else f'there are: {", ".join(sorted(names))}'


def load(path: str | Path, overrides: Sequence[str] = (), overridden: str | Sequence[str] = COMMAND_LINE) -> Recipe:
    """Read a recipe file, apply overrides, resolve interpolations (`${max_duration}`, `${oc.env:HOME,null}`).

    Args:
        path: The YAML file.
        overrides: Items `key.sub=value`, the value in YAML; an entry of a list is named by its index
            (`teachers.0.checkpoint=x.pt`).
        overridden: Where the overrides stand: all of them, or each.

    Raises:
        RecipeError: If the file cannot be read, is not a recipe, or an override does not fit it.
    """
    recipe = read(path, 'recipe')
    if not {'model', 'train_data', 'max_duration'} <= recipe.config.keys():
        raise _no_recipe(recipe.path)
    places = [overridden] * len(overrides) if isinstance(overridden, str) else overridden
    for override, place in zip(overrides, places, strict=True):
        _override(recipe, override, place)
    recipe.config = _interpolate(recipe)
    return recipe


def read(path: str | Path, what: str) -> Recipe:
    """Read a YAML file that is a mapping, as it stands.

    Args:
        path: The file.
        what: What errors call it.

    Raises:
        RecipeError: If it cannot be read, or is something else.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f'{path}: cannot read the {what}: {getattr(error, "strerror", None) or error}') from error
    recipe = Recipe(path, {})
    recipe.config = _parse(text, str(path), recipe.lines)
    if not isinstance(recipe.config, dict):
        raise _no_recipe(path)
    return recipe


def as_override(key: str, value: Any) -> str:
    """The override that sets a value, written plainly where that is read as the same value."""
    try:
        is_plain = isinstance(value, str) and parse_value(value) == value
    except RecipeError:
        is_plain = False
    return f'{key}={value if is_plain else json.dumps(value, ensure_ascii=False)}'


def parse_value(text: str) -> Any:
    """The value of an override.

    Raises:
        RecipeError: It is not valid YAML.
    """
    return _parse(text, COMMAND_LINE, {})


def _no_recipe(path: Path) -> RecipeError:
    needs = 'a recipe is a mapping with model, train_data and max_duration'
    return RecipeError(f'{path}:1: this is no recipe: {needs}')


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-3` is a number; dates, `yes` and `no` are text."""

    def __init__(self, text: str):
        super().__init__(text)
        self.merged: set[int] = set()  # mappings that have taken in what `<<` names


_FLOAT = re.compile(
    r'[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$'
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((':bool', ':float', ':timestamp'))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    'tag:yaml.org,2002:bool', re.compile('true$|false$|True$|False$|TRUE$|FALSE$'), list('tTfF')
)
_Loader.add_implicit_resolver('tag:yaml.org,2002:float', _FLOAT, list('-+0123456789.'))


def _parse(text: str, name: str, lines: dict[Key, int | str]) -> Any:
    """The value of a YAML text; fills `lines` with the line of every key and list entry."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _construct(loader, node, (), lines, name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f'{name}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}') from error
    except yaml.YAMLError as error:
        raise RecipeError(f'{name}:1: not valid YAML: {error}') from error
    except RecursionError as error:
        raise RecipeError(f'{name}:1: not valid YAML: an alias contains itself') from error


def _construct(loader: _Loader, node: yaml.Node, key: Key, lines: dict[Key, int | str], name: str) -> Any:
    lines.setdefault(key, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode) and node.tag == 'tag:yaml.org,2002:map':
        own: dict[str, int] = {}
        for key_node, _ in node.value if id(node) not in loader.merged else ():
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f'{name}:{line}: not valid here: a key must be a word')
            if key_node.value in own:
                at = '.'.join((*key, key_node.value))
                raise RecipeError(f'{name}:{line}: {at}: given twice, first in line {own[key_node.value]}; remove one')
            own[key_node.value] = line
        loader.flatten_mapping(node)
        loader.merged.add(id(node))
        for key_node, _ in node.value:
            lines[(*key, key_node.value)] = key_node.start_mark.line + 1
        return {k.value: _construct(loader, v, (*key, k.value), lines, name) for k, v in node.value}
    if isinstance(node, yaml.SequenceNode) and node.tag == 'tag:yaml.org,2002:seq':
        return [_construct(loader, v, (*key, str(i)), lines, name) for i, v in enumerate(node.value)]
    return loader.construct_object(node, deep=True)


def _override(recipe: Recipe, override: str, where: str) -> None:
    """Set one value in place; `where` the override stands."""
    lines = recipe.lines
    name, equals, text = override.partition('=')
    if not equals or not name:
        raise RecipeError(f'{where}: an override is written key=value, not {override!r}')
    key = tuple(name.split('.'))
    try:
        value = parse_value(text)
    except RecipeError as error:
        raise RecipeError(f'{where}: {name}: {text!r} is not valid YAML') from error
    here: Any = recipe.config
    for depth, part in enumerate(key[:-1]):
        index = _index(here, part, name, where)
        if isinstance(here, dict) and here.get(index) is None:
            section = key[0] if depth < 2 else None
            if section not in (SECTIONS if depth == 0 else NAMED_SECTIONS) or section == 'teachers':
                raise RecipeError(f'{where}: {name}: no {part!r} here; {nearest(part, here or SECTIONS)}')
            here[index] = {}
        here = here[index]
    here[_index(here, key[-1], name, where)] = value
    for known in [known for known in lines if known[: len(key)] == key]:
        del lines[known]
    lines[key] = where


def _index(here: Any, part: str, name: str, where: str) -> Any:
    """What names `part` within a mapping or a list."""
    if isinstance(here, dict):
        return part
    if not isinstance(here, list):
        raise RecipeError(f'{where}: {name}: no {part!r} in the value {here!r}')
    if not part.isdecimal() or int(part) >= len(here):
        raise RecipeError(f'{where}: {name}: no entry {part!r} in a list of {len(here)}; the first is 0')
    return int(part)


def _interpolate(recipe: Recipe) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.create(recipe.config), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = [part for part in re.split(r'[.\[\]]+', str(error.full_key or '')) if part]
        raise recipe.error(key, str(error.msg or error).splitlines()[0]) from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}
