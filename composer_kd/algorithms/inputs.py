"""Which algorithms change what the loader has given."""

from __future__ import annotations

from collections.abc import Iterable

from composer import algorithms as composer_algorithms
from composer.core import Algorithm

# Composer's algorithms that change the inputs of a batch, or choose among its samples. Not among them: what changes
# labels alone (LabelSmoothing), or the data set's transform, which the loader applies (AugMix, RandAugment).
_CHANGE_INPUTS = (
    composer_algorithms.ColOut,
    composer_algorithms.CutMix,
    composer_algorithms.CutOut,
    composer_algorithms.MixUp,
    composer_algorithms.ProgressiveResizing,
    composer_algorithms.SelectiveBackprop,
    composer_algorithms.SeqLengthWarmup,
)


def changes_inputs(algorithm: Algorithm) -> bool:
    """Whether an algorithm of Composer changes inputs after the loader, so that they are no longer the sample's own."""
    if isinstance(algorithm, composer_algorithms.ColOut):
        return algorithm.batch  # otherwise it is a transform of the data set
    return isinstance(algorithm, _CHANGE_INPUTS)


def mixes_samples(algorithm: Algorithm) -> bool:
    """Whether an algorithm of Composer makes one sample of two, so that no one label is right."""
    return isinstance(algorithm, composer_algorithms.MixUp | composer_algorithms.CutMix)


def refuse_changed_inputs(algorithms: Iterable[Algorithm], teacher: str) -> None:
    """Raise ValueError if what a teacher says about a sample would not be about what the student sees of it.

    Args:
        algorithms: Those of the run.
        teacher: Whom the error is about.
    """
    for algorithm in filter(changes_inputs, algorithms):
        name = type(algorithm).__name__
        raise ValueError(
            f'{name} changes inputs after the loader, so that what is recorded of teacher {teacher} does not belong to '
            f'them: leave {name} out, or distill from the network itself, without a record'
        )
