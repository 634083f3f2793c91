"""Weights from files: Composer checkpoints with surgery, state dicts, and files that nobody should trust."""

import contextlib
import copy
import os

import pytest
import torch
from composer import algorithms as ca
from composer.models import ComposerClassifier
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import Bottleneck, ResNet

from composer_kd import NetworkTeacher, TeacherError
from composer_kd.checkpoints import file_sha256
from composer_kd.teachers import load_weights
from settings import CLASSES, classifier, network, train


def resnet(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=CLASSES)


def same(some, others):
    return all(torch.equal(some[name], others[name]) for name in others)


SURGERY = {
    'none': lambda: [],
    'blurpool': lambda: [ca.BlurPool(min_channels=0)],
    'squeeze_excite': lambda: [ca.SqueezeExcite(min_channels=8)],
    'factorize': lambda: [ca.Factorize(min_channels=8, min_features=8, latent_channels=4, latent_features=4)],
    'ghost_batchnorm': lambda: [ca.GhostBatchNorm(ghost_batch_size=8)],
    'stochastic_depth': lambda: [ca.StochasticDepth(target_layer_name='ResNetBottleneck', drop_rate=0.3)],
    'weight_standardization': lambda: [ca.WeightStandardization()],
    'several': lambda: [ca.BlurPool(), ca.SqueezeExcite(min_channels=8), ca.WeightStandardization(), ca.EMA('2ba')],
}


@pytest.mark.filterwarnings('ignore::UserWarning')  # Composer's, on what these algorithms do after a resume
@pytest.mark.parametrize('bare', [False, True])
@pytest.mark.parametrize('name', SURGERY)
def test_a_composer_checkpoint_is_loaded_with_its_surgery(name, bare, tmp_path):
    dataset = TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % CLASSES)
    run = train(
        SURGERY[name](),
        model=ComposerClassifier(resnet(1), num_classes=CLASSES),
        train_dataloader=DataLoader(dataset, batch_size=8),
        max_duration='1ep',
        save_folder=str(tmp_path),
        save_filename='teacher.pt',
    )
    expected = copy.deepcopy(run.state.model).eval()(next(iter(DataLoader(dataset, batch_size=8))))
    model = resnet(2) if bare else ComposerClassifier(resnet(2), num_classes=CLASSES)
    load_weights(model, tmp_path / 'teacher.pt')
    batch = dataset[:8]
    assert torch.equal(model.eval()(batch[0] if bare else batch), expected)


def test_a_composer_checkpoint_loads_weights_only(tmp_path):
    train([], model=classifier(1), save_folder=str(tmp_path), save_filename='last.pt', save_metrics=True)
    model = classifier(2)
    load_weights(model, tmp_path / 'last.pt')
    assert not same(model.state_dict(), classifier(2).state_dict())


@pytest.mark.parametrize('place', ['', 'checkpoints', 'latest'])
def test_a_folder_stands_for_the_latest_checkpoint_in_it(place, tmp_path):
    run = train([], model=classifier(1), save_folder=str(tmp_path / 'checkpoints'))
    sha256 = file_sha256(tmp_path / 'checkpoints' / 'latest-rank0.pt')
    teacher = NetworkTeacher(classifier(2), checkpoint=tmp_path / place, sha256=sha256)
    assert same(teacher._live_network().state_dict(), run.state.model.state_dict())
    with pytest.raises(TeacherError, match=r'ep2-ba8-rank0\.pt: is not the expected file: its SHA-256 is '):
        NetworkTeacher(classifier(2), checkpoint=tmp_path / place, sha256='0' * 64)


@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'model': s}, lambda s: {'state_dict': s}])
@pytest.mark.parametrize('saved, wanted', [(network, network), (network, classifier), (classifier, network)])
def test_a_state_dict_is_loaded(wrap, saved, wanted, tmp_path):
    torch.save(wrap(saved(1).state_dict()), tmp_path / 'weights.pt')
    model = wanted(2)
    load_weights(model, tmp_path / 'weights.pt', file_sha256(tmp_path / 'weights.pt').upper())
    assert same(model.state_dict(), wanted(1).state_dict())


