"""`composer-kd churn`: how much trained networks differ in what they say about the same data."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from composer.core import Evaluator, ensure_evaluator
from composer.devices import Device
from composer.models import ComposerModel
from composer.utils import ensure_tuple, get_device, reproducibility
from torch import Tensor
from torchmetrics import Metric
from tqdm import tqdm

from composer_kd.checkpoints import file_sha256, find_checkpoint
from composer_kd.data.text_files import TextError
from composer_kd.files import write
from composer_kd.memory import end_workers
from composer_kd.models.fit import misfit
from composer_kd.recipes import RecipeError, load
from composer_kd.recipes.check import call_of
from composer_kd.recipes.folder import differences
from composer_kd.recipes.load import Recipe
from composer_kd.teachers import TeacherError
from composer_kd.teachers.batches import samples_in
from composer_kd.teachers.weights import load_weights
from composer_kd.tokenization import saved_tokenizer, tokenizer_difference

_AT_ONCE = 128  # samples that the networks are asked about
_NO_LABEL = -100  # torch's and Hugging Face's mark of a position without one

_HEAD = ('data', 'A', 'B', 'samples', 'disagree', 'mean difference', 'A is right', 'B is right')


@dataclass(frozen=True)
class Churn:
    """How much two networks, A and B, differ in what they say about the same samples, or labelled positions of texts.

    Args:
        samples: How many they were asked about.
        disagreements: For how many of them the class that A gives the largest probability is not that of B.
        distance: The sum over samples of the mean over classes of `|p_A - p_B|`.
        right: For how many of them that class is the label, by A and by B; None where there are no labels.
    """

    samples: int
    disagreements: int
    distance: float
    right: tuple[int, int] | None = None

    def __add__(self, other: Churn) -> Churn:
        """That of the samples of both."""
        right = None
        if self.right is not None and other.right is not None:
            right = self.right[0] + other.right[0], self.right[1] + other.right[1]
        return Churn(
            self.samples + other.samples,
            self.disagreements + other.disagreements,
            self.distance + other.distance,
            right,
        )

    @property
    def disagreement(self) -> float:
        """The share of samples for which A and B predict different classes."""
        return self.disagreements / self.samples

    @property
    def difference(self) -> float:
        """The mean over samples of the mean over classes of `|p_A - p_B|`."""
        return self.distance / self.samples

    @property
    def accuracies(self) -> tuple[float, float] | None:
        """The share of samples whose label A predicts, and that of B; None where there are no labels."""
        return None if self.right is None else (self.right[0] / self.samples, self.right[1] / self.samples)


@torch.no_grad()
def churn(logits_a: Tensor, logits_b: Tensor, labels: Tensor | None = None) -> Churn:
    """Compare what two networks say about a batch; those of several batches are added up.

    Probabilities are `softmax(logits)`, in float32 or more.

    Args:
        logits_a: Those of network A, shape (..., C).
        logits_b: Those of network B, the same shape.
        labels: The classes that are right, shape (...); where it is -100, the position does not count. Default: none.

    Raises:
        ValueError: The shapes do not belong together.
    """
    shape = logits_a.shape
    if logits_b.shape != shape or len(shape) < 2 or (labels is not None and labels.shape != shape[:-1]):
        given = [list(x.shape) for x in (logits_a, logits_b, labels) if x is not None]
        raise ValueError(f'logits and labels must be (..., C), (..., C) and (...), not {", ".join(map(str, given))}')
    pair = [logits.flatten(0, -2) for logits in (logits_a, logits_b)]
    if labels is not None:
        labels = labels.flatten()
        counts = labels != _NO_LABEL
        pair, labels = [logits[counts] for logits in pair], labels[counts]
    a, b = (logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1) for logits in pair)
    says_a, says_b = (logits.argmax(-1) for logits in pair)
    return Churn(
        samples=len(a),
        disagreements=int((says_a != says_b).sum()),
        distance=float((a - b).abs().mean(-1).sum(dtype=torch.float64)),
        right=None if labels is None else (int((says_a == labels).sum()), int((says_b == labels).sum())),
    )


def compare(
    paths: Sequence[str | Path], *, data: str | Path | None = None, out: str | Path | None = None
) -> dict[str, Any]:
    """Ask the networks of some runs about their evaluation data, and compare each with each; print a table.

    They are asked in eval mode, in float32, in this process alone, on the device that the recipe of the first run
    names, or else on a GPU if there is one.

    Args:
        paths: Folders of runs, finished or not, of which the latest checkpoint is taken; or checkpoints in them.
        data: A recipe, of which `eval_data` is taken in place of that of the runs. Default: none.
        out: A JSON file to write. Default: none.

    Returns:
        What is written to that file: `runs`, each with its checkpoint and the SHA-256 of that; `eval_data`; and
        `pairs`, a row for each pair and data set.

    Raises:
        RecipeError: A run or its data cannot be used, or the runs cannot be compared.
    """
    runs = [_Run.find(path) for path in paths]
    source = _source(runs, data)
    if out is not None and not Path(out).parent.is_dir():
        raise RecipeError(f'--out {out}: there is no folder {Path(out).parent}; make it first')
    device = _device(runs[0].recipe)
    reproducibility.seed_all(0)  # for data of somebody's own that draw random numbers
    models = [run.model() for run in runs]
    _check_alike(runs, models)
    evaluators = _evaluators(source)
    for run, model in zip(runs, models, strict=True):
        if problem := misfit(model, evaluators, model_key=f'model of {run.name}', data_key='eval_data'):
            raise source.error(('eval_data',), problem)
    networks = [device.module_to_device(model.requires_grad_(False).eval()) for model in models]
    rows = []
    try:
        for evaluator in evaluators:
            rows += _rows(runs, _churns(runs, networks, evaluator, source, device), evaluator.label)
    except TextError as error:
        raise source.error(('eval_data',), str(error), exit_code=1) from error
    finally:
        state: Any = SimpleNamespace(evaluators=evaluators)
        end_workers(state)
    print(_table(rows))
    results = {
        'runs': [
            {'run': run.name, 'checkpoint': str(run.checkpoint), 'sha256': file_sha256(run.checkpoint)} for run in runs
        ],
        'eval_data': source.config['eval_data'],
        'pairs': rows,
    }
    if out is not None:
        try:
            write(Path(out), json.dumps(results, indent=2) + '\n')
        except OSError as error:
            raise RecipeError(f'--out {out}: {error.strerror}', exit_code=1) from error
        print(f'written to {out}')
    return results


@dataclass(frozen=True)
class _Run:
    """What there is of a run.

    Args:
        name: As people have called it.
        recipe: The one that lies in its folder.
        checkpoint: Of its weights.
    """

    name: str
    recipe: Recipe
    checkpoint: Path

    @classmethod
    def find(cls, path: str | Path) -> _Run:
        """From its folder, or a checkpoint in that.

        Raises:
            RecipeError: There is no such thing.
        """
        checkpoint = find_checkpoint(path)
        if checkpoint is None:
            what = 'there is no checkpoint, neither a file nor the folder of a run with one'
            raise RecipeError(f'{path}: {what}', exit_code=1)
        places = (folder / 'recipe.yaml' for folder in (Path(path), *checkpoint.parents[:2]))
        recipe = next((file for file in places if file.is_file()), None)
        if recipe is None:
            what = 'there is no recipe.yaml in the folder of its run, to say what its network is'
            raise RecipeError(f'{path}: {what}', exit_code=1)
        return cls(str(path), load(recipe), checkpoint)

    def model(self) -> ComposerModel:
        """The network, with its weights."""
        call = call_of(self.recipe, 'model')
        model = call()
        if not isinstance(model, ComposerModel):
            raise self.recipe.error(call.key, f'must build a ComposerModel, not {type(model).__name__}')
        try:
            load_weights(model, self.checkpoint)
        except TeacherError as error:
            raise RecipeError(str(error), exit_code=1) from error
        reads = getattr(model, 'tokenizer', None)
        learned = None if reads is None else saved_tokenizer(self.checkpoint)
        if reads is not None and learned is not None and (difference := tokenizer_difference(reads, learned)):
            what = f'{self.name} was trained with another tokenizer ({difference})'
            raise self.recipe.error(call.key, f'{what}: the text that it is made from has changed since', exit_code=1)
        return model


def _source(runs: Sequence[_Run], data: str | Path | None) -> Recipe:
    """The recipe whose evaluation data all are asked about."""
    first = runs[0]
    source = first.recipe if data is None else load(data)
    todo = 'name a recipe whose eval_data all are to be asked about, by --data RECIPE'
    if not source.config.get('eval_data'):
        raise source.error((), f'the recipe has no eval_data; {todo}')
    for run in runs[1:] if data is None else ():
        if others := differences(source.config['eval_data'], run.recipe.config.get('eval_data'), 'eval_data'):
            what = f'{run.name} has other evaluation data than {first.name}, which differ in {", ".join(others)}'
            raise run.recipe.error(others[0].split('.'), f'{what}; {todo}')
    return source


def _device(recipe: Recipe) -> Device:
    try:
        return get_device(recipe.config.get('device'))
    except (ValueError, RuntimeError, ImportError) as error:
        raise recipe.error(('device',), str(error), 2 if isinstance(error, ValueError) else 1) from error


def _check_alike(runs: Sequence[_Run], models: Sequence[ComposerModel]) -> None:
    """See whether the networks speak of the same classes, and read the same words."""
    classes, words = ([getattr(model, name, None) for model in models] for name in ('num_classes', 'tokenizer'))
    for run, own in zip(runs, classes, strict=True):
        if own == 1:
            raise RecipeError(f'{run.name} gives grades (num_labels=1): churn compares networks that choose a class')
        if own is not None and classes[0] is not None and own != classes[0]:
            raise RecipeError(f'{run.name} has {own} classes, {runs[0].name} {classes[0]}: they must be the same')
    for run, own in zip(runs, words, strict=True):
        if own is not None and words[0] is not None and (difference := tokenizer_difference(own, words[0])):
            raise RecipeError(
                f'the tokenizer of {run.name} is not that of {runs[0].name} ({difference}): the same text must be the '
                'same ids to both'
            )


def _evaluators(source: Recipe) -> list[Evaluator]:
    given: Any = call_of(source, 'eval_data')()
    return [ensure_evaluator(each, default_metric_names=[]) for each in ensure_tuple(given)]


def _churns(
    runs: Sequence[_Run], networks: Sequence[Any], evaluator: Evaluator, source: Recipe, device: Device
) -> dict[tuple[int, int], Churn]:
    """The churn of each pair of networks over one data set."""
    found: dict[tuple[int, int], Churn] = {}
    for batch in _batches(evaluator, source, device):
        answers = [_answer(network, copy.deepcopy(batch)) for network in networks]
        for run, (logits, _) in zip(runs, answers, strict=True):
            if not bool((logits < torch.inf).all()):
                what = 'gives NaN or infinity, so that there is nothing to compare'
                raise RecipeError(f'{run.name} {what}; leave it out', exit_code=1)
        for a, b in itertools.combinations(range(len(runs)), 2):
            (logits_a, labels), (logits_b, _) = answers[a], answers[b]
            try:
                now = churn(logits_a, logits_b, labels)
            except ValueError as error:
                raise RecipeError(f'{runs[a].name} and {runs[b].name} cannot be compared: {error}') from error
            found[a, b] = found[a, b] + now if (a, b) in found else now
    if not all(each.samples for each in found.values()):
        raise source.error(('eval_data',), 'has no labels, so there is nothing to compare', exit_code=1)
    return found


def _batches(evaluator: Evaluator, source: Recipe, device: Device) -> Iterator[Any]:
    """What the networks are asked about, prepared as the Trainer does it, on the device."""
    spec, most = evaluator.dataloader, evaluator.subset_num_batches
    if most is None:
        most = source.config.get('eval_subset_num_batches', -1)
    some = itertools.islice(spec.dataloader, None if most == -1 else most)
    for batch in tqdm(some, desc=evaluator.label, unit=' batches', disable=None, leave=False):
        batch = spec.batch_transforms(batch)
        parts = spec.split_batch(batch, _AT_ONCE) if samples_in(batch) > _AT_ONCE else [batch]
        for part in parts:
            yield spec.microbatch_transforms(device.batch_to_device(part))


@torch.no_grad()
def _answer(network: ComposerModel, batch: Any) -> tuple[Tensor, Tensor]:
    """The logits of a network, and the labels that they are compared with; it may change the batch."""
    listener = _Listener()
    network.update_metric(batch, network.eval_forward(batch), listener)
    logits, labels = listener.heard
    return logits, labels.to(logits.device)


class _Listener(Metric):
    """What a model gives to a metric: only the model knows which labels its logits belong to."""

    heard: tuple[Tensor, Tensor]

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Keep it."""
        self.heard = logits, labels

    def compute(self) -> None:
        """There is nothing to compute."""


def _rows(runs: Sequence[_Run], churns: dict[tuple[int, int], Churn], label: str) -> list[dict[str, Any]]:
    rows = []
    for (a, b), found in churns.items():
        assert found.accuracies is not None, 'there are labels'
        figures = {
            'samples': found.samples,
            'disagreement': found.disagreement,
            'difference': found.difference,
            'accuracy_a': found.accuracies[0],
            'accuracy_b': found.accuracies[1],
        }
        rows.append({'data': label, 'a': runs[a].name, 'b': runs[b].name, **figures})
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> str:
    shown = {'samples': ',', 'disagreement': '.2%', 'difference': '.3g', 'accuracy_a': '.2%', 'accuracy_b': '.2%'}
    cells = [[format(value, shown.get(name, '')) for name, value in row.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(_HEAD, *cells, strict=True)]
    lines = [_HEAD, ['-' * width for width in widths], *cells]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return '\n'.join(f'| {" | ".join(line)} |' for line in padded)
