"""The command `composer-kd`, and running a recipe as a script."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

SECONDS_FOR_RANK_ZERO = 20  # to say what is wrong, before another rank does


def main(argv: Sequence[str] | None = None) -> int:
    """`composer-kd`: returns the exit code."""
    parser = argparse.ArgumentParser(prog='composer-kd', description='Recipes that train faster by distillation.')
    parser.add_argument('--version', action='version', version=f'composer-kd {version("composer-kd")}')
    commands = parser.add_subparsers(dest='command', required=True)
    check = commands.add_parser('check', help='check recipes without data or training')
    check.add_argument('files', nargs='+', metavar='FILE')
    arguments = parser.parse_args(argv)
    return guarded(lambda: check_recipes(arguments.files))


def check_recipes(files: Sequence[str]) -> None:
    """Check recipes one after another; says which are right."""
    from composer_kd.recipes import check, load

    for file in files:
        check(load(file))
        print(f'ok {file}')


def run_recipe(file: str, overrides: Sequence[str]) -> int:
    """Run a recipe on this rank; returns the exit code."""

    def work() -> None:
        import torch.distributed

        from composer_kd.recipes import run

        run(file, overrides)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    return guarded(work)


def guarded(work: Callable[[], None]) -> int:
    """Do some work on a recipe; an error that people can cause becomes one line, and the exit code.

    Of several ranks the first speaks. The others wait for the launcher to end them once it has, and speak up only if it
    has not: then the error is theirs alone.
    """
    from composer_kd.recipes.load import RecipeError

    try:
        work()
    except RecipeError as error:
        rank = int(os.environ.get('RANK', 0))
        if rank > 0:
            time.sleep(SECONDS_FOR_RANK_ZERO)
        print(f'rank {rank}: {error}' if rank > 0 else error, file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0
