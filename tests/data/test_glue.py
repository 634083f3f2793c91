import json
import re
import shutil

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from composer.core import DataSpec, Evaluator

from composer_kd import data
from composer_kd.data.glue import _TASKS
from composer_kd.data.text_files import TextError
from helpers import make_glue, make_vocabulary


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    return make_glue(tmp_path_factory.mktemp('glue'))


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
    return make_vocabulary(tmp_path_factory.mktemp('vocabulary') / 'vocab.txt')


@pytest.fixture
def build(files, vocabulary):
    def builder(task, split='validation', batch_size=4, **more):
        return data.glue(split, batch_size, task=task, **{'tokenizer': vocabulary, 'data_dir': files, **more})

    return builder


def texts(spec):
    """The examples of a data set as text, and their labels."""
    dataset = spec.dataloader.dataset
    decode = dataset.tokenizer.decode
    return [
        (decode(batch['input_ids'][0]).replace(' [PAD]', ''), batch['labels'].item()) for batch in dataset_of(dataset)
    ]


def dataset_of(dataset):
    return [dataset.__getitems__([index]) for index in range(len(dataset))]


@pytest.mark.parametrize('task', _TASKS)
def test_every_task_is_read_from_its_own_layout(build, files, task):
    split = 'validation_matched' if task == 'mnli' else 'validation'
    train, validation = build(task, 'train'), build(task, split)
    assert (train.num_samples, validation.num_samples) == (96, 10)
    dataset = validation.dataloader.dataset
    for index, (text, label) in enumerate(texts(validation)):
        kind = index % (dataset.num_labels if dataset.num_labels > 1 else 5)
        assert text.startswith(f'[CLS] {kind} ')  # the text and the label of one line
        assert label == (kind / 2 if task == 'stsb' else kind)
        assert text.count('[SEP]') == (1 if task in ('cola', 'sst2') else 2)
    assert dataset.labels.dtype == (torch.float32 if task == 'stsb' else torch.int64)
    assert ('token_type_ids' in dataset[0]) == (task not in ('cola', 'sst2'))
    assert dataset.num_labels == {'mnli': 3, 'stsb': 1}.get(task, 2)


def test_mnli_is_measured_on_both_of_its_sets(build, files):
    both = build('mnli')
    assert [type(part) for part in both] == [Evaluator, Evaluator]
    assert [part.label for part in both] == ['mnli_matched', 'mnli_mismatched']
    alone = [build('mnli', f'validation_{match}') for match in ('matched', 'mismatched')]
    assert [texts(part.dataloader) for part in both] == [texts(part) for part in alone]
    assert texts(alone[0]) != texts(alone[1])
    assert isinstance(build('mnli', 'train'), DataSpec)


def hub_rows(build, task, split):
    """Rows of a task as the hub has them."""
    facts = _TASKS[task]
    lines = [line.split('\t') for line in build.splitlines()]
    header = ['s', 'label', 'm', 'sentence'] if task == 'cola' else lines.pop(0)
    names = dict(zip(facts.tsv or facts.hub, facts.hub, strict=True))
    rows = [{names.get(name, name): value for name, value in zip(header, line, strict=True)} for line in lines]
    for row in rows:
        label = row['label']
        row['label'] = (
            float(label) if task == 'stsb' else facts.words.index(label) if label in facts.words else int(label)
        )
    return [{name: row[name] for name in facts.hub if name} for row in rows]


