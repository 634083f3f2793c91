"""A recipe -> a plan of calls, all of whose names and arguments are known to be right; nothing is built.

Of what a recipe refers to, other recipes are read, and what earlier runs have left.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from composer_kd.algorithms import Codistillation
from composer_kd.algorithms.inputs import changes_inputs, refuse_changed_inputs
from composer_kd.blockwise.settings import Blockwise
from composer_kd.checkpoints import find_paths
from composer_kd.exchange import make_exchange
from composer_kd.recipes.bind import bind, signature
from composer_kd.recipes.folder import finished_run, run_folder
from composer_kd.recipes.load import NAMED_SECTIONS, SECTIONS, Recipe, RecipeError, load, nearest
from composer_kd.recipes.resolve import Target, resolve
from composer_kd.teachers.recorded import RecordedTeacher

DEFAULTS = {'seed': 17, 'runs_dir': 'runs', 'save_num_checkpoints_to_keep': 1}
INHERITED = ('runs_dir', 'device', 'progress_bar')  # what a teacher's recipe takes over from the student's

# Keywords of Trainer that other sections stand for, or that are no plain data.
_NOT_PLAIN = {
    *('self', 'model', 'train_dataloader', 'eval_dataloader', 'optimizers', 'schedulers', 'algorithms', 'callbacks'),
    *('loggers', 'algorithm_passes', 'load_object_store', 'profiler'),
}


@dataclass
class Call:
    """One call that a recipe describes: called, it makes an error of what is called one that says where it stands."""

    recipe: Recipe
    key: tuple[object, ...]
    target: Target
    arguments: dict[str, Any]

    def __call__(self, **supplied: Any) -> Any:
        """Make the call, with arguments that do not come from the recipe."""
        try:
            return self.target(**self.arguments, **supplied)
        except (ValueError, TypeError) as error:
            raise self.recipe.error(self.key, str(error)) from error
        except (OSError, ImportError, RuntimeError) as error:
            raise self.recipe.error(self.key, str(error) or type(error).__name__, exit_code=1) from error


@dataclass(frozen=True)
class TeacherRun:
    """A finished run that teaches: its checkpoint, the SHA-256 of that, and the seconds that training took."""

    checkpoint: Path
    sha256: str
    seconds: float

    @classmethod
    def of(cls, summary: Mapping[str, Any], folder: Path) -> 'TeacherRun':
        """From the summary that is in its folder."""
        seconds = summary['train_seconds'] + summary['teacher_training_seconds']
        return cls(folder / summary['checkpoint'], summary['checkpoint_sha256'], seconds)


@dataclass
class TeacherPlan:
    """How to get one teacher: a call, for which a model may be built.

    Its weights may be those of a run that is finished, or of one that a recipe of its own describes.
    """

    call: Call
    model: Call | None = None
    recipe: 'Plan | None' = None
    run: TeacherRun | None = None


@dataclass
class Plan:
    """Everything that a run is made of."""

    recipe: Recipe
    model: Call
    train_data: Call
    eval_data: Call | None
    optimizer: Call | None
    teachers: list[TeacherPlan] = field(default_factory=list)
    schedulers: list[Call] = field(default_factory=list)
    algorithms: list[Call] = field(default_factory=list)
    callbacks: list[Call] = field(default_factory=list)
    loggers: list[Call] = field(default_factory=list)
    blockwise: Call | None = None
    trainer: dict[str, Any] = field(default_factory=dict)


def check(recipe: Recipe, trail: tuple[Path, ...] = ()) -> Plan:
    """Resolve every name of a recipe and bind every argument, without data, downloads, or building a network.

    Args:
        recipe: The recipe; values that it leaves to us are filled in.
        trail: Recipes that led to this one, each a teacher of the one before.

    Raises:
        RecipeError: If anything is wrong with it, or with the recipe of one of its teachers.
    """
    config = recipe.config
    trainer_keys = [key for key in signature(_trainer()) if key not in _NOT_PLAIN]
    known = [*SECTIONS, 'runs_dir', 'teams', 'team_data', 'of_teams', 'blockwise', *trainer_keys]
    for key in config:
        if key not in known:
            raise recipe.error((key,), f'a recipe has no {key!r}; {nearest(key, known)}')
    for key in ('model', 'train_data', 'max_duration'):
        if config.get(key) is None:
            raise recipe.error((), f'the recipe has no {key!r}; add it')
    _check_teams(recipe)
    if config.get('blockwise') is not None:  # stages that are killed have saved different batches, too
        config.setdefault('save_num_checkpoints_to_keep', 2)
    for key, value in DEFAULTS.items():
        config.setdefault(key, value)

    plan = Plan(
        recipe,
        _builder(recipe, ('model',), config['model'], 'model'),
        _builder(recipe, ('train_data',), config['train_data'], 'data'),
        _builder(recipe, ('eval_data',), config['eval_data'], 'data') if config.get('eval_data') else None,
        _builder(recipe, ('optimizer',), config['optimizer'], 'optimizer', {'params'})
        if config.get('optimizer')
        else None,
    )
    for section in NAMED_SECTIONS:
        setattr(plan, section, _named(recipe, section))
    plan.trainer = bind(recipe, (), _trainer(), {k: config[k] for k in trainer_keys if k in config}, _NOT_PLAIN)
    _check_values(recipe)
    plan.teachers = _teachers(recipe, (*trail, recipe.path.resolve()))
    if config.get('blockwise') is not None:
        _check_blockwise(plan)
    _check_algorithms(plan)
    _check_team_data(plan)
    _check_saving_in_step(plan)
    for scheduler in plan.schedulers:
        scheduler()
    return plan


def call_of(recipe: Recipe, section: Literal['model', 'eval_data']) -> Call:
    """The call of one section of a recipe, whatever else stands in it.

    Raises:
        RecipeError: If anything is wrong with this section.
    """
    return _builder(recipe, (section,), recipe.config.get(section), 'model' if section == 'model' else 'data')


def takes_teachers(call: Call) -> bool:
    """Whether an algorithm is one that distills from teachers that a recipe names."""
    return 'teachers' in signature(call.target)


def codistills(call: Call) -> bool:
    """Whether an algorithm is one that distills from other teams."""
    return call.target is Codistillation


def team_data(plan: Plan) -> str:
    """What each of several teams trains on: the `'same'` batches, `'shared'` or `'disjoint'` data."""
    exchange = exchange_of(plan)
    usual = {None: 'shared', 'predictions': 'same'}.get(exchange, 'disjoint')
    return plan.recipe.config.get('team_data') or usual


def _trainer() -> Target:
    from composer import Trainer

    return Trainer


def _builder(recipe: Recipe, key: tuple, given: object, kind: str, supplied: Collection[str] = ()) -> Call:
    """The call of a section `{name: ..., argument: ...}`."""
    arguments, target = _named_arguments(recipe, key, kind, given)
    return Call(recipe, key, target, bind(recipe, key, target, arguments, supplied))


def _named_arguments(recipe: Recipe, key: tuple, kind: str, given: object) -> tuple[dict[str, Any], Target]:
    if not isinstance(given, Mapping) or 'name' not in given:
        raise recipe.error(key, f'must be a mapping with the name of the {kind}, not {given!r}')
    target = resolve(recipe, (*key, 'name'), kind, given['name'])
    return {name: value for name, value in given.items() if name != 'name'}, target


def _named(recipe: Recipe, section: str) -> list[Call]:
    """The calls of a section that maps names to arguments."""
    given = recipe.config.get(section) or {}
    if not isinstance(given, Mapping):
        raise recipe.error((section,), f'must be a mapping of names to arguments, not {given!r}')
    calls: dict[Target, Call] = {}
    for name, arguments in given.items():
        key = (section, name)
        target = resolve(recipe, key, section.removesuffix('s'), name)
        if target in calls:
            raise recipe.error(key, f'is there already, as {calls[target].key[-1]!r}; remove one')
        supplied = {'teachers', 'team'} & signature(target).keys() if section == 'algorithms' else set()
        calls[target] = Call(recipe, key, target, bind(recipe, key, target, arguments, supplied))
    return list(calls.values())


def _teachers(recipe: Recipe, trail: tuple[Path, ...]) -> list[TeacherPlan]:
    given = recipe.config.get('teachers') or []
    if not isinstance(given, list):
        raise recipe.error(('teachers',), f'must be a list of teachers, not {given!r}')
    return [plan for index, entry in enumerate(given) for plan in _plans(recipe, ('teachers', index), entry, trail)]


def _plans(recipe: Recipe, key: tuple, entry: object, trail: tuple[Path, ...]) -> list[TeacherPlan]:
    """The teacher that an entry describes, or those that it stands for."""
    arguments, target = _named_arguments(recipe, key, 'teacher', entry)
    if 'model' not in signature(target):
        several = _records(recipe, key, arguments) if target is RecordedTeacher else [arguments]
        return [TeacherPlan(Call(recipe, key, target, bind(recipe, key, target, each))) for each in several]
    sources = {name: arguments.pop(name, None) for name in ('model', 'recipe', 'runs')}
    overrides = arguments.pop('overrides', [])
    if sum(source is not None for source in sources.values()) != 1:
        raise recipe.error(key, 'a teacher has a `model`, a `recipe` or `runs`; give one of them')
    if sources['recipe'] is None and overrides:
        raise recipe.error((*key, 'overrides'), 'are for the recipe of a teacher; give a `recipe`, or remove them')
    call = Call(recipe, key, target, bind(recipe, key, target, arguments, {'model'}))
    if sources['model'] is not None:
        return [TeacherPlan(call, _builder(recipe, (*key, 'model'), sources['model'], 'model'))]
    for name in ('checkpoint', 'sha256'):
        if name in arguments:
            source = 'recipe' if sources['runs'] is None else 'runs'
            raise recipe.error((*key, name), f'comes from the run of `{source}`; give a `model` instead, or remove it')
    if sources['runs'] is not None:
        return [TeacherPlan(call, model, run=run) for model, run in _runs(recipe, (*key, 'runs'), sources['runs'])]
    plan = _teacher_recipe(recipe, key, sources['recipe'], overrides, trail)
    return [TeacherPlan(call, plan.model, plan)]


def _records(recipe: Recipe, key: tuple, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments for each record that the `path` of an entry matches."""
    pattern = arguments.get('path')
    if not isinstance(pattern, str) or not {*'*?['} & {*pattern}:
        return [arguments]
    folders = _folders(pattern)
    if not folders:
        todo = 'record first (composer-kd record), or change it'
        raise recipe.error((*key, 'path'), f'there is no record at {pattern}; {todo}', exit_code=1)
    return [arguments | {'path': str(folder)} for folder in folders]


