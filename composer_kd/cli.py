"""The command `composer-kd`, and running a recipe as a script."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

from composer_kd.launching import leave_ranks

COMMANDS = ('check', 'export', 'glue', 'record', 'sweep', 'sequence', 'report', 'churn', 'plan')
SECONDS_FOR_RANK_ZERO = 20  # to say what is wrong, before another rank does
SECONDS_FOR_TEAM_ZERO = 5  # likewise, before another team's rank 0 does


def main(argv: Sequence[str] | None = None) -> int:
    """`composer-kd`: returns the exit code."""
    parser = argparse.ArgumentParser(prog='composer-kd', description='Recipes that train faster by distillation.')
    parser.add_argument('--version', action='version', version=f'composer-kd {version("composer-kd")}')
    commands = parser.add_subparsers(dest='command', required=True)
    check = commands.add_parser('check', help='check recipes and studies without data or training')
    check.add_argument('files', nargs='+', metavar='FILE')
    export = commands.add_parser(
        'export', help="write a checkpoint of a text model as Hugging Face's libraries load it"
    )
    export.add_argument('checkpoint', metavar='CHECKPOINT', help='a checkpoint, or the folder of a run')
    export.add_argument('folder', metavar='DIR', help='the folder to make')
    glue = commands.add_parser('glue', help='fine-tune a checkpoint on the tasks of GLUE, and tabulate its scores')
    glue.add_argument('checkpoint', metavar='CHECKPOINT', help='what `model.pretrained` of a recipe takes')
    glue.add_argument('overrides', nargs='*', metavar='key=value', help='for the recipes of all tasks')
    glue.add_argument('--recipes', metavar='DIR', default='yamls/glue', help='default: %(default)s')
    glue.add_argument('--tasks', metavar='TASK,...', help='default: all eight', type=lambda names: names.split(','))
    glue.add_argument('--seeds', metavar='N', type=int, default=5, help='of each small task; default: %(default)s')
    glue.add_argument('--jobs', metavar='N', type=int, help='runs at the same time; default: one for each GPU')
    glue.add_argument('--runs-dir', metavar='DIR', default='runs', help='default: %(default)s')
    glue.add_argument('--kd', action='store_true', help='run the recipes that distill, <task>_kd.yaml')
    record = commands.add_parser('record', help="write down what a recipe's teachers say, to learn from it later")
    record.add_argument('file', metavar='RECIPE', help='a recipe with teachers')
    record.add_argument('overrides', nargs='*', metavar='key=value', help='for the recipe')
    record.add_argument('--views', metavar='N', type=int, help='how many views of each sample; sets train_data.views')
    record.add_argument('--out', metavar='DIR', help='the folder of the record; default: records/<name of the recipe>')
    record.add_argument(
        '--top', metavar='K', type=int, help='keep the K largest logits; default: 10, if over 32 classes'
    )
    record.add_argument('--dtype', choices=('float16', 'float32'), help='default: float16 with K, else float32')
    record.add_argument('--verify', action='store_true', help='record nothing, but compare some of what is recorded')
    record.add_argument('-n', '--ranks', metavar='RANKS', type=int, help='processes; default: one for each GPU')
    sweep = commands.add_parser('sweep', help='run a grid of recipes, each run a process of its own; rows at the end')
    sweep.add_argument('file', metavar='SWEEP', help='a YAML file with `methods`')
    sweep.add_argument('--jobs', metavar='N', type=int, help='runs at the same time; default: as many as have GPUs')
    sweep.add_argument(
        '-n', '--ranks', metavar='RANKS', type=int, help='processes of each run, without GPUs; default: 1'
    )
    sweep.add_argument('--launcher', choices=('local', 'slurm'), default='local', help='default: %(default)s')
    sweep.add_argument(
        '--slurm', metavar='key=value', action='append', default=[], help='for the launcher slurm, as submitit names it'
    )
    sequence = commands.add_parser('sequence', help='run recipes one after another, each taught by those before')
    sequence.add_argument('file', metavar='SEQUENCE', help='a YAML file with `arms`')
    for study in (sweep, sequence):
        study.add_argument(
            '--gpus-per-job', metavar='G', type=int, help='GPUs of each run; default: all, divided among the jobs'
        )
        study.add_argument('--retry', action='store_true', help='start again what failed before')
        study.add_argument('--dry-run', action='store_true', help='print the runs, and start none')
    report = commands.add_parser('report', help='curves, speed-ups and tables of studies, as one HTML page')
    report.add_argument('folders', nargs='+', metavar='FOLDER', help='of a study')
    report.add_argument('--out', metavar='DIR', help='default: the first folder')
    report.add_argument(
        '--charge',
        choices=('none', 'recording', 'teacher', 'all'),
        default='none',
        help='what a run pays beside its own training; default: %(default)s',
    )
    report.add_argument('--metric', metavar='NAME', help='what is compared; default: what the studies say')
    report.add_argument('--goal', choices=('max', 'min'), help='whether more of it is better; default: likewise')
    churn = commands.add_parser('churn', help='how much trained networks differ in what they say about the same data')
    churn.add_argument('first', metavar='A', help='the folder of a run, or a checkpoint in it')
    churn.add_argument('others', nargs='+', metavar='B', help='likewise; of more than two, all pairs are compared')
    churn.add_argument('--data', metavar='RECIPE', help="whose eval_data they are asked about; default: the runs' own")
    churn.add_argument('--out', metavar='FILE', help='write the figures to a file, too, as JSON')
    plan = commands.add_parser('plan', help='where the blocks of a student go that learns block by block')
    plan.add_argument('file', metavar='RECIPE', help='a recipe with `blockwise`')
    plan.add_argument('overrides', nargs='*', metavar='key=value', help='for the recipe')
    plan.add_argument('-n', '--devices', metavar='N', type=int, required=True, help='how many there are')
    plan.add_argument(
        '--profile', metavar='FILE', help='what blocks cost, by `--out` elsewhere; default: measured here'
    )
    plan.add_argument('--out', metavar='DIR', help='write the plan, its picture and the profile to a folder')
    arguments, rest = parser.parse_known_args(argv)
    # Overrides that stand behind an option are left over.
    if unknown := [
        item for item in rest if arguments.command not in ('glue', 'record', 'plan') or item.startswith('-')
    ]:
        parser.error(f'unrecognized arguments: {" ".join(unknown)}')
    work = {
        'check': lambda: check_recipes(arguments.files),
        'export': lambda: export_checkpoint(arguments.checkpoint, arguments.folder),
        'glue': lambda: run_glue(arguments, [*arguments.overrides, *rest]),
        'record': lambda: record_teachers(
            arguments, [*arguments.overrides, *rest], sys.argv[1:] if argv is None else argv
        ),
        'sweep': lambda: run_sweep(arguments),
        'sequence': lambda: run_sequence(arguments),
        'report': lambda: write_report(arguments),
        'churn': lambda: compare_runs(arguments),
        'plan': lambda: plan_blocks(arguments, [*arguments.overrides, *rest]),
    }
    return guarded(work[arguments.command])


def check_recipes(files: Sequence[str]) -> None:
    """Check recipes and studies one after another; says which are right."""
    from composer_kd.recipes import check, load
    from composer_kd.recipes.load import read

    for file in files:
        keys = read(file, 'recipe').config
        if 'methods' in keys:
            from composer_kd.studies.grid import read_sweep

            read_sweep(file)
        elif 'arms' in keys:
            from composer_kd.studies.sequence import check_file

            check_file(file)
        else:
            check(load(file))
        print(f'ok {file}')


def run_sweep(arguments: argparse.Namespace) -> None:
    """Run a sweep."""
    from composer_kd.studies.sweep import sweep

    sweep(
        arguments.file,
        jobs=arguments.jobs,
        gpus_per_job=arguments.gpus_per_job,
        ranks=arguments.ranks,
        launcher=arguments.launcher,
        slurm=arguments.slurm,
        retry=arguments.retry,
        dry_run=arguments.dry_run,
    )


def run_sequence(arguments: argparse.Namespace) -> None:
    """Run a sequence."""
    from composer_kd.studies.sequence import sequence

    sequence(arguments.file, gpus_per_job=arguments.gpus_per_job, retry=arguments.retry, dry_run=arguments.dry_run)


def write_report(arguments: argparse.Namespace) -> None:
    """Write the report of studies; says where."""
    from composer_kd.studies.report import report

    chosen = {name: getattr(arguments, name) for name in ('out', 'charge', 'metric', 'goal')}
    print(report(arguments.folders, **chosen))


def compare_runs(arguments: argparse.Namespace) -> None:
    """Compare what the networks of runs say."""
    from composer_kd.churn import compare

    compare([arguments.first, *arguments.others], data=arguments.data, out=arguments.out)


def plan_blocks(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Plan where blocks go."""
    from composer_kd.recipes.planning import plan_recipe

    plan_recipe(arguments.file, overrides, devices=arguments.devices, profile=arguments.profile, out=arguments.out)


