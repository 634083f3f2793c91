"""A plan -> what Composer's Trainer is made of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer.core import Time, TimeUnit
from composer.models import ComposerModel
from composer.utils import reproducibility

from composer_kd.models.fit import misfit
from composer_kd.recipes.bind import signature
from composer_kd.recipes.check import Plan, takes_teachers
from composer_kd.recipes.folder import run_folder
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
    if isinstance(keywords['train_dataloader'], list):
        raise plan.recipe.error(plan.train_data.key, 'is more than one set, made for evaluation: train on one of them')
    _check_length(plan, keywords['train_dataloader'].dataloader)
    if plan.eval_data:
        keywords['eval_dataloader'] = plan.eval_data()
    _check_fit(plan, 'model', model, keywords)
    if plan.optimizer:
        keywords['optimizers'] = plan.optimizer(params=model.parameters())
    teachers = [build_teacher(plan, index, file, keywords) for index, file in enumerate(checkpoints)]
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


def build_teacher(plan: Plan, index: int, checkpoint: tuple[Path, str] | None, keywords: dict[str, Any]) -> Any:
    """Build one teacher.

    Args:
        plan: The plan.
        index: Of the teacher.
        checkpoint: File and SHA-256 of its checkpoint, None if it has none of a run.
        keywords: For Trainer, with the data that it has to be able to read, if any.

    Raises:
        RecipeError: It cannot be built, or does not fit the data.
    """
    teacher = plan.teachers[index]
    if teacher.model is None:
        return teacher.call()
    supplied: dict[str, Any] = {'model': teacher.model()}
    _check_fit(plan, '.'.join(map(str, teacher.call.key)), supplied['model'], keywords)
    if 'name' in signature(teacher.call.target):
        own_run = teacher.model.recipe is not plan.recipe
        supplied['name'] = run_folder(teacher.model.recipe).name if own_run else str(teacher.model.target.__name__)
    if checkpoint:
        supplied['checkpoint'], supplied['sha256'] = checkpoint
    return teacher.call(**supplied)


def _check_length(plan: Plan, loader: Any) -> None:
    """See whether the run would ever end."""
    try:
        len(loader)
    except TypeError as error:
        if Time.from_input(plan.trainer['max_duration'], TimeUnit.EPOCH).unit == TimeUnit.EPOCH:
            what = 'train_data streams without end, so that no epoch ever ends: count in batches, samples or tokens'
            raise plan.recipe.error(('max_duration',), what) from error


def _check_fit(plan: Plan, name: str, model: Any, keywords: dict[str, Any]) -> None:
    """See whether a model can read the data."""
    for data_key, data in (('train_data', 'train_dataloader'), ('eval_data', 'eval_dataloader')):
        if problem := misfit(model, keywords.get(data), model_key=name, data_key=data_key):
            raise plan.recipe.error(name.split('.'), problem)
