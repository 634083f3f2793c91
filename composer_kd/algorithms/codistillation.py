"""Learn from models that learn at the same time."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from composer.core import Algorithm, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import dist

from composer_kd.algorithms.knowledge_distillation import KnowledgeDistillation
from composer_kd.channel import Channel
from composer_kd.exchange import Exchange, make_exchange
from composer_kd.teachers import TeacherError, logits_of
from composer_kd.teams import Team, current


class Codistillation(Algorithm):
    r"""Codistillation (`Anil et al, 2018 <https://arxiv.org/abs/1804.03235>`_): teams learn from each other's models.

    It is :class:`.KnowledgeDistillation` whose teachers are the models of the other teams, so that losses, weights,
    :class:`.TeacherSampling` and :class:`.EarlyStopDistillation`, whose ``start`` is the burn-in, are what they are
    there. No gradient reaches another team's model. The teams are made by :func:`composer_kd.teams.split` before there
    is a Trainer, or by ``teams`` in a recipe, and each begins with a seed of its own.

    Runs where KnowledgeDistillation runs; on :attr:`.Event.FIT_START` to see whether all teams are about to do the
    same, on :attr:`.Event.FIT_END` to warn if nobody was heard; and on :attr:`.Event.BATCH_END` to send, to receive,
    and to log ``codistillation/bytes``: what this rank has sent to one other team in this batch; and
    ``codistillation/staleness``: batches since the snapshots were taken that are in use.

    Args:
        exchange: What teams tell each other. ``'predictions'``: in each batch that distills, their logits; all see the
            same batches. ``'weights'``: now and then their weights, of which each team has copies, and its own data.
            With options, ``{'name': 'weights', 'interval': '50ba'}``, see
            :class:`~composer_kd.exchange.PredictionsExchange` and :class:`~composer_kd.exchange.WeightsExchange`.
            Default: ``'predictions'``.
        average: What is averaged where several peers are heard: the ``'probabilities'`` (Anil et al.), ``'logits'``, or
            the ``'losses'``, one for each pair (`Sodhani et al, 2020 <https://arxiv.org/abs/2010.02838>`_); of ``kl``
            the first and the last have the same gradient. Default: ``'probabilities'``.
        loss: As of :class:`.KnowledgeDistillation`, like all that follow. Default: ``'kl'``.
        temperature: Default: ``1.0``.
        kd_weight: Default: ``1.0``.
        label_weight: Default: ``1.0``.
        interval: Default: ``1``.
        probability: Drawn alike in all teams. Default: ``1.0``.
        softmax_axis: Default: ``'vocabulary'``.
        weights: Default: ``None``.
        only_correct: Default: ``False``.
        team: The team of this process. Default: ``None``, that of :func:`composer_kd.teams.current`.

    Raises:
        ValueError: An argument is out of range, or there are no teams.
        TeacherError: The teams are not about to do the same, or are the same; or predictions are exchanged, and the
            teams see other inputs than each other.

    Example:
        .. code-block:: python

            team = composer_kd.teams.split(2)
            trainer = Trainer(
                model=student,
                seed=17 + team.index,
                algorithms=[Codistillation(exchange='weights'), EarlyStopDistillation(start='0.1dur')],
                ...
            )
    """

    def __init__(
        self,
        exchange: str | Mapping[str, Any] | Exchange = 'predictions',
        average: Literal['logits', 'probabilities', 'losses'] = 'probabilities',
        loss: str | Callable[..., torch.Tensor] = 'kl',
        temperature: float = 1.0,
        kd_weight: float = 1.0,
        label_weight: float = 1.0,
        interval: int = 1,
        probability: float = 1.0,
        softmax_axis: str = 'vocabulary',
        weights: Sequence[float] | Literal['random'] | None = None,
        only_correct: bool = False,
        team: Team | None = None,
    ):
        self.exchange = make_exchange(exchange)
        self._team = team or current()
        self.distillation = KnowledgeDistillation(
            self.exchange.peers(self._team),
            loss=loss,
            temperature=temperature,
            kd_weight=kd_weight,
            label_weight=label_weight,
            interval=interval,
            softmax_axis=softmax_axis,
            probability=probability,
            weights=weights,
            average=average,
            only_correct=only_correct,
        )
        self.distillation.waits = lambda state: not self.exchange.has_come()
        self.distillation.seed = lambda state: state.rank_zero_seed if self._seed is None else self._seed
        self._student: ComposerModel | None = None
        self._channel: Channel | None = None
        self._starts = 0
        self._seed: int | None = None

    def check(self, student: ComposerModel) -> None:
        """See :meth:`.KnowledgeDistillation.check`."""
        self.distillation.check(student)

    def match(self, event: Event, state: State) -> bool:
        """Whether this algorithm has anything to do."""
        return event == Event.FIT_END or self.distillation.match(event, state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do what the event is for, see the class."""
        is_over = self.distillation.pool.released
        if event == Event.INIT:
            assert isinstance(state.model, ComposerModel)
            self._student = state.model
        elif event == Event.FIT_START and not is_over:
            self._start(state)
        elif event == Event.AFTER_FORWARD and self.distillation.asks:
            self.exchange.tell(state.batch, logits_of(state.outputs))
        elif event == Event.BATCH_START and is_over:
            self.exchange.release()
        elif event == Event.FIT_END and not is_over:
            self._warn_if_alone()
        self.distillation.apply(event, state, logger)
        if event == Event.BATCH_END and not is_over:
            logger.log_metrics(self.exchange.batch_end(state))

    def state_dict(self) -> dict[str, Any]:
        """That of the distillation, and what is on its way between the teams."""
        return {
            **super().state_dict(),
            'distillation': self.distillation.state_dict(),
            'exchange': {} if self.distillation.pool.released else self.exchange.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        """Go on from a checkpoint, which all teams do from the same batch."""
        self.distillation.load_state_dict(state['distillation'])
        self.exchange.load_state_dict(state['exchange'])

    def _start(self, state: State) -> None:
        assert self._student is not None
        if self.exchange.in_launch:
            self._meet(state, self._student)
        self.exchange.start(state, self._student, self.distillation)

    def _meet(self, state: State, student: ComposerModel) -> None:
        """See whether all teams are about to do the same, but not as the same model."""
        assert self._team is not None
        if self._channel is None:
            self._channel = self._team.channel('codistillation', 'cpu')
        distillation, (start, stop) = self.distillation, self.distillation.window
        self._refuse_clocks(state, start, stop)
        facts = {
            'exchange': self.exchange.name,
            **self.exchange.facts(state, student),
            'interval': distillation.interval,
            'temperature of kl': distillation.kl_temperature,
            'probability': distillation.probability,
            'whether kd_weight is above 0': distillation.kd_weight > 0,
            'start': str(start),
            'stop': str(stop),
            'max_duration': str(state.max_duration),
            'number of batches in an epoch': None if state.dataloader_len is None else state.dataloader_len.value,
            'batch to begin at': state.timestamp.batch.value,
            'number of classes': getattr(student, 'num_classes', None),
        }
        said = {'facts': facts, 'seed': state.rank_zero_seed, 'weights': _sha256(student)}
        self._starts += 1
        every = self._channel.agree(f'start {self._starts}', said)
        for index, one in enumerate(every):
            for what, value in every[0]['facts'].items():
                if one['facts'].get(what) != value:
                    has = one['facts'].get(what)
                    raise TeacherError(f'team0 has {value} as {what}, team{index} has {has}: make these the same')
            for other, another in enumerate(every[:index]):
                if one['seed'] == another['seed']:
                    todo = 'models that are alike have nothing to teach each other: give each a seed of its own'
                    raise TeacherError(f'team{other} and team{index} both have the seed {one["seed"]}; {todo}')
                if one['weights'] == another['weights']:
                    todo = (
                        'they have nothing to teach each other: make each model from its seed, before anything is drawn'
                    )
                    raise TeacherError(f'team{other} and team{index} begin with the same weights; {todo}')
        self._seed = every[0]['seed']

    def _warn_if_alone(self) -> None:
        if self.distillation.pool.heard == 0 and self.distillation.kd_weight > 0 and dist.get_global_rank() == 0:
            warnings.warn(
                'no other team was heard in this run, which has learned from labels alone: look at the path, team and '
                'interval of the exchange, and at the start of the distillation',
                stacklevel=2,
            )

    def _refuse_clocks(self, state: State, *times: Time) -> None:
        """Raise TeacherError where a time comes in another batch in each team."""
        assert state.max_duration is not None
        of_same_batches = self.exchange.name == 'predictions'
        for time in (*times, state.max_duration):
            unit = state.max_duration.unit if time.unit == TimeUnit.DURATION else time.unit
            if unit == TimeUnit.SECOND or (unit == TimeUnit.TOKEN and not of_same_batches):
                raise TeacherError(f'{time} comes in another batch in each team: give it in batches, samples or epochs')


def _sha256(model: torch.nn.Module) -> str:
    """Of the parameters, as far as they are on this rank."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        local: Any = getattr(parameter, 'to_local', parameter.detach)()
        digest.update(local.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
