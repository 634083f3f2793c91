"""A recipe with `blockwise`: a student that learns block by block, on all processes of one launch."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import DataSpec
from composer.models import ComposerModel
from composer.utils import dist, reproducibility
from torch import nn
from torch.distributed import PrefixStore

from composer_kd import teams
from composer_kd.blockwise.assemble import assemble
from composer_kd.blockwise.pairs import BlockPairs
from composer_kd.blockwise.relay import Hop, Inlet, Outlet, join
from composer_kd.blockwise.settings import Blockwise
from composer_kd.blockwise.stage import TeacherRelay, stage
from composer_kd.channel import KEEPER, PeerLost, absent, peer_lost
from composer_kd.checkpoints import CheckpointError, file_sha256
from composer_kd.files import write
from composer_kd.launching import leave_ranks
from composer_kd.memory import free_closed_runs
from composer_kd.recipes.build import build_teacher
from composer_kd.recipes.check import Plan, check
from composer_kd.recipes.folder import check_name, on_rank_zero, run_folder
from composer_kd.recipes.load import COMMAND_LINE, RecipeError, load
from composer_kd.recipes.lock import FolderLock
from composer_kd.recipes.report import circumstances, say
from composer_kd.recipes.run import start, train
from composer_kd.recipes.team_run import TeamRun

_DEAL = 'deal.json'  # in the folder of a launch: so that it goes on with the same blocks in the same places
_SECONDS_TO_PLAN = 600.0
_OF_A_LAUNCHER = ('MASTER_ADDR', 'MASTER_PORT', *teams.Place.of({}).variables())


@dataclass(frozen=True)
class Deal:
    """Which blocks each team of a launch trains.

    Args:
        sizes: How many processes each team has.
        runs: For each team, the blocks of each of its runs, one run after another.
    """

    sizes: list[int]
    runs: list[list[list[int]]]


def run_blockwise(plan: Plan, overrides: Sequence[str]) -> dict[str, Any]:
    """Do what a recipe with `blockwise` says; the student is assembled and evaluated at the end.

    Args:
        plan: Of the recipe.
        overrides: With which it was loaded.

    Returns:
        The summary of the launch, as in its `summary.json`; in all teams but the first, `runs`, those of theirs.

    Raises:
        RecipeError: If the recipe is wrong, or cannot be followed here.
    """
    assert plan.blockwise is not None
    recipe, settings, timeout = plan.recipe, plan.blockwise(), 0.9 * plan.trainer.get('dist_timeout', 300.0)
    try:
        deal = _agreed(plan, settings, overrides, timeout)
        team = teams.split(deal.sizes, timeout=timeout) if len(deal.sizes) > 1 else teams.undivided(timeout)
        start(plan)
        group = join(team.store, team.launch_rank, sum(deal.sizes), timeout) if len(deal.sizes) > 1 else None
    except RecipeError:
        raise
    except (ValueError, PeerLost) as error:
        raise recipe.error(('blockwise',), str(error), 2 if isinstance(error, ValueError) else 1) from error
    on_rank_zero(lambda: check_name(recipe))
    is_relay = settings.schedule == 'relay' and len(deal.sizes) > 1
    try:
        files = {_DEAL: json.dumps([deal.sizes, deal.runs]) + '\n'}
        with FolderLock(recipe) as lock, TeamRun(team, recipe, is_relay, files) as team_run:
            summaries = []
            for blocks in deal.runs[team.index]:
                team_run.part = name_of(blocks)
                made: list[TeacherRelay] = []
                make = partial(
                    _keywords, settings=settings, blocks=blocks, deal=deal, team=team, group=group, made=made
                )
                summary = train(_own(plan, overrides, team_run.part), lock, team_run, make)
                summaries.append(summary | {'teacher_block_runs': sum(made[0].runs.values())})
            summary = {'runs': summaries}
            if every := on_rank_zero(lambda: team_run.hand_in(summary)):
                summary = _finish(plan, settings, team_run, deal, every)
            leave_ranks()
            return summary
    finally:
        free_closed_runs()


def name_of(blocks: Sequence[int]) -> str:
    """What the run of some neighbouring blocks is called."""
    return f'block{blocks[0]}' if len(blocks) == 1 else f'blocks{blocks[0]}-{blocks[-1]}'


def networks(
    plan: Plan, settings: Blockwise, checkpoint: tuple[Path, str] | None = None
) -> tuple[ComposerModel, BlockPairs]:
    """Build student and teacher, and cut both.

    Args:
        plan: The plan.
        settings: How to cut.
        checkpoint: File and SHA-256 of the teacher's weights. Default: None, those of its recipe's model.

    Returns:
        The student, with the weights that its seed gives it; and the blocks.

    Raises:
        RecipeError: Something cannot be built, or cut.
    """
    reproducibility.seed_all(plan.trainer['seed'])
    student = plan.model()
    teacher = build_teacher(plan, 0, checkpoint, {}).network
    inputs = batch_of(plan, plan.train_data())[0][:2]
    try:
        pairs = settings.pairs(_inner(teacher), _inner(student), inputs, seed=plan.trainer['seed'])
    except ValueError as error:
        raise plan.recipe.error(('blockwise',), str(error)) from error
    return student, pairs


def batch_of(plan: Plan, data: DataSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The first batch of data: inputs and labels."""
    batch = data.microbatch_transforms(data.batch_transforms(next(iter(data.dataloader))))
    if not isinstance(batch, Sequence) or len(batch) != 2 or not isinstance(batch[0], torch.Tensor):
        what = 'batches of inputs and labels are needed to learn block by block'
        raise plan.recipe.error(('train_data',), f'{what}, not {type(batch).__name__}')
    return batch[0], batch[1]


