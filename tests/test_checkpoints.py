from pathlib import Path

import pytest
import torch
from composer.models import ComposerClassifier

from composer_kd.checkpoints import find_checkpoint, find_paths, kept_checkpoints, link_latest
from settings import CLASSES, network, train


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Folders of two runs, one of which is named `latest`, and one without a checkpoint, beside a file."""
    monkeypatch.chdir(tmp_path)
    for name in ('runs/b', 'runs/a', 'runs/latest'):
        folder = Path(name, 'checkpoints')
        folder.mkdir(parents=True)
        (folder / 'ep1-rank0.pt').write_text(name)
        (folder / 'latest-rank0.pt').symlink_to('ep1-rank0.pt')
    Path('begun/c').mkdir(parents=True)
    Path('runs/.a.lock').touch()
    return tmp_path / 'runs'


@pytest.mark.parametrize(
    'path', ['runs/a', 'runs/a/', 'runs/a/latest', 'runs/a/checkpoints', 'runs/a/checkpoints/latest-rank0.pt']
)
def test_what_means_the_latest_checkpoint_of_a_run(runs, path):
    assert find_checkpoint(path) == find_checkpoint(Path(path)) == runs / 'a/checkpoints/ep1-rank0.pt'


def test_a_run_whose_name_is_latest(runs):
    assert find_checkpoint('runs/latest') == find_checkpoint('runs/latest/latest')
    assert find_checkpoint('runs/latest') == runs / 'latest/checkpoints/ep1-rank0.pt'
    assert find_paths('runs/latest') == [Path('runs/latest')]
    assert find_paths('runs/late[st]*') == [Path('runs/latest')]


@pytest.mark.parametrize(
    'path',
    ['runs', 'runs/c', 'begun/c', 'begun/c/latest', 'runs/a/checkpoints/ep1-rank0.pt/latest', 'latest', 'runs/a/no.pt'],
)
def test_no_checkpoint(runs, path):
    assert find_checkpoint(path) is None


def test_composers_own_folder_of_checkpoints(tmp_path):
    model = ComposerClassifier(network(1), num_classes=CLASSES)
    train([], model=model, max_duration='2ba', save_folder=str(tmp_path / 'saved'), save_interval='1ba')
    assert find_checkpoint(tmp_path / 'saved') == find_checkpoint(tmp_path / 'saved' / 'ep0-ba2-rank0.pt')


def test_checkpoints_that_a_run_can_go_on_from(tmp_path):
    files = {batch: tmp_path / f'ep1-ba{batch}-rank0.pt' for batch in (3, 6, 12)}
    link_latest(tmp_path / 'nowhere')
    for file in files.values():
        torch.save({}, file)
    files[12].write_bytes(files[12].read_bytes()[:100])  # it was killed while it wrote this one
    latest = tmp_path / 'latest-rank0.pt'
    assert [*kept_checkpoints(tmp_path)] == [3, 6] and not latest.exists()
    link_latest(tmp_path)
    assert latest.resolve() == files[6] and [*kept_checkpoints(tmp_path)] == [3, 6]
    latest.unlink()
    latest.symlink_to(files[3])
    link_latest(tmp_path)
    assert [*kept_checkpoints(tmp_path)] == [3]
    latest.unlink()
    latest.symlink_to(files[3].rename(tmp_path / 'mine.pt'))
    assert kept_checkpoints(tmp_path) == {}


@pytest.mark.parametrize('pattern', ['runs/?', 'runs/[ab]/latest', 'runs/?/', 'runs/[ab]/checkpoints/ep*.pt'])
def test_all_that_a_pattern_matches(runs, pattern):
    found = [find_checkpoint(path) for path in find_paths(pattern)]
    assert found == [runs / name / 'checkpoints/ep1-rank0.pt' for name in 'ab']


def test_one_path_is_a_pattern(runs):
    assert find_paths('runs/b') == [Path('runs/b')]
    (runs / 'a').rename(runs / 'a[1]')
    assert find_paths('runs/a[1]') == [Path('runs/a[1]')]
    assert len(find_paths('**/runs/*/latest')) == 3
    assert find_paths('nowhere/*') == []
