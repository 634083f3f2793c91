"""Whether a text model and the text that it is to be given go together."""

from typing import Any

from composer.models import ComposerModel, HuggingFaceModel
from composer.utils import ensure_tuple
from torch import nn

from composer_kd.tokenization import tokenizer_difference


def misfit(model: ComposerModel, data: Any, *, model_key: str = 'model', data_key: str = 'train_data') -> str | None:
    """What is wrong with giving data to a model, as far as it can be known before the first batch.

    What a data set does not say (`max_length`, `tokenizer`, `num_labels`) is not compared.

    Args:
        model: any model; one that is not of Hugging Face fits.
        data: what a builder of data returns: a `DataSpec`, or a list of evaluators; None fits.
        model_key: what a message calls the model. Default: `model`.
        data_key: what a message calls the data. Default: `train_data`.

    Returns:
        One line that names both sides; None if nothing is wrong.
    """
    if not isinstance(model, HuggingFaceModel):
        return None
    problems = (_problem(model, _dataset(part), model_key, data_key) for part in ensure_tuple(data))
    return next((problem for problem in problems if problem), None)


def _dataset(data: Any) -> Any:
    """The data set within an evaluator, a `DataSpec` or a loader."""
    while hasattr(data, 'dataloader'):
        data = data.dataloader
    return getattr(data, 'dataset', None)


def _problem(model: HuggingFaceModel, dataset: Any, model_key: str, data_key: str) -> str | None:
    longest, positions = getattr(dataset, 'max_length', None), positions_of(model.model)
    if longest is not None and positions is not None and longest > positions:
        return (
            f'{data_key}.max_length is {longest}, but {model_key} has {positions} positions '
            f'(max_position_embeddings): set {data_key}.max_length={positions}, or take a model with more'
        )
    own, given = getattr(model, 'tokenizer', None), getattr(dataset, 'tokenizer', None)
    if own is not None and given is not None and (difference := tokenizer_difference(given, own)):
        return (
            f'{data_key}.tokenizer is not the tokenizer of {model_key} ({difference}): '
            f'give {data_key} the one that {model_key} was made with'
        )
    labels, outputs = getattr(dataset, 'num_labels', None), getattr(model, 'num_classes', None)
    if labels is not None and outputs is not None and (labels > outputs or (labels == 1) != (outputs == 1)):
        return f'{data_key} has {_labels(labels)}, {model_key} {_labels(outputs)}: set {model_key}.num_labels={labels}'
    return None


def positions_of(network: nn.Module) -> int | None:
    """The longest sequence that learned positions allow; None where positions are relative or computed."""
    limits = [
        # Where one position stands for padding, as in RoBERTa, those of words begin behind it.
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        for name, table in network.named_modules()
        if name.endswith('.position_embeddings') and isinstance(table, nn.Embedding)
    ]
    return min(limits, default=None)


def _labels(count: int) -> str:
    return 'grades (num_labels=1)' if count == 1 else f'{count} classes'