def number_of_blocks(settings: Blockwise) -> int:
    """How many blocks there are."""
    if isinstance(settings.cut, int):
        return settings.cut
    return 1 + len(settings.cut['teacher'] if isinstance(settings.cut, Mapping) else settings.cut)


def _inner(network: nn.Module) -> nn.Module:
    """The network that a ComposerModel wraps."""
    inner = getattr(network, 'module', network)
    return inner if isinstance(inner, nn.Module) else network


def _agreed(plan: Plan, settings: Blockwise, overrides: Sequence[str], timeout: float) -> Deal:
    """The deal, which process 0 makes, on all processes."""
    place = teams.Place.of(os.environ)
    if place.world_size == 1:
        return _deal(plan, settings, overrides, 1)
    store = PrefixStore('blockwise', teams.meet(timeout))
    if place.rank == 0:
        deal = _deal(plan, settings, overrides, place.world_size)
        store.set('deal', json.dumps([deal.sizes, deal.runs]))
        return deal
    if missing := absent(store, {'deal': KEEPER}, max(timeout, _SECONDS_TO_PLAN)):
        raise peer_lost('the plan', missing)
    return Deal(*json.loads(store.get('deal')))


def _deal(plan: Plan, settings: Blockwise, overrides: Sequence[str], processes: int) -> Deal:
    blocks = number_of_blocks(settings)
    if plan.trainer.get('autoresume') and (file := run_folder(plan.recipe) / _DEAL).is_file():
        return _read(plan, file, blocks, processes)
    if settings.schedule == 'layer_split' and processes > blocks:
        raise ValueError(f'{blocks} blocks cannot be split over {processes} processes: start {blocks} (composer -n)')
    if settings.schedule == 'data_parallel':
        return Deal([processes], [[[block] for block in range(blocks)]])
    if settings.stages is not None:
        stages = settings.given_stages(blocks, processes)
        return Deal([len(each.devices) for each in stages], [[[*each.blocks]] for each in stages])
    if processes == 1:
        runs = [[*range(blocks)]] if settings.schedule == 'relay' else [[block] for block in range(blocks)]
        return Deal([1], [runs])
    planned = _planned(plan, overrides, processes)
    if settings.schedule == 'layer_split':
        return Deal([1] * processes, [[[block] for block in dealt] for dealt in planned['layer_split']])
    return Deal([last - first for first, last in planned['devices']], [[[*range(*ends)]] for ends in planned['blocks']])


