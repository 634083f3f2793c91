"""Published weights: one rank of a machine downloads them, the others find them in the cache."""

from contextlib import AbstractContextManager, nullcontext

import torch.distributed
from composer.utils import dist


def downloading(weights: object) -> AbstractContextManager:
    """Around what downloads `weights`, unless there are none: local rank 0 comes first, the others follow."""
    if weights and torch.distributed.is_available() and torch.distributed.is_initialized():
        return dist.run_local_rank_zero_first()
    return nullcontext()
