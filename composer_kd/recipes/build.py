"""A plan -> what Composer's Trainer is made of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer.models import ComposerModel
from composer.utils import reproducibility

from composer_kd.recipes.bind import signature
from composer_kd.recipes.check import Plan, TeacherPlan, takes_teachers
from composer_kd.teachers import TeacherError


def build(plan: Plan, checkpoints: Sequence[tuple[Path, str] | None]) -> dict[str, Any]:
    """Build model, data, optimizer, teachers, algorithms, callbacks and loggers. Writes nothing.

    The student's weights are a function of the recipe's seed alone: the same on all ranks, with and without teachers.

    Args:
        plan: The plan.
        checkpoints: For each teacher, file and SHA-256 of its checkpoint, None where it has none of a run.

    Returns:
        Keywords for Trainer.

    Raises:
        RecipeError: If anything cannot be built, or a teacher does not fit the student.
    """
    reproducibility.seed_all(plan.trainer['seed'])
    model = plan.model()
    if not isinstance(model, ComposerModel):
        raise plan.recipe.error(plan.model.key, f'must build a ComposerModel, not {type(model).__name__}')
    keywords: dict[str, Any] = {'model': model, 'train_dataloader': plan.train_data()}
    if plan.eval_data:
        keywords['eval_dataloader'] = plan.eval_data()
    if plan.optimizer:
        keywords['optimizers'] = plan.optimizer(params=model.parameters())
    teachers = [_teacher(teacher, file) for teacher, file in zip(plan.teachers, checkpoints, strict=True)]
    keywords['schedulers'] = [call() for call in plan.schedulers]
    keywords['algorithms'] = []
    for call in plan.algorithms:
        algorithm = call(teachers=teachers) if takes_teachers(call) else call()
        keywords['algorithms'].append(algorithm)
        if hasattr(algorithm, 'check'):
            try:
                algorithm.check(model)
            except TeacherError as error:
                raise plan.recipe.error(('teachers',), str(error)) from error
    keywords['callbacks'] = [call() for call in plan.callbacks]
    keywords['loggers'] = [call() for call in plan.loggers]
    return plan.trainer | keywords


def _teacher(plan: TeacherPlan, checkpoint: tuple[Path, str] | None) -> Any:
    if plan.model is None:
        return plan.call()
    supplied: dict[str, Any] = {'model': plan.model()}
    if 'name' in signature(plan.call.target):
        supplied['name'] = plan.recipe.recipe.path.stem if plan.recipe else str(plan.model.target.__name__)
    if checkpoint:
        supplied['checkpoint'], supplied['sha256'] = checkpoint
    return plan.call(**supplied)