def _read(plan: Plan, file: Path, blocks: int, processes: int) -> Deal:
    """The deal with which a launch began."""
    todo = f'delete {file.parent} to start anew'
    try:
        deal = Deal(*json.loads(file.read_text(encoding='utf-8')))
        dealt = sorted(block for of_team in deal.runs for of_run in of_team for block in of_run)
        is_whole = dealt == [*range(blocks)] and len(deal.sizes) == len(deal.runs)
    except (OSError, ValueError, TypeError) as error:
        raise plan.recipe.error((), f'{file} is damaged; {todo}', exit_code=1) from error
    if not is_whole or sum(deal.sizes) != processes:
        what = f'{file.parent} began with {sum(deal.sizes)} processes and {len(dealt)} blocks'
        raise plan.recipe.error((), f'{what}, not with {processes} and {blocks}; start as many, or {todo}')
    return deal


def _planned(plan: Plan, overrides: Sequence[str], processes: int) -> dict[str, Any]:
    """What `composer-kd plan` says, in a process of its own, so that this one does not use CUDA before it is split."""
    with tempfile.TemporaryDirectory() as folder:
        command = ['plan', str(plan.recipe.path), *overrides, '-n', str(processes), '--out', folder]
        environment = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
        done = subprocess.run([sys.executable, '-m', 'composer_kd', *command], env=environment)
        if done.returncode:
            todo = 'see above; or give the stages: blockwise.stages=[[2, 1], ...]'
            raise plan.recipe.error(('blockwise',), f'no plan was found: {todo}', exit_code=1)
        return json.loads(Path(folder, 'plan.json').read_text(encoding='utf-8'))


def _own(plan: Plan, overrides: Sequence[str], part: str) -> Plan:
    """The plan of one run of blocks: that of the recipe, without what is for the whole student."""
    own = load(plan.recipe.path, overrides, COMMAND_LINE)
    own.config.pop('eval_data', None)
    if own.config.get('save_folder'):
        own.config['save_folder'] += f'/{part}'
    return check(own)


def _keywords(
    plan: Plan,
    checkpoints: Sequence[tuple[Path, str] | None],
    *,
    settings: Blockwise,
    blocks: Sequence[int],
    deal: Deal,
    team: teams.Team,
    group: Any,
    made: list[TeacherRelay],
) -> dict[str, Any]:
    """Keywords of the Trainer of one run of blocks; its algorithm is added to `made`."""
    _, pairs = networks(plan, settings, checkpoints[0])
    data = plan.train_data()
    options: dict[str, Any] = {'seed': plan.trainer['seed']}
    is_relay = settings.schedule == 'relay'
    if is_relay and team.index > 0:
        inlet = Inlet(group, team.store, _hop(deal, team.index), team.rank, depth=settings.depth, timeout=team.timeout)
        # The loader of stage 0 is like this one, but for how many share a batch.
        options |= {'inlet': inlet, 'batch_size': _batch_size(data), 'length': _length(data)}
    else:
        options['data'] = data
    if is_relay and team.index + 1 < team.number:
        hop = _hop(deal, team.index + 1)
        options['outlet'] = Outlet(
            *(group, team.store, hop, team.rank),
            depth=settings.depth,
            most=_batch_size(data) * team.size,
            dtype=settings.on_the_way,
            timeout=team.timeout,
        )
    if not is_relay:
        options['teachers'] = range(blocks[-1] + 1)
    keywords = stage(pairs, blocks, **options)
    made += keywords['algorithms']
    if plan.optimizer:
        keywords['optimizers'] = plan.optimizer(params=keywords['model'].parameters())
    for section in ('schedulers', 'callbacks', 'loggers'):
        keywords[section] = [call() for call in getattr(plan, section)]
    return plan.trainer | keywords


