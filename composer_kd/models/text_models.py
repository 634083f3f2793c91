"""Text models: masked language models, and classifiers of texts and pairs of texts."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from composer.metrics import BinaryF1Score
from composer.models import HuggingFaceModel
from torchmetrics import Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import MulticlassAccuracy
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from composer_kd.download import downloading
from composer_kd.models.masked_lm import MaskedLM
from composer_kd.models.matthews import MatthewsCorrCoef
from composer_kd.models.pretrained import build_network, every_kth_layer, new_config, read_pretrained, update_config
from composer_kd.tokenization import Tokenizer, load_tokenizer

MetricName = Literal['accuracy', 'f1', 'matthews', 'pearson', 'spearman']

_OF_CLASSES: dict[str, Callable[[int], Metric]] = {
    'accuracy': lambda classes: MulticlassAccuracy(num_classes=classes, average='micro'),
    'f1': lambda classes: BinaryF1Score(),
    'matthews': MatthewsCorrCoef,
}
_OF_GRADES: dict[str, Callable[[], Metric]] = {'pearson': PearsonCorrCoef, 'spearman': SpearmanCorrCoef}


class TextClassifier(HuggingFaceModel):
    """A network of Hugging Face that classifies texts, or grades them where it has one output alone.

    Args:
        network: the network.
        tokenizer: its tokenizer, which is kept in checkpoints.
        metrics: what evaluation measures.
    """

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, metrics: Sequence[Metric]):
        super().__init__(network, tokenizer, use_logits=True, eval_metrics=metrics)
        self.num_classes: int = network.config.num_labels

    def eval_forward(self, batch: Any, outputs: Any = None) -> torch.Tensor:
        """Logits (batch, num_classes), or grades (batch,), in float32 whatever the precision of the network."""
        said: Any = super().eval_forward(batch, outputs)
        return said.float()


def masked_lm(
    pretrained: str | None = None,
    config: dict[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    every_kth_layer: int | None = None,
    chunk_size: int | None = 256,
) -> MaskedLM:
    """A masked language model of Hugging Face's: BERT, DistilBERT, RoBERTa, ...

    Args:
        pretrained: a trained one to go on with: a Composer checkpoint or the folder of a run (`runs/bert`), a folder of
            `from_pretrained`, or a name on the Hugging Face hub (`bert-base-uncased`). Its config, its weights and its
            tokenizer are taken. Default: None, a network that has learned nothing yet.
        config: values of Hugging Face's config. Without `pretrained`, they describe the network: `model_type` is `bert`
            unless given, `vocab_size` and `pad_token_id` are the tokenizer's. With it, they may change whatever leaves
            the weights their shapes, such as `hidden_dropout_prob`. Default: None, those of the pretrained network, or
            of BERT-base.
        tokenizer: see `composer_kd.tokenization.load_tokenizer`. Default: None, that of `pretrained`.
        every_kth_layer: keep the layers 0, k, 2k, ... alone: a student of half the depth starts from its teacher by
            `pretrained` and 2, as DistilBERT does. Default: None, all.
        chunk_size: positions whose logits are alive at once, see `MaskedLM`. Default: 256.

    Raises:
        ValueError: an argument is unknown or out of range, or the config is not that of the weights.
        OSError: `pretrained` is not to be had.
        CheckpointError: `pretrained` is a file that cannot be used.
    """
    network, words = _build(AutoModelForMaskedLM, pretrained, config, tokenizer, every_kth_layer)
    return MaskedLM(network, words, chunk_size=chunk_size)


def text_classifier(
    pretrained: str | None = None,
    config: dict[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    num_labels: int = 2,
    metrics: Sequence[MetricName] | None = None,
    every_kth_layer: int | None = None,
) -> TextClassifier:
    """A classifier of texts, or pairs of texts, made of an encoder of Hugging Face's and a head.

    The head is new, drawn from torch's global random state, unless `pretrained` has one of the same shape.

    Args:
        pretrained: a trained encoder, language model or classifier, as in `masked_lm`. Default: None, a network that
            has learned nothing yet.
        config: as in `masked_lm`.
        tokenizer: as in `masked_lm`.
        num_labels: number of classes; with 1 the network grades texts, and learns by mean squared error. Default: 2.
        metrics: what evaluation measures: `accuracy`, `f1` (of class 1 of two), `matthews` for classes; `pearson`,
            `spearman` for grades. Default: None, the accuracy, or both correlations.
        every_kth_layer: as in `masked_lm`.

    Raises:
        ValueError: as `masked_lm`, or a metric is not for that number of labels.
        OSError: as `masked_lm`.
        CheckpointError: as `masked_lm`.
    """
    if num_labels < 1:
        raise ValueError(f'num_labels must be 1 or more, not {num_labels}')
    measured = _metrics(num_labels, metrics)
    labels = {
        'num_labels': num_labels,
        'problem_type': 'regression' if num_labels == 1 else 'single_label_classification',
    }
    network, words = _build(
        AutoModelForSequenceClassification, pretrained, config, tokenizer, every_kth_layer, labels, new_head=True
    )
    return TextClassifier(network, words, measured)


def _metrics(num_labels: int, names: Sequence[MetricName] | None) -> list[Metric]:
    known = _OF_GRADES if num_labels == 1 else _OF_CLASSES
    if names is None:
        names = ('pearson', 'spearman') if num_labels == 1 else ('accuracy',)
    for name in names:
        if name not in known or (name == 'f1' and num_labels != 2):
            raise ValueError(f'metrics: {name!r} is not for num_labels={num_labels}; there are: {", ".join(known)}')
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Metric `SpearmanCorrcoef` will save all targets')  # which are a few thousand
        return [_OF_GRADES[name]() if num_labels == 1 else _OF_CLASSES[name](num_labels) for name in names]


def _build(
    auto: Any,
    pretrained: str | None,
    config: dict[str, Any] | None,
    tokenizer: Tokenizer | None,
    layers: int | None,
    labels: dict[str, Any] | None = None,
    new_head: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The network and its tokenizer."""
    source = tokenizer if tokenizer is not None else pretrained
    if source is None:
        raise ValueError('a new network needs a `tokenizer`, and a trained one is given by `pretrained`')
    trained = None if pretrained is None else read_pretrained(pretrained)
    with downloading(isinstance(source, str) and not Path(source).exists()):
        words = load_tokenizer(source)
    if trained is None:
        values = {'vocab_size': len(words), 'pad_token_id': words.pad_token_id}
        settings = new_config({**{k: v for k, v in values.items() if v is not None}, **(config or {})})
    else:
        settings = trained.config
        update_config(settings, config or {})
    for name, value in (labels or {}).items():
        setattr(settings, name, value)
    if len(words) > settings.vocab_size:
        raise ValueError(f'the tokenizer has {len(words)} words, the network {settings.vocab_size} (config.vocab_size)')
    network = build_network(auto, settings, trained, new_head=new_head)
    return (network if layers is None else every_kth_layer(network, layers)), words