def _folders(pattern: str) -> list[Path]:
    return [path for path in find_paths(pattern) if path.is_dir()]


def _runs(recipe: Recipe, key: tuple, pattern: object) -> list[tuple[Call, TeacherRun]]:
    """The finished runs that a pattern matches, each with the call that builds its model."""
    if not isinstance(pattern, str):
        raise recipe.error(key, f'must be the folder of a run, or a pattern of several, not {pattern!r}')
    folders, own = _folders(pattern), run_folder(recipe)
    if own.resolve() in [folder.resolve() for folder in folders] or _matches(own, pattern):
        raise recipe.error(key, f'{own}, the folder of this very run, is among {pattern}; choose a narrower pattern')
    if not folders:
        raise recipe.error(key, f'there is no run at {pattern}; train the teachers first, or change it', exit_code=1)
    return [_run(recipe, key, folder) for folder in folders]


def _matches(folder: Path, pattern: str) -> bool:
    """Whether a folder, which need not be there, is one that a pattern matches."""
    return folder.absolute().match(str(Path(pattern).absolute()).removesuffix('/latest'))


def _run(recipe: Recipe, key: tuple, folder: Path) -> tuple[Call, TeacherRun]:
    if not (folder / 'recipe.yaml').is_file():
        raise recipe.error(key, f'{folder} is no run: there is no recipe.yaml in it; choose a narrower pattern', 1)
    try:
        run = load(folder / 'recipe.yaml')
        run.config |= {'runs_dir': str(folder.parent), 'run_name': folder.name}
        summary = finished_run(run)
        model = _builder(run, ('model',), run.config['model'], 'model')
    except RecipeError as error:
        raise recipe.error(key, str(error), error.exit_code) from error
    if summary is None:
        todo = f'let it finish (composer {folder / "recipe.yaml"} autoresume=true), or choose a narrower pattern'
        raise recipe.error(key, f'{folder} is not finished; {todo}', exit_code=1)
    return model, TeacherRun.of(summary, folder)


