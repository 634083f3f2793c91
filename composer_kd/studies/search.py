"""Optuna proposes the settings of the runs of a search, one after another, and says which are to end early."""

from __future__ import annotations

import functools
import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from composer_kd.recipes.bind import bind, signature
from composer_kd.recipes.load import nearest
from composer_kd.recipes.resolve import snake_case
from composer_kd.studies.study import Study

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.trial import FrozenTrial

_OF_A_RANGE = ('low', 'high', 'log', 'step')
_DEFAULTS = {'sampler': 'tpe_sampler', 'pruner': 'nop_pruner'}
_SEED = 17
_OUTCOMES = {'RUNNING': 'running', 'COMPLETE': 'finished', 'PRUNED': 'pruned', 'FAIL': 'failed'}
_KEPT = 'composer_kd:study'  # under which a trial keeps what its sampler noted down for all trials
_KNOWN = 'composer_kd:known'  # under which it keeps which runs had been finished when it was proposed
_METRIC = 'composer_kd:metric'  # under which a database keeps what its values are of


class Search:
    """The trials of one arm, in a database.

    What is proposed is a function of the sampler's seed, the number of the trial, and what became of those before it.
    So a search that is broken off, at any moment, goes on as it would have gone on.

    Args:
        study: The study, whose folder must be there.
        arm: The name of the arm.

    Raises:
        RecipeError: What the file says of the search is wrong, or the database holds another search.
    """

    def __init__(self, study: Study, arm: str):
        optuna = _optuna(study)
        from sqlalchemy import make_url

        self._file = study
        self._space, self._sampler, self._pruner = checked(study)
        url = study.value(('storage',), f'sqlite:///{study.folder / f"{arm}.db"}')
        self._name, self._direction = f'{study.name}-{arm}', 'maximize' if study.goal == 'max' else 'minimize'
        shown = 'of this URL'
        try:
            shown = make_url(url).render_as_string(hide_password=True)
            self._storage = optuna.storages.RDBStorage(url)
        except Exception as error:  # of any of the libraries that lie between here and the database
            raise study.error(('storage',), f'cannot open the database {shown}: {error}', 1) from error
        self._open()
        todo = 'choose another name for the study, or delete it'
        trials = self._study.get_trials()
        if not trials:
            self._study.set_user_attr(_METRIC, study.metric)
        if self._study.direction.name.lower() != self._direction:
            raise study.error(('goal',), f'{shown} holds a search with another goal; {todo}')
        if self._study.user_attrs.get(_METRIC) != study.metric:
            raise study.error(('metric',), f'{shown} holds a search with another metric; {todo}')
        if any(trial.distributions != self._space for trial in trials):
            raise study.error(('search',), f'{shown} holds a search over something else; {todo}')

    def proposed(self, number: int, finished: Sequence[str] = ()) -> FrozenTrial:
        """The trial of a number, up to that of those that there are; its settings are its `params`.

        Args:
            number: The number.
            finished: The names of runs that are finished, for `known` if this trial is a new one.
        """
        import optuna

        trials = self._study.get_trials()
        if number < len(trials):
            return trials[number]
        seed = self._seed_of(number)
        # In a copy, so that a trial is in the database either with all that was proposed or not at all.
        memory = optuna.storages.InMemoryStorage()
        optuna.copy_study(from_study_name=self._name, from_storage=self._storage, to_storage=memory)
        key = memory.get_study_id_from_name(self._name)
        for name, value in (trials[-1].system_attrs.get(_KEPT, {}) if trials else {}).items():
            memory.set_study_system_attr(key, name, value)
        with _said_in_one_line(self._file, 'sampler'):
            copy = optuna.load_study(
                study_name=self._name, storage=memory, sampler=self._sampler(**seed), pruner=self._pruner
            )
            asked = copy.ask(self._space)
        noted = copy.get_trials()[number].system_attrs | {
            _KEPT: memory.get_study_system_attrs(key),
            _KNOWN: [*finished],
        }
        self._study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=asked.params,
                distributions=asked.distributions,
                system_attrs=noted,
            )
        )
        return self._study.get_trials()[number]

    def known(self, number: int) -> list[str]:
        """The runs that were finished when a trial was proposed, which is all that its own run may learn from.

        One that failed then, and was run again since, is not among them: the run's recipe has to stay what it was.
        """
        return self._study.get_trials(deepcopy=False)[number].system_attrs[_KNOWN]

    def outcome(self, number: int) -> str:
        """What has become of a trial: `running`, `finished`, `pruned` or `failed`."""
        return _OUTCOMES[self._study.get_trials(deepcopy=False)[number].state.name]

    def evaluated(self, number: int) -> int:
        """How many evaluations of a trial were looked at."""
        return len(self._study.get_trials(deepcopy=False)[number].intermediate_values)

    def is_to_end(self, number: int, values: Sequence[float | str]) -> bool:
        """Whether a running trial is to end early; then the last of its evaluations that was looked at says why.

        Args:
            number: Of the trial.
            values: What its evaluations found, from the first on.
        """
        known = self.evaluated(number)
        key = self._storage.get_trial_id_from_study_id_trial_number(
            self._storage.get_study_id_from_name(self._name), number
        )
        # The last one that is known may have been written down without being judged. Those before it were.
        for step in range(max(0, known - 1), len(values)):
            self._storage.set_trial_intermediate_value(key, step, float(values[step]))
            if self._pruner.prune(self._study, self._study.get_trials()[number]):
                return True
        return False

    def tell(self, number: int, status: str, value: float | None = None) -> None:
        """Write down what has become of a running trial.

        Args:
            number: Of the trial.
            status: As in `outcome`.
            value: Of one that is finished, its quality; with None it counts as one that failed.
        """
        from optuna.trial import TrialState

        if status == 'finished' and value is not None:
            self._study.tell(number, value)
        else:
            self._study.tell(number, state=TrialState.PRUNED if status == 'pruned' else TrialState.FAIL)

    def run_failed_again(self) -> None:
        """Have trials that failed run once more, under their own numbers."""
        from sqlalchemy import text

        # Optuna changes no trial that has ended. In its table this is one step, which is done or not, whenever it ends.
        changed = (
            "UPDATE trials SET state = 'RUNNING', datetime_complete = NULL WHERE state = 'FAIL' AND study_id = :id"
        )
        with self._storage.engine.begin() as connection:
            connection.execute(text(changed), {'id': self._storage.get_study_id_from_name(self._name)})
        self._open()  # for it remembers trials that have ended

    def _open(self) -> None:
        import optuna

        self._study = optuna.create_study(
            storage=self._storage,
            study_name=self._name,
            direction=self._direction,
            sampler=optuna.samplers.RandomSampler(),  # never asked: it proposes nothing, and notes nothing down
            pruner=self._pruner,
            load_if_exists=True,
        )

    def _seed_of(self, number: int) -> dict[str, int]:
        """The seed for one trial, for samplers that have one."""
        target = self._sampler.func
        if 'seed' not in signature(target):
            return {}
        seed = self._sampler.keywords.get('seed', _SEED)
        # A sequence of low discrepancy is one for all trials.
        is_for_all = target.__name__ == 'QMCSampler'
        return {'seed': seed if is_for_all else random.Random(f'composer_kd.search {seed} {number}').getrandbits(32)}


