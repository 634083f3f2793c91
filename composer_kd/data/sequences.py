"""From documents to sequences of token ids."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from composer_kd.tokenization import TextEncoder


class Tokens(NamedTuple):
    """Token ids, and where the first that is not special came from."""

    document: int
    offset: int
    ids: np.ndarray


class Sequences:
    """Cuts documents into sequences: `[CLS] tokens [SEP]`.

    One with special tokens alone, as [UNK] is too, has nothing to predict and is left out.

    Args:
        tokenizer: splits text into tokens.
        max_length: tokens in a sequence at most, [CLS] and [SEP] included.
        pack: whether documents, joined by [SEP], fill one sequence after another, of which the last alone is shorter;
            otherwise a document is a sequence, and what is too long is cut off.

    Raises:
        ValueError: `max_length` leaves no room for a token, or the tokenizer has no [CLS] or the like.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int, pack: bool):
        if max_length < 3:
            raise ValueError(
                f'max_length={max_length} leaves no room for a token between [CLS] and [SEP]: take 3 or more'
            )
        if missing := [name for name in ('cls', 'sep', 'pad', 'mask') if getattr(tokenizer, f'{name}_token') is None]:
            raise ValueError(
                f'the tokenizer {tokenizer.name_or_path!r} has no {" and no ".join(missing)} token, which masked '
                'language modelling needs: take one made for BERT'
            )
        self.room = max_length - 2
        self.pack = pack
        self.first, self.separator = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.special = frozenset(tokenizer.all_special_ids)
        self.encode = TextEncoder(tokenizer)

    def __call__(self, documents: Iterable[tuple[int, str]], offset: int = 0) -> Iterator[Tokens]:
        """Cut numbered documents into sequences.

        Args:
            documents: numbers and texts.
            offset: tokens of the first document to leave out. Default: 0.
        """
        bodies = self._packed(documents, offset) if self.pack else self._cut(documents)
        for start, body in bodies:
            if not self.special.issuperset(body):
                yield Tokens(*start, np.array([self.first, *body, self.separator], dtype=np.int32))

    def _cut(self, documents: Iterable[tuple[int, str]]) -> Iterator[tuple[tuple[int, int], list[int]]]:
        for document, text in documents:
            yield (document, 0), self.encode(text)[: self.room]

    def _packed(self, documents: Iterable[tuple[int, str]], offset: int) -> Iterator[tuple[tuple[int, int], list[int]]]:
        start, body = (0, 0), []
        for document, text in documents:
            tokens = self.encode(text)
            while offset < len(tokens):
                if not body:
                    start = document, offset
                taken = tokens[offset : offset + self.room - len(body)]
                offset += len(taken)
                body += taken
                if offset == len(tokens) and len(body) < self.room:
                    body.append(self.separator)
                if len(body) == self.room:
                    yield start, body
                    body = []
            offset = 0
        if body:
            yield start, body[:-1]
