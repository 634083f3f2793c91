"""What is published: one rank of a machine downloads it, the others find it in the cache."""

from contextlib import AbstractContextManager, nullcontext

import torch.distributed
from composer.utils import dist


def downloading(what: object = True) -> AbstractContextManager:
    """Around what downloads `what`, unless that is nothing: local rank 0 comes first, the others follow."""
    if what and torch.distributed.is_available() and torch.distributed.is_initialized():
        return dist.run_local_rank_zero_first()
    return nullcontext()
