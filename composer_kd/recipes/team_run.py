"""A recipe with `teams`: its runs, each an ordinary one in the folder of its team, and what they have in common."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from composer import Trainer
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed import PrefixStore, Store
from typing_extensions import Self

from composer_kd import teams
from composer_kd.channel import KEEPER, Channel, PeerLost, absent, peer_lost
from composer_kd.checkpoints import go_back, kept_checkpoints
from composer_kd.files import unfinished, write
from composer_kd.recipes.check import Plan, check, exchange_of, team_data
from composer_kd.recipes.folder import claim, on_rank_zero, write_recipe
from composer_kd.recipes.load import COMMAND_LINE, Recipe, RecipeError, load
from composer_kd.recipes.lock import FolderLock
from composer_kd.recipes.report import is_evaluation, say
from composer_kd.teachers import TeacherError

_LESS_IS_BETTER = ('loss', 'entropy', 'perplexity', 'error')  # words in the names of metrics

_SECONDS_BETWEEN_LOOKS = 1.0  # for summaries of other teams
_SECONDS_BETWEEN_SIGNS = 5.0


class SignsOfLife(Callback):
    """Tells, now and then, the team that has finished that this one has not, but is at work.

    Args:
        store: Where it does.
        key: Of what it counts up there.
        seconds: Between two signs, at least.
    """

    def __init__(self, store: Store, key: str, seconds: float):
        self._store, self._key, self._seconds = store, key, seconds
        self._last = 0.0

    def batch_end(self, state: State, logger: Logger) -> None:
        """Give a sign of life if the last one is a while ago."""
        self._give()

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """Likewise."""
        self._give()

    def _give(self) -> None:
        if time.monotonic() - self._last > self._seconds:
            self._last = time.monotonic()
            try:
                self._store.add(self._key, 1)
            except RuntimeError as error:
                raise peer_lost('a sign of life to the other teams', [KEEPER]) from error


class TeamRun:
    """The part of one team in a launch of several. As a context, it holds the launch's folder for team 0.

    Args:
        team: The team.
        recipe: The recipe of the launch. Each team's own has another seed.
        in_step: Whether teams learn from each other, so that they save, and go on, at the same batches.
        files: Texts of files that belong into the launch's folder, by their names. Default: none.

    Attributes:
        name: Of this team's run, for loggers.
        folder: Of the launch, in which each team has its own; none before `enter`.
        part: What this team's run is called there.
    """

    def __init__(
        self, team: teams.Team, recipe: Recipe, in_step: bool, files: Mapping[str, str] = MappingProxyType({})
    ):
        self.name = ''
        self.folder: Path | None = None
        self.part = f'team{team.index}'
        self._team, self._recipe, self._in_step, self._files = team, recipe, in_step, files
        self._key = ('blockwise',) if 'blockwise' in recipe.config else ('teams',)
        self._lock, self._is_new = FolderLock(recipe), False
        self._channel = team.channel('recipe', 'cpu')
        self._store = PrefixStore('recipe', team.store)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def enter(self, own: Recipe) -> None:
        """Take the launch's folder, once all teams have built all they need, and give this team a place in it.

        Args:
            own: This team's recipe; what it says of the folder is changed.

        Raises:
            RecipeError: It cannot be taken, or another team does not come.
        """
        if self.folder is None:
            taken = on_rank_zero(self._take)
            if 'error' in taken:
                raise RecipeError(taken['error'], taken['exit_code'])
            self.folder, self._is_new = Path(taken['folder']), taken['is_new']
        own.config |= {'runs_dir': str(self.folder), 'run_name': self.part}
        self.name = f'{self.folder.name}-{self.part}'

    def level(self, checkpoints: Path) -> None:
        """See to it that teams in step go on from the same batch: the latest of which all have a checkpoint.

        Args:
            checkpoints: Folder of those of this team's run.

        Raises:
            RecipeError: There is none, but some teams have checkpoints; or another team does not come.
        """
        on_rank_zero(lambda: self._level(checkpoints))

    def meet_to_save(self, trainer: Trainer) -> None:
        """Have teams in step save a batch once all have come to it, so that those that are killed have one in common.

        Args:
            trainer: Of this team's run.
        """
        savers = [callback for callback in trainer.state.callbacks if isinstance(callback, CheckpointSaver)]
        if self._in_step and dist.get_global_rank() == 0:
            for saver in savers:
                saver.save_interval = self._meeting(saver, self._team.channel('saves', 'cpu'))

    def _meeting(self, saver: CheckpointSaver, channel: Channel) -> Callable[[State, Event], bool]:
        is_due = saver.save_interval
        assert callable(is_due)

        def is_due_in_all(state: State, event: Event) -> bool:
            if not is_due(state, event):
                return False
            batch = state.timestamp.batch.value
            if saver.last_checkpoint_batch != state.timestamp.batch:
                every = [int(one) for one in channel.gather(torch.tensor(batch))]
                if len({*every}) > 1:
                    at = ', '.join(map(str, every))
                    raise TeacherError(f'the teams would save different batches ({at}): give save_interval in batches')
            return True

        return is_due_in_all

    def compare(self, batch: int) -> None:
        """See whether teams in step begin at the same batch, wherever their checkpoints came from.

        Raises:
            RecipeError: They do not, or another team does not come.
        """

        def look() -> None:
            every = self._agree('batch', batch)
            if len({*every}) > 1:
                at = ', '.join(f'team{index} at batch {one}' for index, one in enumerate(every))
                todo = 'put checkpoints of one batch where each looks for them, or start anew under another run_name'
                raise self._recipe.error(self._key, f'the teams would begin apart: {at}; {todo}', exit_code=1)

        if self._in_step:
            on_rank_zero(look)

    def signs_of_life(self) -> SignsOfLife:
        """What is to be among the callbacks of this team's run."""
        seconds = min(_SECONDS_BETWEEN_SIGNS, self._team.timeout / 4)
        return SignsOfLife(self._store, f'alive/{self._team.index}', seconds)

    def remove(self) -> None:
        """Remove the launch's folder if it is new, and no team has anything in it."""
        assert self.folder is not None
        with suppress(OSError):  # another team does the same
            names = [path.name for path in self.folder.iterdir()]
            ours = {'recipe.yaml', *self._files}
            if self._is_new and all(name in ours or name.endswith('.lock') for name in names):
                for name in names:
                    (self.folder / name).unlink()
                self.folder.rmdir()

    def conclude(self, summary: dict[str, Any]) -> None:
        """Hand in this team's summary. Team 0 waits for those of all, and writes and prints the launch's.

        Raises:
            RecipeError: A team is gone, or gives no sign of life for as long as the time-out.
        """
        if self._team.rank == 0 and (every := self.hand_in(summary)):
            self._write(every)

    def hand_in(self, summary: dict[str, Any]) -> list[dict[str, Any]]:
        """Hand in this team's summary, as its rank 0.

        Returns:
            Those of all teams, for which team 0 waits; nothing to other teams.

        Raises:
            RecipeError: A team is gone, or gives no sign of life for as long as the time-out.
        """
        try:
            self._store.set(f'summary/{self._team.index}', json.dumps(summary))
            return self._summaries() if self._team.index == 0 else []
        except RuntimeError as error:
            lost = error if isinstance(error, PeerLost) else peer_lost('the end of the launch', [KEEPER])
            raise self._recipe.error(self._key, str(lost), exit_code=1) from error

    def _take(self) -> dict[str, Any]:
        self._agree('built', True)
        taken: dict[str, Any] = {}
        if self._team.index == 0:
            try:
                folder, is_new = claim(self._recipe, self._lock)
                for name, text in self._files.items():
                    write(folder / name, text)
                taken = {'folder': str(folder), 'is_new': is_new}
            except RecipeError as error:
                taken = {'error': str(error), 'exit_code': error.exit_code}
        return self._agree('folder', taken)[0]

    def _level(self, checkpoints: Path) -> None:
        assert self.folder is not None
        own = [*kept_checkpoints(checkpoints)] if self._recipe.config.get('autoresume') else []
        every = self._agree('checkpoints', own) if self._in_step else []
        if any(every):
            common = set.intersection(*(set(batches) for batches in every))
            if not common and not all(every) and max(map(len, every)) == 1:
                common = {0}  # killed while they saved for the first time
            if not common:
                at = '; '.join(
                    f'team{index}: {", ".join(map(str, batches)) or "none"}' for index, batches in enumerate(every)
                )
                what = f'the teams have no checkpoints of the same batch ({at})'
                these = self.folder if checkpoints.is_relative_to(self.folder) else 'them'
                raise self._recipe.error(self._key, f'{what}; delete {these} to start anew', exit_code=1)
            if own and own[-1] != max(common):
                say(f'going back from batch {own[-1]} to {max(common)}, which all teams have a checkpoint of')
                go_back(checkpoints, max(common))
        if self._team.index == 0 and not self._is_new:
            (self.folder / 'summary.json').unlink(missing_ok=True)
            write_recipe(self._recipe, self.folder)

    def _agree(self, topic: str, value: Any) -> list[Any]:
        try:
            return self._channel.agree(topic, value)
        except PeerLost as error:
            raise self._recipe.error(self._key, str(error), exit_code=1) from error

    def _summaries(self) -> list[dict[str, Any]]:
        """Those of all teams, for which it waits while they give signs of life."""
        keys = {f'summary/{index}': f'team {index}' for index in range(self._team.number)}
        heard: dict[str, tuple[int, float]] = {}
        while missing := absent(self._store, keys, _SECONDS_BETWEEN_LOOKS):
            for who in missing:
                signs, now = self._store.add(f'alive/{who.removeprefix("team ")}', 0), time.monotonic()
                if signs != heard.setdefault(who, (signs, now))[0]:
                    heard[who] = signs, now
                elif now - heard[who][1] > self._team.timeout:
                    raise peer_lost('the end of the launch', [who], self._team.timeout)
        return [json.loads(self._store.get(key)) for key in keys]

    def _write(self, summaries: list[dict[str, Any]]) -> None:
        assert self.folder is not None
        number, metric = best([summary['metrics'] for summary in summaries])
        summary = dict(summaries[number])
        if summary['checkpoint'] is not None:
            summary['checkpoint'] = str(Path(f'team{number}', summary['checkpoint']))
        summary |= {
            'run_name': self.folder.name,
            'recipe': str(self._recipe.path),
            'best_team': number,
            'best_by': metric,
            'teams': {f'team{index}': one['metrics'] for index, one in enumerate(summaries)},
        }
        if (self.folder / f'team{number}' / 'checkpoints').is_dir():
            link = unfinished(self.folder / 'checkpoints')
            link.symlink_to(f'team{number}/checkpoints')
            link.replace(self.folder / 'checkpoints')
        write(self.folder / 'summary.json', json.dumps(summary, indent=2) + '\n')
        table = [f'  team{index}  {_value(one["metrics"], metric):.4f}' for index, one in enumerate(summaries)]
        say('\n'.join([f'{self.folder.name}: team{number} is the best of {len(summaries)} by {metric}', *table]))


