"""Networks of Hugging Face: new ones by their config, trained ones from the hub, a folder, or a Composer checkpoint."""

import contextlib
import copy
import difflib
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from composer_kd.checkpoints import CheckpointError, find_checkpoint, read_checkpoint
from composer_kd.download import downloading

_LAYER = re.compile(r'(\D*\.)(\d+)(\..+)')
_HUB_NAME = re.compile(r'[\w.-]+(/[\w.-]+)?')
_NOT_TAKEN = ('auto_map', 'attn_implementation', 'quantization_config')  # by which a file would choose code to run
_PREFIX = 'model.'  # what HuggingFaceModel puts before the keys of its network


@dataclass
class Pretrained:
    """A trained network, before it is built.

    Args:
        source: where it comes from.
        config: its config, which may be changed where no weight changes its shape.
        weights: its weights by name; None if they are still at the source.
    """

    source: str
    config: PretrainedConfig
    weights: dict[str, torch.Tensor] | None = None


def read_pretrained(source: str | Path) -> Pretrained:
    """Find a trained network.

    Args:
        source: a Composer checkpoint or the folder of a run, a folder of `from_pretrained`, or a name on the hub.

    Raises:
        CheckpointError: the checkpoint is damaged, or holds no network of Hugging Face.
        OSError: there is nothing of that name.
    """
    checkpoint = find_checkpoint(source)
    if checkpoint is not None:
        return _read_composer(checkpoint)
    if not Path(source).exists() and (not _HUB_NAME.fullmatch(str(source)) or Path(source).suffix == '.pt'):
        raise FileNotFoundError(f'{source}: no such file or folder')
    with _from_hugging_face(source):
        return Pretrained(str(source), AutoConfig.from_pretrained(source, trust_remote_code=False))


def new_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """The config of an untrained network.

    Args:
        values: Hugging Face's config values; `model_type` says of which kind, `bert` unless given.

    Raises:
        ValueError: a value is unknown, or of a wrong type.
    """
    values = dict(values)
    model_type = values.pop('model_type', 'bert')
    if model_type not in CONFIG_MAPPING:
        hint = _nearest(str(model_type), list(CONFIG_MAPPING.keys()))
        raise ValueError(f'config: there is no model_type {model_type!r}; {hint}')
    update_config(CONFIG_MAPPING[model_type](), values)
    return CONFIG_MAPPING[model_type](**values)  # anew, since some values follow from others


def update_config(config: PretrainedConfig, values: Mapping[str, Any]) -> None:
    """Change values that a config has.

    Raises:
        ValueError: a value is unknown, or of a wrong type.
    """
    own = inspect.signature(type(config)).parameters.values()
    known = [*(p.name for p in own if p.kind is not p.VAR_KEYWORD), *config.attribute_map]
    for name, value in values.items():
        if name not in known:
            raise ValueError(f'config: {config.model_type} has no {name!r}; {_nearest(name, known)}')
        has = getattr(config, name, None)
        wanted = (int, float) if isinstance(has, float) else type(has)
        is_wrong = isinstance(value, bool) != isinstance(has, bool) or not isinstance(value, wanted)
        if has is not None and is_wrong:
            raise ValueError(f'config: {name} must be like {has!r}, not {value!r}')
        setattr(config, name, value)


def build_network(
    auto: Any, config: PretrainedConfig, pretrained: Pretrained | None = None, *, new_head: bool = False
) -> PreTrainedModel:
    """Build a network, with new weights or trained ones.

    New weights are drawn from torch's global random state.

    Args:
        auto: the class of `transformers.AutoModelFor...` that says what it is for.
        config: its config.
        pretrained: where its weights come from. Default: None, they are new.
        new_head: whether what stands on top of the encoder may be new; what fits is taken. Default: False.

    Raises:
        ValueError: there is no such network, or the weights are not those of the config.
        OSError: the weights cannot be read.
    """
    if pretrained is None:
        return _from_config(auto, config)
    kind = type(_outline(auto, config))
    from_where = None if pretrained.weights is not None else pretrained.source
    with _from_hugging_face(pretrained.source), _quiet():
        network, info = kind.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            from_where,
            config=config,
            state_dict=pretrained.weights,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # of which _check_loaded says more
            trust_remote_code=False,
        )
    _check_loaded(network, info, pretrained.source, new_head)
    return network