def _teacher_recipe(recipe: Recipe, key: tuple, path: object, overrides: object, trail: tuple[Path, ...]) -> Plan:
    if not isinstance(path, str):
        raise recipe.error((*key, 'recipe'), f'must be the path of a recipe, not {path!r}')
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        raise recipe.error((*key, 'overrides'), f'must be a list of items key=value, not {overrides!r}')
    beside = recipe.path.parent / path
    found = beside if beside.exists() else Path(path)
    if not found.is_file():
        raise recipe.error((*key, 'recipe'), f'there is no file {beside}; give the path of a recipe')
    if found.resolve() in trail:
        raise recipe.error((*key, 'recipe'), f'{found} is taught by its own student; remove one of the two')
    name = '.'.join(map(str, (*key, 'overrides')))
    teacher = load(found, overrides, f'{recipe.where((*key, "overrides"))}: {name}')
    teacher.config |= {name: recipe.config[name] for name in INHERITED if name in recipe.config}
    if teacher.config.get('teams', 1) != 1:
        todo = 'let them train first and give their folder as `runs`, or teams=1 among its `overrides`'
        raise recipe.error((*key, 'recipe'), f'{found} is a recipe of {teacher.config["teams"]} teams; {todo}')
    return check(teacher, trail)


def _check_teams(recipe: Recipe) -> None:
    """Check how many teams there are to be; a recipe of one team is a recipe without teams."""
    teams = recipe.config.get('teams', 1)
    if isinstance(teams, bool) or not isinstance(teams, int) or teams < 1:
        raise recipe.error(('teams',), f'must be how many teams there are, 1 or more, not {teams!r}')
    if teams == 1:
        recipe.config.pop('teams', None)
    else:  # teams that are killed have saved different batches, but have the one before in common
        recipe.config.setdefault('save_num_checkpoints_to_keep', 2)