def join(plan: Plan, overrides: Sequence[str]) -> tuple[Plan, TeamRun | None]:
    """Split the launch if the recipe says so.

    Args:
        plan: Of the recipe as it stands.
        overrides: With which it was loaded.

    Returns:
        The plan of this process's own run, and its team's part in the launch; of a recipe without teams, the plan that
        was given, and None.

    Raises:
        RecipeError: The processes of this launch cannot be so many teams, or do not meet.
    """
    recipe = plan.recipe
    number = recipe.config.get('teams', 1)
    if number == 1:
        return plan, None
    try:
        # Sooner than Composer's own time-out, after which the other ranks of a team give up on the one that waits.
        team = teams.split(number, timeout=0.9 * plan.trainer.get('dist_timeout', 300.0))
    except (ValueError, PeerLost) as error:
        raise recipe.error(('teams',), str(error), 2 if isinstance(error, ValueError) else 1) from error
    data, where = team_data(plan), [COMMAND_LINE] * len(overrides) + [recipe.where(('seed',))]
    own = load(recipe.path, [*overrides, f'seed={recipe.config["seed"] + team.index}'], where)
    del own.config['teams']
    own.config.pop('team_data', None)
    own.config['of_teams'] = number  # without whom it may have nobody to learn from
    if data == 'same':
        own.config['train_data'] = recipe.config['train_data']
    elif data == 'disjoint':
        own.config['train_data'] = {**own.config['train_data'], 'part': [team.index, number]}
    own.config['save_num_checkpoints_to_keep'] = recipe.config['save_num_checkpoints_to_keep']
    if own.config.get('save_folder'):
        own.config['save_folder'] += f'/team{team.index}'
    return check(own), TeamRun(team, recipe, in_step=exchange_of(plan) is not None)


def best(metrics: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
    """The best of several runs, the first of those that are alike, and the metric that says so.

    That is the first metric of evaluation of which more is better, such as accuracy; if there is none, the first one
    of evaluation, such as cross entropy; without evaluation, the loss in training.

    Args:
        metrics: Of each run, as in its summary.
    """
    evaluated = [name for name in metrics[0] if is_evaluation(name)]
    more = [name for name in evaluated if not any(word in name.lower() for word in _LESS_IS_BETTER)]
    metric = [*more, *evaluated, 'loss/train/total'][0]
    values = [_value(one, metric) * (1 if more else -1) for one in metrics]
    ranked = [value if value == value else float('-inf') for value in values]  # a run that ended with NaN is no good
    return ranked.index(max(ranked)), metric


def _value(metrics: Mapping[str, Any], metric: str) -> float:
    return float(metrics.get(metric, 'nan'))