def export_checkpoint(checkpoint: str, folder: str) -> None:
    """Export a checkpoint; says what loads it."""
    from composer_kd.export import export
    from composer_kd.recipes import RecipeError

    try:
        loader = export(checkpoint, folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(str(error), exit_code=1) from error
    print(f'{folder}: {loader}.from_pretrained and AutoTokenizer.from_pretrained load it')


def run_glue(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Fine-tune a checkpoint on GLUE."""
    from composer_kd.glue import glue

    glue(
        arguments.checkpoint,
        recipes=arguments.recipes,
        tasks=arguments.tasks or (),
        seeds=arguments.seeds,
        jobs=arguments.jobs,
        runs_dir=arguments.runs_dir,
        distilled=arguments.kd,
        overrides=overrides,
    )


def record_teachers(arguments: argparse.Namespace, overrides: Sequence[str], command: Sequence[str]) -> None:
    """Record what the teachers of a recipe say, on this rank; `command` is run again on each, if there are several."""
    if 'RANK' not in os.environ:
        launch(command, _ranks(arguments, overrides))

    from composer_kd.record import record

    record(
        arguments.file,
        overrides,
        views=arguments.views,
        out=arguments.out,
        top=arguments.top,
        dtype=arguments.dtype,
        verify=arguments.verify,
    )
    leave_ranks()


def _ranks(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """How many processes are to record: one for each GPU that the recipe uses, unless somebody says."""
    if arguments.ranks is not None and arguments.ranks > 0:
        return arguments.ranks

    import torch

    from composer_kd.recipes.load import RecipeError, load

    if arguments.ranks is not None:
        raise RecipeError(f'composer-kd record: -n {arguments.ranks}: there must be at least one process')
    gpus = torch.cuda.device_count()
    return gpus if gpus > 1 and load(arguments.file, overrides).config.get('device') != 'cpu' else 1


def launch(arguments: Sequence[str], ranks: int) -> None:
    """Become Composer's launcher, which runs this very command on several ranks; return where one is enough."""
    if ranks > 1:
        command = [sys.executable, '-m', 'composer.cli', '-n', str(ranks), '-m', 'composer_kd', *arguments]
        os.execv(sys.executable, command)


def run_recipe(file: str, overrides: Sequence[str]) -> int:
    """Run a recipe on this rank; returns the exit code."""

    def work() -> None:
        from composer_kd.recipes import run

        run(file, overrides)
        leave_ranks()

    return guarded(work)


def guarded(work: Callable[[], None]) -> int:
    """Do some work on a recipe; an error that people can cause becomes one line, and the exit code.

    Of several ranks the first speaks, of several teams the first rank of the first. The others wait for the launcher to
    end them once it has, and speak up only if it has not: then the error is theirs alone. That another team is lost
    each says at once.
    """
    try:
        work()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # Now, since Composer takes seconds to import.
        from composer_kd.channel import PeerLost
        from composer_kd.recipes.load import RecipeError
        from composer_kd.teams import current

        if not isinstance(error, RecipeError):
            raise
        rank, team = int(os.environ.get('RANK', 0)), current()
        who, patience = [], 0
        if team and team.index > 0:
            who, patience = [f'team{team.index}'], SECONDS_FOR_TEAM_ZERO
        if rank > 0:
            who, patience = [*who, f'rank {rank}'], SECONDS_FOR_RANK_ZERO
        if not isinstance(error.__cause__, PeerLost):
            time.sleep(patience)
        print(*who, error, sep=': ', file=sys.stderr, flush=True)
        return error.exit_code
    return 0