def exchange_of(plan: Plan) -> str | None:
    """What teams tell each other, by its name; None if they do not learn from each other."""
    asked = [call.arguments.get('exchange', 'predictions') for call in plan.algorithms if codistills(call)]
    return make_exchange(asked[0]).name if asked else None


def _check_team_data(plan: Plan) -> None:
    """Check whether teams can have the data that they are to have."""
    recipe, known = plan.recipe, ('same', 'shared', 'disjoint')
    given = recipe.config.get('team_data')
    if given is not None and given not in known:
        raise recipe.error(('team_data',), f'must be one of {", ".join(known)}, not {given!r}')
    if 'teams' not in recipe.config:
        if given is not None:
            raise recipe.error(('team_data',), 'is for several teams; add `teams: 2`, or leave it out')
        return
    if exchange_of(plan) == 'predictions' and team_data(plan) != 'same':
        todo = 'leave it out, or exchange weights'
        raise recipe.error(
            ('team_data',), f'predictions are exchanged about the same batches, not {given!r} data; {todo}'
        )
    if team_data(plan) != 'disjoint':
        return
    if 'part' not in signature(plan.train_data.target):
        todo = 'say `team_data: shared`, or take a data set that can'
        raise recipe.error(('train_data',), f'cannot be dealt out to teams in disjoint parts; {todo}')
    if recipe.config['train_data'].get('part') is not None:
        todo = 'leave it out, or say `team_data: shared`'
        raise recipe.error(('train_data', 'part'), f'teams with disjoint data have parts of their own; {todo}')


def _check_saving_in_step(plan: Plan) -> None:
    """Check whether teams that learn from each other, or stages, save what they can go on from together."""
    from composer.core import Time, TimeUnit

    config, exchange = plan.recipe.config, exchange_of(plan)
    if plan.blockwise is None and ('teams' not in config or exchange is None):
        return
    who, each = ('stages', 'stage') if plan.blockwise else ('teams that learn from each other', 'team')
    if config['save_num_checkpoints_to_keep'] == 1:
        what = f'{who} need their last two, to go on from the same batch'
        raise plan.recipe.error(('save_num_checkpoints_to_keep',), f'{what}; give 2, or leave it out')
    interval = config.get('save_interval', '1ep')
    unit = Time.from_input(interval, TimeUnit.EPOCH).unit
    if unit == TimeUnit.SECOND or (unit == TimeUnit.TOKEN and exchange != 'predictions'):
        what = f'{interval} comes in another batch in each {each}'
        raise plan.recipe.error(('save_interval',), f'{what}; give it in batches, samples or epochs')