@pytest.mark.parametrize('task', _TASKS)
def test_all_formats_and_the_hub_give_the_same(build, files, task, tmp_path, monkeypatch):
    split, file = ('validation_matched', 'dev_matched') if task == 'mnli' else ('validation', 'dev')
    rows = hub_rows((files / _TASKS[task].folder / f'{file}.tsv').read_text(), task, split)
    expected = texts(build(task, split))

    folder = tmp_path / task
    folder.mkdir()
    halves = [rows[:6], rows[6:]]
    for number, half in enumerate(halves):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(half), folder / f'{split}-{number:05}-of-00002.parquet')
    assert texts(build(task, split, data_dir=tmp_path)) == expected
    assert texts(build(task, split, data_dir=folder)) == expected  # the folder of the task alone

    (tmp_path / 'json').mkdir()
    (tmp_path / 'json' / f'{split}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    assert texts(build(task, split, data_dir=tmp_path / 'json')) == expected

    (tmp_path / 'tsv').mkdir()
    lines = ['\t'.join(rows[0])] + ['\t'.join(map(str, row.values())) for row in rows]
    (tmp_path / 'tsv' / f'{split}.tsv').write_text('\n'.join(lines))
    assert texts(build(task, split, data_dir=tmp_path / 'tsv')) == expected

    asked = []
    monkeypatch.setattr(
        datasets,
        'load_dataset',
        lambda *names, **more: asked.append((names, more)) or datasets.Dataset.from_list(rows),
    )
    assert texts(build(task, split, data_dir=None)) == expected
    assert asked == [(('nyu-mll/glue', task), {'split': split})]


def test_microsofts_own_file_of_mrpc(build, tmp_path):
    header = 'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String'
    rows = ['1\t10\t11\ta\tb', '0\t20\t21\tc\td', '1\t30\t31\te\tf']
    (tmp_path / 'MRPC').mkdir()
    (tmp_path / 'MRPC' / 'msr_paraphrase_train.txt').write_bytes(
        b'\xef\xbb\xbf' + '\r\n'.join([header, *rows]).encode()
    )
    with pytest.raises(FileNotFoundError, match=r'no such file: .*dev_ids.tsv$'):
        build('mrpc', 'train', 1, data_dir=tmp_path)
    (tmp_path / 'MRPC' / 'dev_ids.tsv').write_text('20\t21\n')
    assert texts(build('mrpc', 'train', 1, data_dir=tmp_path)) == [
        ('[CLS] a [SEP] b [SEP]', 1),
        ('[CLS] e [SEP] f [SEP]', 1),
    ]
    assert texts(build('mrpc', data_dir=tmp_path)) == [('[CLS] c [SEP] d [SEP]', 0)]


def test_broken_lines(build, files, tmp_path):
    for task, folder in (('qqp', 'QQP'), ('rte', 'RTE')):
        shutil.copytree(files / folder, tmp_path / folder)
        path = tmp_path / folder / 'dev.tsv'
        path.write_text(path.read_text().replace('\n', '\n0\tbroken\n', 2))
    assert texts(build('qqp', data_dir=tmp_path)) == texts(build('qqp'))
    with pytest.raises(TextError, match=rf'{re.escape(str(tmp_path))}/RTE/dev.tsv:2: 2 fields between tabs, not 4'):
        build('rte', data_dir=tmp_path)


def test_labels_that_there_are_not(build, files, tmp_path):
    for task, folder, wrong, message in [
        (
            'mnli',
            'MNLI',
            '-',
            "gold_label is '-', which is not a class from 0 to 2, nor one of entailment, neutral, contra",
        ),
        ('stsb', 'STS-B', '5.1', "score is '5.1', which is no grade from 0 to 5$"),
        ('cola', 'CoLA', '2', "label is '2', which is not a class from 0 to 1"),
    ]:
        shutil.copytree(files / folder, tmp_path / folder)
        path = tmp_path / folder / 'train.tsv'
        lines = path.read_text().splitlines()
        fields = lines[3].split('\t')
        fields[1 if task == 'cola' else -1] = wrong
        lines[3] = '\t'.join(fields)
        path.write_text('\n'.join(lines))
        with pytest.raises(TextError, match=rf'{folder}/train.tsv:4: {message}'):
            build(task, 'train', data_dir=tmp_path)


def test_mistakes_are_one_line(build, tmp_path):
    with pytest.raises(ValueError, match=r"^unknown task 'sst'; did you mean 'sst2'\?$"):
        build('sst')
    with pytest.raises(ValueError, match=r"^unknown task 'xyz'; choose one of cola, sst2, mrpc"):
        build('xyz')
    with pytest.raises(ValueError, match=r"^unknown split 'test': choose train or validation$"):
        build('cola', 'test')
    with pytest.raises(ValueError, match=r"^unknown split 'validation_matched': choose train or validation$"):
        build('cola', 'validation_matched')
    with pytest.raises(FileNotFoundError) as error:
        build('sst2', data_dir=tmp_path)
    assert str(error.value) == (
        f'no sst2 validation in {tmp_path}: neither {tmp_path}/SST-2/dev.tsv, nor '
        f'{tmp_path}/sst2/validation-00000-of-00001.parquet, nor the like; set data_dir'
    )


def test_no_network_is_one_line(build, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path)
    with pytest.raises(FileNotFoundError, match=r'^nyu-mll/glue cannot be had .* set data_dir to a folder') as error:
        build('cola', data_dir=None)
    assert '\n' not in str(error.value)


def test_ranks_that_have_not_met_yet(build, monkeypatch):
    """As those of a launcher are, before there is a Trainer."""
    monkeypatch.setenv('WORLD_SIZE', '2')
    rows = datasets.Dataset.from_list([{'sentence': 'a', 'label': 1}] * 4)
    monkeypatch.setattr(datasets, 'load_dataset', lambda *_, **__: rows)
    assert build('cola', data_dir=None).num_samples == 4
