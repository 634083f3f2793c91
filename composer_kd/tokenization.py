"""Tokenizers: where they come from, and whether two are the same."""

import copy
import functools
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast
from typing_extensions import NotRequired, TypedDict

from composer_kd.checkpoints import CheckpointError, find_checkpoint, read_checkpoint

# A process forked from one in which this library has threads waits for them for ever, as workers of loaders would.
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

_SPECIAL = {
    'pad_token': '[PAD]',
    'unk_token': '[UNK]',
    'cls_token': '[CLS]',
    'sep_token': '[SEP]',
    'mask_token': '[MASK]',
}
_MAX_ALPHABET = 1000


class WordPiece(TypedDict):
    """A vocabulary to train: lower-cased word pieces, as BERT's.

    Args:
        text: `python_docs` for the training split of that data set, or a file or folder of text.
        vocabulary: number of pieces; fewer, if no two pieces that occur together twice are left to join.
        text_key: key or column of the text in JSON lines and Parquet. Default: `text`.
        on_error: what to do about lines that hold no text: `fail`, or `skip` them with a warning. Default: `fail`.
    """

    text: str
    vocabulary: int
    text_key: NotRequired[str]
    on_error: NotRequired[Literal['fail', 'skip']]


Tokenizer = str | WordPiece | PreTrainedTokenizerFast


def load_tokenizer(source: Tokenizer) -> PreTrainedTokenizerFast:
    """Load or train a tokenizer.

    Args:
        source: a folder that `save_pretrained` wrote; a `vocab.txt` of lower-cased word pieces, as bert-base-uncased's;
            a `tokenizer.json`; a checkpoint or the folder of a run, for the tokenizer of its model; a name on the
            Hugging Face hub; a `WordPiece` mapping, which trains the same tokenizer in every process; or a tokenizer.

    Raises:
        FileNotFoundError: There is nothing there, neither here nor on the hub.
        ValueError: What is there is no tokenizer.
        CheckpointError: The checkpoint cannot be used.
    """
    if isinstance(source, PreTrainedTokenizerFast):
        return source
    if isinstance(source, Mapping):
        return _trained(source)
    path = Path(source).expanduser()
    if (file := find_checkpoint(path)) is not None:
        path = file
        read = {'.txt': _from_vocabulary, '.json': _from_json}.get(file.suffix, _from_checkpoint)
    elif not path.exists():
        if path.is_absolute() or path.suffix in ('.pt', '.txt', '.json'):
            raise FileNotFoundError(f'no tokenizer in {source}: no such file or folder')
        read = _from_hub
    else:
        read = _from_pretrained
    try:
        tokenizer = read(path)
    except (CheckpointError, FileNotFoundError):
        raise
    except Exception as error:  # the libraries raise anything, even a bare Exception, for what they cannot read
        raise ValueError(f'no tokenizer in {source}: {" ".join(str(error).split())[:300]}') from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f'{source}: a {type(tokenizer).__name__} has no fast version, which is needed')
    return tokenizer