def _check_blockwise(plan: Plan) -> None:
    """Check what a student needs that learns block by block."""
    recipe = plan.recipe
    arguments = bind(recipe, ('blockwise',), Blockwise, recipe.config['blockwise'])
    plan.blockwise = Call(recipe, ('blockwise',), Blockwise, arguments)
    plan.blockwise()
    if 'teams' in recipe.config:
        raise recipe.error(('teams',), 'blocks are dealt out to processes by a plan; leave it out')
    for call in plan.algorithms:
        todo = 'leave it out; what comes after block by block is a recipe of its own'
        raise recipe.error(call.key, f'algorithms are for networks as a whole; {todo}')
    networks = [teacher for teacher in plan.teachers if teacher.model is not None]
    if len(plan.teachers) != 1 or not networks:
        raise recipe.error(
            ('teachers',), 'one network teaches block by block; give one with a `model`, `recipe` or `runs`'
        )


def _check_values(recipe: Recipe) -> None:
    """Check values that are of the right type and wrong all the same."""
    from composer.core import Time, TimeUnit

    config = recipe.config
    if Time.from_input(config['max_duration'], TimeUnit.EPOCH).unit in (TimeUnit.SECOND, TimeUnit.DURATION):
        raise recipe.error(('max_duration',), 'a run is as long as so many epochs, batches, samples or tokens')
    teams = config.get('teams', 1)  # each with a seed of its own
    if config['seed'] is None or not 0 <= config['seed'] < 2**32 - teams:
        raise recipe.error(('seed',), f'must be from 0 to 2**32 - {teams + 1}, not {config["seed"]!r}')
    if not isinstance(config['runs_dir'], str):
        raise recipe.error(('runs_dir',), f'must be the path of a folder, not {config["runs_dir"]!r}')
    name = config.get('run_name')
    if name is not None and (not name or Path(name).name != name):
        raise recipe.error(('run_name',), f'must be the name of a folder, not {name!r}')


def _check_algorithms(plan: Plan) -> None:
    """Construct the algorithms, which costs nothing, and see whether they fit together."""
    from composer.core import Event

    recipe = plan.recipe
    distilling = [call for call in plan.algorithms if takes_teachers(call) or codistills(call)]
    if len(distilling) > 1:
        raise recipe.error(
            distilling[1].key, f'one distilling algorithm per run; there is {distilling[0].key[-1]!r} already'
        )
    if plan.teachers and not any(map(takes_teachers, distilling)) and not plan.blockwise:
        raise recipe.error(('teachers',), 'nothing learns from them; add knowledge_distillation to `algorithms`')
    if any(map(takes_teachers, distilling)) and not plan.teachers:
        raise recipe.error(distilling[0].key, 'there is no teacher to learn from; add a `teachers` section')

    ours = [call for call in plan.algorithms if call.target.__module__.startswith('composer_kd.')]
    built = {
        id(call): call(**_stand_ins(plan, call)) for call in plan.algorithms if call not in distilling or call in ours
    }
    _check_inputs(plan, [(call, built[id(call)]) for call in plan.algorithms if call not in distilling])
    state: Any = SimpleNamespace(algorithms=list(built.values()))
    for call in ours:
        if call not in distilling:  # they look for the one that distills, and for nothing else
            Call(recipe, call.key, built[id(call)].apply, {})(event=Event.INIT, state=state, logger=None)


def _check_inputs(plan: Plan, algorithms: Iterable[tuple[Call, Any]]) -> None:
    """See whether a student would see other inputs than those that its record is of."""
    records = [teacher.call.arguments['path'] for teacher in plan.teachers if teacher.call.target is RecordedTeacher]
    records += [call.arguments['record'] for call in plan.algorithms if call.arguments.get('record') is not None]
    for call, algorithm in algorithms:
        if records and changes_inputs(algorithm):
            Call(plan.recipe, call.key, refuse_changed_inputs, {'algorithms': [algorithm], 'teacher': records[0]})()


def _stand_ins(plan: Plan, call: Call) -> dict[str, Any]:
    """What an algorithm is given that is not there yet."""
    if codistills(call):
        config = plan.recipe.config
        return {'team': SimpleNamespace(index=0, number=config.get('teams') or config.get('of_teams', 1))}
    return {'teachers': [_unbuilt_teacher()] * len(plan.teachers)} if takes_teachers(call) else {}


def _unbuilt_teacher() -> Any:
    """Stands in for a teacher where only its being one matters."""
    methods = ('check', 'prepare', 'signal', 'release', 'manifest')
    members = dict.fromkeys(methods, lambda *_: None)
    return SimpleNamespace(name='teacher', forwards=0, replays=False, **members)