class Evil:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def save_old_format(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize('save', [torch.save, save_old_format])
def test_a_file_that_would_run_code_is_refused_by_name(save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save({'state': {'model': network(1).state_dict(), 'x': Evil()}}, tmp_path / 'evil.pt')
    with pytest.raises(
        TeacherError, match=r'evil\.pt: refused, since loading it would run code: it names (posix|nt)\.mkdir'
    ):
        NetworkTeacher(network(1), checkpoint=tmp_path / 'evil.pt')
    assert not (tmp_path / 'executed').exists()


def test_surgery_that_is_code_is_not_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = "BlurPool(min_channels=__import__('os').mkdir('executed'))"
    state = {'model': {}, 'algorithms': [('BlurPool', {'repr': evil})]}
    torch.save({'state': state}, tmp_path / 'evil.pt')
    with pytest.raises(TeacherError, match='which could not be redone'):
        load_weights(network(1), tmp_path / 'evil.pt')
    assert not (tmp_path / 'executed').exists()


def test_surgery_under_a_false_name_is_refused(tmp_path):
    state = {'model': {}, 'algorithms': [('BlurPool', {'repr': 'SAM(rho=1.0)'})]}
    torch.save({'state': state}, tmp_path / 'false.pt')
    with pytest.raises(TeacherError, match='which could not be redone'):
        load_weights(network(1), tmp_path / 'false.pt')


def test_surgery_that_was_done_by_hand_is_not_redone(tmp_path):
    saved, model = resnet(1), resnet(2)
    for one in (saved, model):
        ca.blurpool.apply_blurpool(one, min_channels=0)
    unreadable = ('BlurPool', {'repr': 'BlurPool(min_channels=<lambda>)'})
    torch.save({'state': {'model': saved.state_dict(), 'algorithms': [unreadable]}}, tmp_path / 'saved.pt')
    load_weights(model, tmp_path / 'saved.pt')
    assert same(model.state_dict(), saved.state_dict())
    with pytest.raises(TeacherError, match='apply it to the network and pass that'):
        load_weights(resnet(2), tmp_path / 'saved.pt')


@pytest.mark.parametrize(
    'state',
    [
        {'model': None},
        {'model': {1: torch.zeros(1)}},
        {'model': {}, 'algorithms': {'BlurPool': {}}},
        {'model': {}, 'algorithms': [('BlurPool', {})]},
    ],
)
def test_a_file_of_another_form_is_refused(state, tmp_path):
    torch.save({'state': state}, tmp_path / 'odd.pt')
    with pytest.raises(TeacherError, match=r'odd\.pt: damaged, or no checkpoint at all'):
        load_weights(network(1), tmp_path / 'odd.pt')


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=5))
def test_whatever_is_changed_in_a_file_there_is_one_error(places, tmp_path):
    path = tmp_path / 'weights.pt'
    torch.save(nn.Linear(2, 2).state_dict(), path)
    content = bytearray(path.read_bytes())
    for place, value in places:
        content[int(place * len(content))] = value
    path.write_bytes(content)
    with contextlib.suppress(TeacherError):
        load_weights(nn.Linear(2, 2), path)


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes({'cut': content[: len(content) // 2], 'text': b'no checkpoint', 'empty': b''}[how])


@pytest.mark.parametrize('how', ['cut', 'text', 'empty'])
def test_a_damaged_file_is_refused(how, tmp_path):
    torch.save(network(1).state_dict(), tmp_path / 'weights.pt')
    damage(tmp_path / 'weights.pt', how)
    with pytest.raises(TeacherError, match=r'weights\.pt: damaged, or no checkpoint at all'):
        load_weights(network(1), tmp_path / 'weights.pt')


def test_a_missing_file_and_a_wrong_hash(tmp_path):
    with pytest.raises(TeacherError, match='no such file'):
        load_weights(network(1), tmp_path / 'weights.pt')
    with pytest.raises(TeacherError, match='no checkpoint in this folder; the teacher needs'):
        load_weights(network(1), tmp_path)
    torch.save(network(1).state_dict(), tmp_path / 'weights.pt')
    with pytest.raises(TeacherError, match='is not the expected file: its SHA-256 is '):
        load_weights(network(1), tmp_path / 'weights.pt', '0' * 64)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda s: s.pop('6.bias'), '6.bias missing'),
        (lambda s: s.update(extra=torch.zeros(1)), 'extra unexpected'),
        (lambda s: s.update({'6.bias': torch.zeros(7)}), r'6.bias is \[7\] there, \[5\] in the network'),
        (lambda s: s.update({'6.bias': 'text'}), r'6.bias is str there'),
        (lambda s: s.clear(), 'and 3 more missing'),
    ],
)
def test_weights_that_do_not_fit_change_nothing(change, message, tmp_path):
    state = network(1).state_dict()
    change(state)
    torch.save(state, tmp_path / 'weights.pt')
    model = network(2)
    with pytest.raises(TeacherError, match=message):
        load_weights(model, tmp_path / 'weights.pt')
    assert same(model.state_dict(), network(2).state_dict())


def test_something_else_in_the_file(tmp_path):
    torch.save([1, 2, 3], tmp_path / 'list.pt')
    with pytest.raises(TeacherError, match='holds list, not a checkpoint'):
        load_weights(nn.Linear(1, 1), tmp_path / 'list.pt')
