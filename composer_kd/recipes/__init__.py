"""Recipes: YAML files that say what to train, and how a run of one goes."""

from composer_kd.recipes.check import check
from composer_kd.recipes.load import RecipeError, load
from composer_kd.recipes.run import run

__all__ = ['RecipeError', 'check', 'load', 'run']