def _hop(deal: Deal, to: int) -> Hop:
    """The link to a stage from the one before."""
    ends = [*itertools.accumulate(deal.sizes, initial=0)]

    def who(rank: int) -> str:
        index = next(index for index, end in enumerate(ends[1:]) if rank < end)
        return f'stage {index} rank {rank - ends[index]}'

    return Hop(f'from stage {to - 1} to {to}', range(ends[to - 1], ends[to]), range(ends[to], ends[to + 1]), who)


def _batch_size(data: DataSpec) -> int:
    size: Any = getattr(data.dataloader, 'batch_size', None)
    return size


def _length(data: DataSpec) -> int | None:
    try:
        return len(data.dataloader)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


def _finish(
    plan: Plan, settings: Blockwise, team_run: TeamRun, deal: Deal, summaries: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Assemble the student, evaluate it, and write the summary of the launch; on all processes of the first team."""
    folder = team_run.folder
    assert folder is not None
    runs = [run for summary in summaries for run in summary['runs']]
    names = [name_of(blocks) for of_team in deal.runs for blocks in of_team]
    files = [folder / name / run['checkpoint'] for name, run in zip(names, runs, strict=True)]
    student, pairs = networks(plan, settings)
    try:
        assemble(pairs, files)
    except CheckpointError as error:
        raise plan.recipe.error((), str(error), exit_code=1) from error
    keywords: dict[str, Any] = {
        name: plan.trainer[name] for name in ('device', 'precision', 'seed') if name in plan.trainer
    }
    keywords['optimizers'] = torch.optim.SGD(student.parameters(), lr=0.0)  # for nothing, but Trainer wants one
    if plan.eval_data:
        keywords['eval_dataloader'] = plan.eval_data()
    trainer = Trainer(model=student, run_name=folder.name, progress_bar=False, **keywords)
    if plan.eval_data:
        trainer.eval()
    metrics = {
        f'metrics/{label}/{name}': float(metric.compute())
        for label, of_label in trainer.state.eval_metrics.items()
        for name, metric in of_label.items()
    }
    checkpoint = folder / 'checkpoints' / 'latest-rank0.pt'
    beside = checkpoint.with_name('.assembled.tmp')
    trainer.save_checkpoint(str(beside), weights_only=True)
    if dist.get_global_rank() == 0:
        beside.replace(checkpoint)
    losses = {name: value for run in runs for name, value in run['metrics'].items() if name.startswith('loss/train/bl')}
    seconds = [sum(run['train_seconds'] for run in summary['runs']) for summary in summaries]
    summary = {
        **runs[0],
        'run_name': folder.name,
        'recipe': str(plan.recipe.path),
        'metrics': metrics | dict(sorted(losses.items())),
        'train_seconds': max(seconds),
        'samples_per_second': runs[0]['samples'] / max(seconds) if max(seconds) else None,
        **circumstances(trainer.state),
        'world_size': sum(deal.sizes),
        'parameters': sum(parameter.numel() for parameter in student.parameters()),
        'checkpoint': str(checkpoint.relative_to(folder)),
        **dict.fromkeys(('teacher_seconds', 'teacher_forwards', 'teacher_share')),  # it runs in parts, and meanwhile
        'schedule': settings.schedule,
        'teacher_block_runs': sum(run['teacher_block_runs'] for run in runs),  # since it was last started
        'stages': {name_of(blocks): size for size, runs in zip(deal.sizes, deal.runs, strict=True) for blocks in runs},
    }
    trainer.close()
    if dist.get_global_rank() == 0:
        summary['checkpoint_sha256'] = file_sha256(checkpoint)
        write(folder / 'summary.json', json.dumps(summary, indent=2) + '\n')
    table = [f'  {name:<40} {float(value):.4f}' for name, value in summary['metrics'].items()]
    said = f'{folder.name}: {len(pairs)} blocks, {summary["batches"]} batches, {max(seconds):.1f} s of training'
    say('\n'.join([said, *table, f'  checkpoint  {checkpoint}', f'  blocks      in {", ".join(names)} there']))
    return summary
