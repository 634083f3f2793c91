"""Students assembled from the checkpoints of stages."""

import copy

import pytest
import torch
from composer import Trainer
from composer.core import DataSpec
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_kd.blockwise.assemble import assemble
from composer_kd.blockwise.blocks import cut
from composer_kd.blockwise.pairs import BlockPairs
from composer_kd.blockwise.stage import StageModel, TeacherRelay, samples_in
from composer_kd.checkpoints import CheckpointError


def network(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 3),
    )


def pairs_of(student):
    teacher = network(6, 0)
    return BlockPairs(cut(teacher, ['2', '4']), cut(student, ['2', '4']), torch.randn(2, 1, 4, 4), seed=1)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The student after two batches, and a checkpoint of each stage."""
    folder, student = tmp_path_factory.mktemp('stages'), network(4, 1)
    torch.manual_seed(2)
    data = DataLoader(TensorDataset(torch.randn(16, 1, 4, 4), torch.arange(16) % 3), batch_size=8)
    pairs = pairs_of(student)
    for name, blocks in (('first', [0]), ('rest', [1, 2])):
        spec = DataSpec(data, get_num_samples_in_batch=samples_in, get_num_tokens_in_batch=lambda batch: 0)
        model = StageModel(pairs, blocks)
        trainer = Trainer(
            model=model,
            train_dataloader=spec,
            algorithms=[TeacherRelay(pairs, range(blocks[-1] + 1), blocks, data=spec)],
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
            max_duration='1ep',
            progress_bar=False,
        )
        trainer.fit()
        trainer.save_checkpoint(str(folder / f'{name}.pt'))
        trainer.close()
    return folder, pairs


def test_it_is_what_the_stages_have_learned(trained):
    folder, pairs = trained
    student = network(4, 1)
    own = pairs_of(student)
    assemble(own, [folder / 'rest.pt', folder / 'first.pt'])
    folded = copy.deepcopy(pairs)
    folded.fold()
    learned = nn.Sequential(*(block.block for block in folded.student)).state_dict()
    assert len(learned) == len(student.state_dict())
    for name, tensor in student.state_dict().items():
        (other,) = (value for key, value in learned.items() if key.split('.', 1)[1] == name)
        assert torch.equal(tensor, other), name
    x = torch.randn(2, 1, 4, 4)
    through = x
    for block in pairs.student:
        through = block.eval()(through)
    torch.testing.assert_close(student.eval()(x), through)


def save(folder, name, change):
    saved = torch.load(folder / 'first.pt', weights_only=False)
    change(saved)
    torch.save(saved, folder / name)
    return folder / name


def test_what_is_not_one_student(trained, tmp_path):
    folder, _ = trained
    first, rest = folder / 'first.pt', folder / 'rest.pt'

    def refused(checkpoints, message, student=None):
        student = student or network(4, 1)
        kept = copy.deepcopy(student.state_dict())
        with pytest.raises(CheckpointError, match=message):
            assemble(pairs_of(student), checkpoints)
        assert all(torch.equal(tensor, kept[name]) for name, tensor in student.state_dict().items())

    refused([rest], 'no checkpoint has block 0: give those of all stages')
    refused([first, rest, first], r'first\.pt: has block 0, as .*first\.pt has; give one of the two')
    refused([first, rest], r'block 0 is of another student: .* is \[4.*\] there, \[5.*\] in the network', network(5, 1))
    later = save(folder, 'later.pt', lambda saved: saved['state']['timestamp']['Timestamp'].update(batch=9))
    refused([later, rest], r'not equally far: .*rest\.pt of batch 2, .*later\.pt of batch 9; let all of them finish')
    none = save(folder, 'none.pt', lambda saved: saved['state'].update(model={'x': torch.ones(1)}))
    refused([none, rest], r'none\.pt: is no checkpoint of a stage')
    lacks = save(folder, 'lacks.pt', lambda saved: saved['state']['model'].popitem())
    refused([lacks, rest], r'lacks\.pt: block 0 is of another student: .* is missing')
    more = save(folder, 'more.pt', lambda saved: saved['state']['model'].update({'blocks.7.x': torch.ones(1)}))
    refused([more, rest], r'more\.pt: has block 7, but the student has 3 blocks')
    refused([tmp_path / 'nowhere.pt', rest], r'nowhere\.pt: no such file')
