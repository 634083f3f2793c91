"""A masked language model that scores only the positions that count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from composer.metrics import LanguageCrossEntropy, MaskedAccuracy
from composer.models import HuggingFaceModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from composer_kd.vocabulary import DeferredLogits, part, vocabulary_loss

# What lies between the encoder and the projection to the vocabulary, by `model_type`. Other models are asked for all of
# their logits, and those that count are picked out afterwards.
_HEADS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    'bert': lambda model: model.cls.predictions.transform,
    'distilbert': lambda model: lambda hidden: model.vocab_layer_norm(model.activation(model.vocab_transform(hidden))),
    'roberta': lambda model: lambda hidden: model.lm_head.layer_norm(F.gelu(model.lm_head.dense(hidden))),
}


class MaskedLM(HuggingFaceModel):
    """A Hugging Face model with a masked-language-modelling head, as a ComposerModel.

    Where a batch has labels, the head, the cross entropy and a distillation loss are computed at the labelled positions
    alone, about 15 % of them, and never for more than ``chunk_size`` positions at once: the same loss and gradients as
    from the logits of all positions. Logs :class:`.LanguageCrossEntropy` and :class:`.MaskedAccuracy` in evaluation.

    Args:
        model: The model, e.g. ``BertForMaskedLM``.
        tokenizer: Its tokenizer, which checkpoints keep. Default: ``None``.
        chunk_size: Labelled positions whose logits are alive at once. ``None`` computes them all inside ``forward``,
            as FSDP needs it, which gathers weights for no longer than that. Default: ``256``.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, chunk_size: int | None = 256
    ):
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f'chunk_size must be 1 or more positions, or null, not {chunk_size}')
        super().__init__(
            model,
            tokenizer,  # pyright: ignore[reportArgumentType]
            use_logits=True,
            eval_metrics=[LanguageCrossEntropy(), MaskedAccuracy()],
        )
        self.chunk_size = chunk_size
        self.num_classes: int = model.config.vocab_size

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Score a batch.

        Args:
            batch: What the network takes, and ``labels``, shape (N, L), -100 where there is none; or else
                ``positions``, shape (M,), indices into the N L flattened positions.

        Returns:
            ``logits`` of the labelled positions, shape (M, V), not computed yet if ``chunk_size`` is set; their
            ``positions``, and ``labels``, shape (M,) both. Without labels and positions, logits of shape (N, L, V).
        """
        inputs = {k: v for k, v in batch.items() if k in self.model_forward_args and k != 'labels'}
        labels, positions = batch.get('labels'), batch.get('positions')
        if positions is None:
            if labels is None:
                return {'logits': self.model(**inputs).logits}
            positions = (labels.flatten() != -100).nonzero().squeeze(1)
        outputs = {'logits': self._logits(inputs, positions), 'positions': positions}
        return outputs if labels is None else outputs | {'labels': labels.flatten()[positions]}

    def loss(self, outputs: dict[str, Any], batch: Any) -> Tensor | dict[str, Tensor]:
        """The mean cross entropy over labelled positions.

        If ``logits`` are not computed yet, ``outputs['lesson']`` may hold what :func:`.vocabulary_loss` takes of a
        teacher; then ``'label'``, ``'kd'`` and the weighted ``'total'`` come back together.
        """
        logits, labels, lesson = outputs['logits'], outputs['labels'], outputs.get('lesson')
        if isinstance(logits, DeferredLogits):
            assert self.chunk_size is not None
            losses = vocabulary_loss(student_logits=logits, labels=labels, chunk_size=self.chunk_size, **lesson or {})
            return losses if lesson else losses['total']
        return F.cross_entropy(logits, labels, reduction='sum') / max(len(labels), 1)

    def eval_forward(self, batch: Mapping[str, Any], outputs: dict[str, Any] | None = None) -> Tensor:
        """Logits of the labelled positions, shape (M, V)."""
        outputs = outputs or self.forward(batch)
        self.labels = outputs['labels']
        return part(outputs['logits'])

    def _logits(self, inputs: dict[str, Any], positions: Tensor) -> Tensor | DeferredLogits:
        network: Any = self.model
        if network.config.model_type not in _HEADS:
            return network(**inputs).logits.flatten(0, 1)[positions]
        hidden = network.base_model(**inputs).last_hidden_state.flatten(0, 1)[positions]
        hidden = _HEADS[network.config.model_type](network)(hidden)
        projection = network.get_output_embeddings()
        weight, bias = projection.weight, projection.bias
        # As views, since DDP looks for the parameters that a pass used among the ancestors of its outputs.
        logits = DeferredLogits(hidden, weight.view_as(weight), None if bias is None else bias.view_as(bias))
        return logits.part() if self.chunk_size is None else logits
