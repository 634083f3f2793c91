"""Change the weight decay while a run goes on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from composer.core import Algorithm, Event, State, Time
from composer.loggers import Logger

from composer_kd.algorithms.knowledge_distillation import find_distiller
from composer_kd.algorithms.times import parse_time, progress


def decay_at(elapsed: float, milestones: Sequence[tuple[float, float]], *, initial: float) -> float:
    """Weight decay at a time: that of the last milestone that was reached, or ``initial`` before the first.

    Args:
        elapsed: The present time.
        milestones: Times in the same unit, ascending, each with the weight decay from then on.
        initial: Weight decay before the first of them.
    """
    return next((decay for time, decay in reversed(milestones) if elapsed >= time), initial)


def decay_beside(share: float, *, while_distilling: float, initial: float) -> float:
    """Weight decay beside distillation: ``(1 - share) * initial + share * while_distilling``.

    Args:
        share: Share of the distillation that is switched on, 0 to 1.
        while_distilling: Weight decay where all of it is.
        initial: Weight decay where none of it is.
    """
    return (1.0 - share) * initial + share * while_distilling


class RegularizationSchedule(Algorithm):
    """Change the optimizer's weight decay at milestones, or as distillation comes and goes.

    Distillation regularizes, too, so that beside it the weight decay that is right without it may be too much. Where
    networks teach each other, it has been lowered from 1e-4 to 1e-5 and to 0 as the learning rate drops
    (`Sodhani et al, 2020 <https://arxiv.org/abs/2010.02838>`_). What of the gain is due to the schedule alone shows in
    a run that has it without distillation: milestones need no :class:`.KnowledgeDistillation`.

    All values are weight decays as the optimizer has them, not factors of them. What they mean is the optimizer's
    matter: :class:`~composer.optim.DecoupledSGDW` and :class:`~composer.optim.DecoupledAdamW` multiply them by
    ``lr / initial_lr``, :class:`torch.optim.SGD` and :class:`torch.optim.AdamW` by ``lr``.

    Runs on :attr:`.Event.INIT` to see whether there is distillation to follow, on :attr:`.Event.AFTER_LOAD` to choose
    the parameter groups, and on :attr:`.Event.BATCH_START` to set the weight decay of the batch, which is a function of
    the present time alone, and so is the same in a resumed run.

    Logs ``regularization/weight_decay``; if several groups are chosen, ``regularization/weight_decay/group0`` and so
    on, with their numbers.

    Args:
        milestones: From when on which weight decay holds: time strings in one unit, ascending, such as
            ``{'18ep': 1e-5, '38ep': 0.0}``. Before the first it is the optimizer's own. Default: ``None``.
        while_distilling: Weight decay while distillation is fully switched on; while it is not, the optimizer's own;
            in the ramp of :class:`.EarlyStopDistillation` in between, see :func:`decay_beside`. To be given in place of
            ``milestones``. Default: ``None``.
        groups: Which parameter groups of the optimizer, counted from 0. Default: ``None``, all whose weight decay is
            above 0 when the run begins.

    Raises:
        ValueError: An argument is out of range, or there is nothing of that kind to change in this run.
    """

    def __init__(
        self,
        milestones: Mapping[str | Time, float] | None = None,
        while_distilling: float | None = None,
        groups: Sequence[int] | None = None,
    ):
        if bool(milestones) == (while_distilling is not None):
            raise ValueError("give one of the two, milestones ({'18ep': 1.0e-5, '38ep': 0.0}) or while_distilling")
        self.milestones = [(parse_time('a milestone', time), decay) for time, decay in (milestones or {}).items()]
        self.while_distilling = while_distilling
        self.groups = groups
        times = [time for time, _ in self.milestones]
        for time, following in itertools.pairwise(times):
            if time.unit != following.unit:
                raise ValueError(f'milestones must be in one unit, to be compared with each other: {time}, {following}')
            if time >= following:
                raise ValueError(f'milestones must come one after another: {following} does not come after {time}')
        given = {f'weight decay at {time}': decay for time, decay in self.milestones}
        if while_distilling is not None:
            given['while_distilling'] = while_distilling
        for name, decay in given.items():
            if not (math.isfinite(decay) and decay >= 0):
                raise ValueError(f'{name} must be 0 or more, not {decay}')
        if groups is not None and (not groups or min(groups) < 0):
            raise ValueError(f'groups must be numbers of parameter groups, from 0 on, not {list(groups)}')
        #: Weight decay of each parameter group when the run began.
        self.initial: list[float] = []

    def rehearse(self, state: State) -> None:
        """Raise ValueError if the optimizer has nothing to change; of ``state`` only the optimizers are looked at."""
        if state.optimizers:
            self._chosen(_decays(state))

    def match(self, event: Event, state: State) -> bool:
        """Runs on :attr:`.Event.INIT`, :attr:`.Event.AFTER_LOAD` and :attr:`.Event.BATCH_START`."""
        return event in (Event.INIT, Event.AFTER_LOAD, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Set the weight decay of the batch, once all is found to be there."""
        if event == Event.INIT:
            if self.while_distilling is not None:
                find_distiller(state, self)
        elif event == Event.AFTER_LOAD:
            # The groups of a resumed run have what the schedule has made of them.
            self.initial = self.initial or _decays(state)
            self._chosen(self.initial)
        else:
            decays = self._now(state)
            for index, decay in decays.items():
                _groups(state)[index]['weight_decay'] = decay
            name = 'regularization/weight_decay'
            several = len(decays) > 1
            logger.log_metrics({f'{name}/group{i}' if several else name: decay for i, decay in decays.items()})

    def state_dict(self) -> dict[str, Any]:
        """The weight decay of the groups when the run began."""
        return {**super().state_dict(), 'initial': self.initial}

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        """Go on from a checkpoint."""
        self.initial = list(state['initial'])

    def _chosen(self, initial: Sequence[float]) -> Sequence[int]:
        """The groups that are to be changed."""
        if self.groups is None:
            chosen = [index for index, decay in enumerate(initial) if decay > 0]
            if not chosen:
                raise ValueError(
                    'the optimizer has no weight decay that RegularizationSchedule could change: set its weight_decay, '
                    'or name the parameter groups that are to get one, groups=[0]'
                )
            return chosen
        if max(self.groups) >= len(initial):
            has = 'one parameter group, 0' if len(initial) == 1 else f'parameter groups 0 to {len(initial) - 1}'
            raise ValueError(f'groups: there is no parameter group {max(self.groups)}: the optimizer has {has}')
        return self.groups

    def _now(self, state: State) -> dict[int, float]:
        """The weight decay of each chosen group in the present batch."""
        chosen = {index: self.initial[index] for index in self._chosen(self.initial)}
        if self.while_distilling is not None:
            distiller = find_distiller(state, self)
            is_silent = distiller.pool.released or distiller.waits(state)
            share = 0.0 if is_silent else distiller.share(state)
            return {
                index: decay_beside(share, while_distilling=self.while_distilling, initial=decay)
                for index, decay in chosen.items()
            }
        elapsed = progress(state, self.milestones[0][0].unit)
        milestones = [(time.value, decay) for time, decay in self.milestones]
        return {index: decay_at(elapsed, milestones, initial=decay) for index, decay in chosen.items()}


def _groups(state: State) -> list[dict[str, Any]]:
    return [group for optimizer in state.optimizers for group in optimizer.param_groups]


def _decays(state: State) -> list[float]:
    """The weight decay of each parameter group."""
    groups = _groups(state)
    if not all('weight_decay' in group for group in groups):
        raise ValueError(
            f'{type(state.optimizers[0]).__name__} knows no weight_decay, which RegularizationSchedule is to change: '
            'take another optimizer, or leave RegularizationSchedule out'
        )
    return [float(group['weight_decay']) for group in groups]
