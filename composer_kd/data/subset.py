"""How many samples a part of a data set has, which is its first so many."""


def subset_size(subset: int | float | None, samples: int) -> int:
    """The number of samples that an option `subset` asks for.

    Args:
        subset: A whole number of samples, from 2; or as a number with a point, up to 1.0, a share of all. None is all
            of them.
        samples: How many there are.

    Raises:
        ValueError: It is out of range.
    """
    if subset is None:
        return samples
    if isinstance(subset, float):
        if not 0 < subset <= 1:
            raise ValueError(f'subset={subset} is a share of the samples, which is above 0 and at most 1.0')
        return max(1, round(subset * samples))
    if subset == 1:
        raise ValueError('subset=1 is one sample, which is hardly meant: write 1.0 for all, or 2 or more')
    if subset < 1:
        raise ValueError(f'subset must be 2 samples or more, or a share such as 0.5, not {subset}')
    return min(subset, samples)