def saved_tokenizer(checkpoint: str | Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer in a Composer checkpoint; None if there is none that can be used."""
    try:
        return load_tokenizer(str(checkpoint))
    except (CheckpointError, OSError, ValueError):
        return None


class TextEncoder:
    """Text -> token ids, none of them special: no cut, no padding, and a `[MASK]` in the text is a word like any other.

    Args:
        tokenizer: stays as it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        self._raw = _copy(tokenizer)
        self._raw.encode_special_tokens = True  # pyright: ignore[reportAttributeAccessIssue]

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled raw tokenizer would forget that special tokens are text.
        return TextEncoder, (self._tokenizer,)

    def __call__(self, text: str) -> list[int]:
        """The ids of a text's tokens."""
        return self._raw.encode(text, add_special_tokens=False).ids


def begins_word(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Whether each token begins a word, bool (vocabulary,).

    Raises:
        ValueError: The tokenizer's words are not made of pieces that tell.
    """
    prefix = json.loads(tokenizer.backend_tokenizer.to_str())['model'].get('continuing_subword_prefix')
    if not prefix:
        raise ValueError(
            f'whole_word_masking needs pieces that tell whether they continue a word, as ## does in BERT, but '
            f'the tokenizer {tokenizer.name_or_path!r} has none'
        )
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return np.array([not word.startswith(prefix) for word in words])


def tokenizer_difference(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> str | None:
    """What makes two tokenizers give different ids for some text: a short phrase, or None if nothing does.

    How they pad and cut does not count, nor where they came from.
    """
    vocabularies = one.get_vocab(), other.get_vocab()
    if vocabularies[0] != vocabularies[1]:
        if len(vocabularies[0]) != len(vocabularies[1]):
            return f'{len(vocabularies[0])} words against {len(vocabularies[1])}'
        pairs = zip(*(sorted((id, word) for word, id in words.items()) for words in vocabularies), strict=True)
        (id, word), (other_id, other_word) = next(pair for pair in pairs if pair[0] != pair[1])
        if id != other_id:
            return f'ids up to {max(vocabularies[0].values())} against {max(vocabularies[1].values())}'
        return f'the word of id {id} is {word!r} against {other_word!r}'
    contents = _content(one), _content(other)
    for what in contents[0]:
        if contents[0][what] != contents[1][what]:
            return what
    return None


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """The same for two tokenizers between which there is no difference; hexadecimal digits."""
    content = [sorted(tokenizer.get_vocab().items()), _content(tokenizer)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _content(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What decides a text's ids beside the vocabulary, under the name of what it does."""
    raw = _copy(tokenizer)
    parts = json.loads(raw.to_str())
    normalizer, model = parts['normalizer'] or {}, parts['model']
    if normalizer.get('type') == 'BertNormalizer' and normalizer['strip_accents'] is None:
        normalizer['strip_accents'] = normalizer['lowercase']
    framed = [raw.encode('a'), raw.encode('a', 'b')]
    return {
        'lower-casing': normalizer.get('lowercase'),
        'how text is normalized': normalizer,
        'how text is split into words': parts['pre_tokenizer'],
        'how words are split into pieces': {key: value for key, value in model.items() if key != 'vocab'},
        'added tokens': parts['added_tokens'],
        'special tokens': {name: getattr(tokenizer, f'{name}_id') for name in _SPECIAL},
        'the tokens around a text': [[encoding.ids, encoding.type_ids] for encoding in framed],
    }


def _copy(tokenizer: PreTrainedTokenizerFast) -> tokenizers.Tokenizer:
    """A copy that neither cuts nor pads."""
    raw = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.no_truncation()
    raw.no_padding()
    return raw


def _from_pretrained(source: str | Path) -> PreTrainedTokenizerFast:
    # Unless told not to, it asks on the terminal whether to run the code that a folder brings along.
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _from_hub(name: Path) -> PreTrainedTokenizerFast:
    try:
        return _from_pretrained(name.as_posix())
    except Exception as error:
        raise FileNotFoundError(
            f'no tokenizer {name.as_posix()!r}: no such file or folder here, and the Hugging Face hub did not give it '
            f'({type(error).__name__}): name a file or folder, or set HF_ENDPOINT to a mirror that can be reached'
        ) from error


def _from_vocabulary(path: Path) -> PreTrainedTokenizerFast:
    words = path.read_text(encoding='utf-8').split('\n')
    if missing := [word for word in _SPECIAL.values() if word not in words]:
        raise ValueError(f'a vocabulary has a word per line, {", ".join(missing)} among them')
    return BertTokenizerFast(vocab_file=str(path), do_lower_case=True)


def _from_json(path: Path) -> PreTrainedTokenizerFast:
    if (path.parent / 'tokenizer_config.json').is_file():
        return _from_pretrained(path.parent)
    raw = tokenizers.Tokenizer.from_file(str(path))
    special = {name: word for name, word in _SPECIAL.items() if raw.token_to_id(word) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def _from_checkpoint(path: Path) -> PreTrainedTokenizerFast:
    state = read_checkpoint(path).get('state', {})
    files = state.get('integrations', {}).get('huggingface', {}).get('tokenizer')
    if not files:
        raise CheckpointError(f'{path}: holds no tokenizer: it is of no language model, or its model had none')
    with tempfile.TemporaryDirectory() as folder:
        for name, file in files.items():
            # The names are the file's word, so none may lead out of the folder, and code stays where it is.
            if Path(name).name == name and name.endswith(('.json', '.txt')):
                content = file['content']
                if isinstance(content, dict):
                    content = {key: value for key, value in content.items() if key != 'auto_map'}
                text = json.dumps(content) if name.endswith('.json') else '\n'.join(content)
                (Path(folder) / name).write_text(text, encoding='utf-8')
        tokenizer = _from_pretrained(folder)
    tokenizer.name_or_path = str(path)
    return tokenizer


def _trained(source: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    known = set(WordPiece.__annotations__)
    if not {'text', 'vocabulary'} <= set(source) <= known or not isinstance(source['vocabulary'], int):
        raise ValueError(
            'a tokenizer to train is {text: ..., vocabulary: ...}, a number of words, with text_key and on_error if '
            f'need be, not {dict(source)}'
        )
    return copy.deepcopy(_train(**source))


@functools.cache
def _train(
    text: str, vocabulary: int, text_key: str = 'text', on_error: Literal['fail', 'skip'] = 'fail'
) -> PreTrainedTokenizerFast:
    from composer_kd.data.masked_text import training_text  # which needs this module

    raw = tokenizers.Tokenizer(models.WordPiece(unk_token=_SPECIAL['unk_token']))  # pyright: ignore[reportCallIssue]
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)  # pyright: ignore[reportAttributeAccessIssue]
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    counts = Counter()
    for document in training_text(text, text_key, on_error):
        counts.update(raw.normalizer.normalize_str(document))
    alphabet = sorted(
        character
        for character, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MAX_ALPHABET]
        if not character.isspace()
    )
    # The trainer numbers a piece as it meets it, in an order that is another in every process, and breaks ties by these
    # numbers. What is special is numbered first, in the order given.
    first = [*_SPECIAL.values(), *(f'##{character}' for character in alphabet)]
    if vocabulary < (least := len(first) + len(alphabet)):
        raise ValueError(f'a vocabulary of {vocabulary} has no room for the characters of {text}: take {least} or more')
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=first,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    raw.train_from_iterator(training_text(text, text_key, on_error), trainer)
    words = sorted(raw.get_vocab().items(), key=lambda item: item[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'vocab.txt'
        path.write_text(''.join(f'{word}\n' for word, _ in words), encoding='utf-8')
        tokenizer = _from_vocabulary(path)
    tokenizer.name_or_path = f'{vocabulary} words of {text}'
    return tokenizer
