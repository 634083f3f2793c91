"""GLUE (Wang et al. 2018, arXiv 1804.07461): eight tasks of language understanding, from the hub or from files."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from composer.core import DataSpec, Evaluator
from transformers import PreTrainedTokenizerFast
from typing_extensions import Unpack

from composer_kd.data.classification import Example, Label, LabelledTexts, class_or_grade, examples_of
from composer_kd.data.loader import LoaderOptions, check_split, data_spec, shows_loader_options
from composer_kd.data.tables import Row, header_of, read_table
from composer_kd.data.tensor_images import whole_batch
from composer_kd.download import downloading
from composer_kd.tokenization import Tokenizer, load_tokenizer

TaskName = Literal['cola', 'sst2', 'mrpc', 'stsb', 'qqp', 'mnli', 'qnli', 'rte']
Split = Literal['train', 'validation', 'validation_matched', 'validation_mismatched']
Columns = tuple[str, str | None, str]

_HUB = 'nyu-mll/glue'
_MATCHES = ('matched', 'mismatched')
_BEST_GRADE = 5.0


@dataclass(frozen=True)
class _Task:
    """What is particular about a task.

    Args:
        folder: its folder in the benchmark's own files.
        hub: columns of the text, of a second text, and of the label, as the hub names them.
        tsv: the same as the benchmark's own TSV files name them, where they differ.
        words: its classes, in the order of their numbers; none for grades.
    """

    folder: str
    hub: Columns
    words: tuple[str, ...]
    tsv: Columns | None = None

    @property
    def num_labels(self) -> int:
        return len(self.words) or 1

    def label(self, value: Any) -> Label:
        found = class_or_grade(value, self.num_labels, self.words)
        if not self.words and not 0 <= found <= _BEST_GRADE:
            raise ValueError(f'no grade from 0 to {_BEST_GRADE:.0f}')
        return found


_ENTAILMENT = ('entailment', 'not_entailment')

_TASKS = {
    'cola': _Task('CoLA', ('sentence', None, 'label'), ('unacceptable', 'acceptable')),
    'sst2': _Task('SST-2', ('sentence', None, 'label'), ('negative', 'positive')),
    'mrpc': _Task(
        'MRPC',
        ('sentence1', 'sentence2', 'label'),
        ('not_equivalent', 'equivalent'),
        ('#1 String', '#2 String', 'Quality'),
    ),
    'stsb': _Task('STS-B', ('sentence1', 'sentence2', 'label'), (), ('sentence1', 'sentence2', 'score')),
    'qqp': _Task(
        'QQP',
        ('question1', 'question2', 'label'),
        ('not_duplicate', 'duplicate'),
        ('question1', 'question2', 'is_duplicate'),
    ),
    'mnli': _Task(
        'MNLI',
        ('premise', 'hypothesis', 'label'),
        ('entailment', 'neutral', 'contradiction'),
        ('sentence1', 'sentence2', 'gold_label'),
    ),
    'qnli': _Task('QNLI', ('question', 'sentence', 'label'), _ENTAILMENT),
    'rte': _Task('RTE', ('sentence1', 'sentence2', 'label'), _ENTAILMENT),
}

_COLA_COLUMNS = ('source', 'label', 'mark', 'sentence')  # its TSV files have no header
_MRPC_FILE, _MRPC_VALIDATION = 'msr_paraphrase_train.txt', 'dev_ids.tsv'


@shows_loader_options
def glue(
    split: Split,
    batch_size: int,
    *,
    task: TaskName,
    tokenizer: Tokenizer,
    max_length: int = 128,
    data_dir: str | Path | None = None,
    num_workers: int = 0,
    **loader: Unpack[LoaderOptions],
) -> DataSpec | list[Evaluator]:
    """A task of GLUE, tokenized and held in memory.

    Lines of QQP's own files that have too few fields are left out, as on the hub: some were broken when published.

    Args:
        split: `train` or `validation`. For `mnli` the latter are two sets, `validation_matched` and
            `validation_mismatched`, which are measured one by one, as `mnli_matched` and `mnli_mismatched`.
        batch_size: examples in a batch over all ranks.
        task: `cola`, `sst2`, `mrpc`, `stsb`, `qqp`, `mnli`, `qnli` or `rte`. All have classes but `stsb`, which has
            grades from 0 to 5 (num_labels=1).
        tokenizer: see `composer_kd.tokenization.load_tokenizer`; the model's.
        max_length: tokens of the longest example, longer ones are cut. Default: 128.
        data_dir: folder of the benchmark's own files (`SST-2/train.tsv`, `SST-2/dev.tsv`, ...), or of a copy of the
            hub's (`sst2/train-00000-of-00001.parquet`, ...; also as .jsonl or .tsv), or of such files of this task
            alone. Default: None, `nyu-mll/glue` on the Hugging Face hub.
        num_workers: processes that fetch batches on each rank; the rank itself is fast enough. Default: 0.
        **loader: options of `composer_kd.data.loader.data_spec`.

    Returns:
        The data, or for `validation` of `mnli` both sets of them.

    Raises:
        FileNotFoundError: the files are not there, or the hub cannot be reached.
        ValueError: an argument is unknown or out of range.
        TextError: a row is damaged, or has a label that there is not.
    """
    if task not in _TASKS:
        near = difflib.get_close_matches(task, _TASKS, n=1)
        hint = f'did you mean {near[0]!r}?' if near else f'choose one of {", ".join(_TASKS)}'
        raise ValueError(f'unknown task {task!r}; {hint}')
    words = load_tokenizer(tokenizer)

    def build(split: str) -> DataSpec:
        dataset = _dataset(task, split, data_dir, words, max_length)
        return data_spec(
            dataset,
            batch_size=batch_size,
            train=split == 'train',
            num_workers=num_workers,
            collate_fn=whole_batch,
            **loader,
        )

    if task == 'mnli':
        check_split(split, 'train', 'validation', *(f'validation_{match}' for match in _MATCHES))
        if split == 'validation':
            return [Evaluator(label=f'mnli_{match}', dataloader=build(f'validation_{match}')) for match in _MATCHES]
    else:
        check_split(split, 'train', 'validation')
    return build(split)


def _dataset(
    task: str, split: str, data_dir: str | Path | None, tokenizer: PreTrainedTokenizerFast, max_length: int
) -> LabelledTexts:
    facts = _TASKS[task]
    examples = _hub_examples(task, split) if data_dir is None else _file_examples(task, split, Path(data_dir))
    return LabelledTexts(examples, tokenizer, max_length=max_length, num_labels=facts.num_labels)


def _hub_examples(task: str, split: str) -> list[Example]:
    import datasets

    try:
        with downloading():
            rows: Any = datasets.load_dataset(_HUB, task, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(
            f'{_HUB} cannot be had from the Hugging Face hub ({type(error).__name__}): set data_dir to a folder with '
            'the files of GLUE, or HF_HOME to a cache that holds them'
        ) from error
    source = f'{_HUB} {task} {split}'
    places: Iterable[tuple[str, Row]] = ((f'{source}:{number}', row) for number, row in enumerate(rows, 1))
    return examples_of(places, _TASKS[task].hub, _TASKS[task].label, source)


def _file_examples(task: str, split: str, data_dir: Path) -> list[Example]:
    facts = _TASKS[task]
    examples = []
    for file in _files(task, split, data_dir):
        columns, header = facts.hub, None
        if file.suffix in ('.tsv', '.txt') and not {*facts.hub} - {None} <= {*header_of(file)}:
            columns = facts.tsv or facts.hub
            header = _COLA_COLUMNS if task == 'cola' else None
        rows = read_table(file, header, drop_short=task == 'qqp', drop_surplus=True)
        if file.name == _MRPC_FILE:
            rows = _mrpc_part(rows, split, file.with_name(_MRPC_VALIDATION))
        examples += examples_of(rows, columns, facts.label, str(file))
    return examples


def _files(task: str, split: str, data_dir: Path) -> list[Path]:
    """The files of a split, several where a Parquet table was cut in parts."""
    stems = [split, split.replace('validation', 'dev')]
    folders = [data_dir / _TASKS[task].folder, data_dir / task, data_dir]
    for folder in folders:
        for stem in stems:
            for pattern in (f'{stem}.tsv', f'{stem}.jsonl', f'{stem}.parquet', f'{stem}-?????-of-?????.parquet'):
                if found := sorted(folder.glob(pattern)):
                    return found
        if task == 'mrpc' and (folder / _MRPC_FILE).is_file():
            return [folder / _MRPC_FILE]
    own, hub = folders[0] / f'{stems[1]}.tsv', folders[1] / f'{split}-00000-of-00001.parquet'
    raise FileNotFoundError(f'no {task} {split} in {data_dir}: neither {own}, nor {hub}, nor the like; set data_dir')


def _mrpc_part(rows: Iterator[tuple[str, Row]], split: str, ids: Path) -> Iterator[tuple[str, Row]]:
    """The rows of Microsoft's own file that GLUE trains on, or those that it validates on."""
    wanted = {(row['1'], row['2']) for _, row in read_table(ids, ('1', '2'), drop_surplus=True)}
    for place, row in rows:
        if ((row.get('#1 ID'), row.get('#2 ID')) in wanted) == (split == 'validation'):
            yield place, row
