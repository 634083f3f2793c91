"""The English of Python's own documentation, which comes with every Python."""

import functools
import re

_MIN_WORDS = 8
_MIN_LETTERS = 0.75


@functools.cache
def paragraphs() -> tuple[str, ...]:
    """The paragraphs of the language reference that are prose, each once: some 1,200, as Python's version has it."""
    from pydoc_data.topics import topics

    blocks = (block for name in sorted(topics) for block in re.split(r'\n\s*\n', topics[name]))
    texts = dict.fromkeys(' '.join(block.split()) for block in blocks if '::=' not in block and '>>>' not in block)
    return tuple(text for text in texts if _is_prose(text))


def _is_prose(text: str) -> bool:
    letters = sum(character.isalpha() or character == ' ' for character in text)
    return len(text.split()) >= _MIN_WORDS and letters >= _MIN_LETTERS * len(text) and text[-1] in '.:;!?)'