def checked(study: Study) -> tuple[dict[str, BaseDistribution], functools.partial, BasePruner]:
    """What a file says of a search: what is searched, what makes a sampler, and the pruner.

    Raises:
        RecipeError: Something of it is wrong.
    """
    optuna = _optuna(study)
    searched = {key: _distribution(study, key) for key in study.mapping(('search',))}
    if not searched:
        todo = 'for instance search: {optimizer.lr: {low: 0.01, high: 1.0, log: true}}'
        raise study.error(('search',), f'say what is searched, {todo}')
    if not isinstance(study.value(('storage',), ''), str):
        raise study.error(('storage',), 'must be the URL of a database, such as sqlite:///search.db')
    made = []
    for kind, module in (('sampler', optuna.samplers), ('pruner', optuna.pruners)):
        component = _component(study, kind, module)
        with _said_in_one_line(study, kind):
            made.append((component, component()))
    return searched, made[0][0], made[1][1]


def candidates(distribution: Any) -> list[Any]:
    """All choices, or the ends of a range."""
    return [*distribution.choices] if hasattr(distribution, 'choices') else [distribution.low, distribution.high]


def _distribution(study: Study, name: str) -> BaseDistribution:
    from optuna import distributions

    key = ('search', name)
    given = study.mapping(key, (*_OF_A_RANGE, 'choices'))
    if 'choices' in given:
        choices = given['choices']
        if (
            len(given) > 1
            or not isinstance(choices, list)
            or not all(isinstance(x, str | int | float) for x in choices)
        ):
            raise study.error(key, 'must be {choices: [...]}, words or numbers, and nothing else')
        kind, given = distributions.CategoricalDistribution, {'choices': choices}
    else:
        ends = [given.get(end) for end in ('low', 'high')]
        if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends):
            raise study.error(key, 'must be {low: 1, high: 10}, with log or step if need be, or {choices: [...]}')
        whole = all(isinstance(value, int) for value in (*ends, given.get('step', 1)))
        kind = distributions.IntDistribution if whole else distributions.FloatDistribution
    with _said_in_one_line(study, *key), warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)  # of a range that is no multiple of its step
        return kind(**given)


def _component(study: Study, kind: str, module: Any) -> functools.partial:
    """A sampler or a pruner, still to be made."""
    given = study.mapping((kind,)) or {'name': _DEFAULTS[kind]}
    known = {snake_case(name): getattr(module, name) for name in module.__all__ if not name.startswith('Base')}
    known = {name: target for name, target in known.items() if name.endswith(f'_{kind}')}
    name = str(given.pop('name', None))
    target = known.get(name) or known.get(f'{name}_{kind}')
    if target is None:
        raise study.error((kind, 'name'), f'there is no {kind} {name!r}; {nearest(name, known)}')
    return functools.partial(target, **bind(study.source, (kind,), target, given))


@contextmanager
def _said_in_one_line(study: Study, *key: str) -> Iterator[None]:
    """What Optuna finds wrong with a part of the file is said with its line; its warnings of experiments are not."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ExperimentalWarning)
        try:
            yield
        except (ValueError, TypeError, UserWarning, ImportError) as error:
            raise study.error(key, str(error)) from error


def _optuna(study: Study) -> Any:
    """Optuna, which says what it has to say among our lines."""
    try:
        import optuna
    except ImportError as error:
        raise study.error(('kind',), "a search needs Optuna: pip install 'composer-kd[studies]'", 1) from error
    optuna.logging.disable_default_handler()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logger = logging.getLogger('optuna')
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())
    return optuna


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(f'optuna: {record.getMessage()}', flush=True)