def names_of_weights(auto: Any, config: PretrainedConfig) -> set[str]:
    """The names of the weights that a network has; none if there is no such network."""
    return {*_outline(auto, config).state_dict()} if type(config) in auto._model_mapping else set()


def every_kth_layer(network: PreTrainedModel, k: int) -> PreTrainedModel:
    """A network of the layers 0, k, 2k, ... of `network`, and of all else that it has.

    Raises:
        ValueError: `k` is out of range, or the network has no row of layers.
    """
    count = network.config.num_hidden_layers
    if not 1 <= k <= count:
        raise ValueError(f'every_kth_layer must be from 1 to the number of layers, {count}, not {k}')
    weights = {}
    found = set()
    for key, value in network.state_dict().items():
        layer = _LAYER.fullmatch(key)
        if layer is None:
            weights[key] = value
            continue
        number = int(layer[2])
        found.add(number)
        if number % k == 0:
            weights[f'{layer[1]}{number // k}{layer[3]}'] = value
    if found != set(range(count)):
        raise ValueError(f'every_kth_layer: {network.config.model_type} has no row of {count} layers')
    config = copy.deepcopy(network.config)
    config.num_hidden_layers = len(range(0, count, k))
    with _quiet():
        return type(network).from_pretrained(None, config=config, state_dict=weights)


def _read_composer(path: Path) -> Pretrained:
    saved = read_checkpoint(path)
    try:
        state = saved['state']
        content = state['integrations']['huggingface']['model']['config']['content']
        values = {name: value for name, value in content.items() if name not in _NOT_TAKEN and name[0] != '_'}
        weights = {key.removeprefix(_PREFIX): value for key, value in state['model'].items() if key.startswith(_PREFIX)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f'{path}: holds no network of Hugging Face, so no text model') from error
    model_type = values.pop('model_type', None)
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(f'{path}: holds a network of a kind that transformers does not know: {model_type!r}')
    return Pretrained(str(path), CONFIG_MAPPING[model_type].from_dict(values), weights)


def _outline(auto: Any, config: PretrainedConfig) -> PreTrainedModel:
    """The network without memory for its weights."""
    with torch.device('meta'):
        return _from_config(auto, config)


def _from_config(auto: Any, config: PretrainedConfig) -> PreTrainedModel:
    if type(config) not in auto._model_mapping:
        raise ValueError(f'transformers has no {auto.__name__.removeprefix("AutoModelFor")} for {config.model_type}')
    return auto.from_config(config, trust_remote_code=False)


def _check_loaded(network: PreTrainedModel, info: Mapping[str, list[str]], source: str, new_head: bool) -> None:
    """See whether all weights were taken, but for those of a head that may be new, or is of no use here."""
    prefix = f'{network.base_model_prefix}.'
    body = {name for name, _ in network.base_model.named_children()} - {'pooler'}

    def of_body(key: str) -> bool:
        return key.removeprefix(prefix).split('.')[0] in body

    for what, keys in info.items():
        is_free = what == 'unexpected_keys' or (new_head and what in ('missing_keys', 'mismatched_keys'))
        wrong = [key for key in keys if of_body(key) or not is_free]
        if wrong:
            some = ', '.join(wrong[:3]) + (f' and {len(wrong) - 3} more' if len(wrong) > 3 else '')
            problem = {
                'missing_keys': 'it has no',
                'unexpected_keys': 'the network has no place for',
                'mismatched_keys': 'of another shape there:',
            }.get(what, 'it cannot be loaded:')
            raise ValueError(f'{source} does not fit {type(network).__name__} with this config: {problem} {some}')


@contextlib.contextmanager
def _from_hugging_face(source: str | Path) -> Iterator[None]:
    """Around what loads from a folder or from the hub: one rank of a machine first, errors in one line."""
    is_local = Path(source).exists()
    try:
        with downloading(not is_local):
            yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = textwrap.shorten(str(error), 160)
        if is_local:
            raise OSError(f'{source}: is no pretrained network that can be used: {reason}') from error
        raise OSError(
            f'{source} is no file or folder here, and cannot be had from the Hugging Face hub ({reason}): '
            'give a local folder or checkpoint, or set HF_HOME to a cache that holds it'
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' advice to train a network that is about to be trained."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f'did you mean {near[0]!r}?' if near else f'there are: {", ".join(sorted(known))}'
