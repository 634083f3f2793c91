"""Recipes: YAML files that say what to train, and how a run of one goes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer_kd.recipes.blockwise_run import run_blockwise
from composer_kd.recipes.check import check
from composer_kd.recipes.load import RecipeError, load
from composer_kd.recipes.run import run_plan

__all__ = ['RecipeError', 'check', 'load', 'run']


def run(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Do what a recipe says.

    Args:
        path: The recipe.
        overrides: `key.sub=value`.

    Returns:
        The summary of the run, as in its `summary.json`; in a launch of several teams, that of this team's run.

    Raises:
        RecipeError: If the recipe is wrong, or cannot be followed here.
    """
    plan = check(load(path, overrides))
    return run_blockwise(plan, overrides) if plan.blockwise else run_plan(plan, overrides)
