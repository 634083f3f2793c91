"""Every YAML that we ship: right by the checker, and trains; twins differ in the distillation alone."""

import json
from pathlib import Path

import pytest
import yaml

from composer_kd.recipes import check, load, run
from helpers import make_imagefolder

YAMLS = sorted((Path(__file__).parents[1] / 'yamls').glob('*.yaml'))
NAMES = [path.stem for path in YAMLS]
DISTILLATION = {'knowledge_distillation', 'teacher_sampling', 'early_stop_distillation'}

SHRUNK = {
    'digits': ['train_data.batch_size=32'],
    'fashion': ['train_data={name: fashion_mnist, split: train, batch_size: 32, synthetic: true, subset: 64}'],
    'resnet50': ['train_data.batch_size=4', 'train_data.crop_size=64', 'train_data.num_workers=0', 'precision=fp32'],
}


def shrunk(path: Path) -> list[str]:
    config = load(path).config
    overrides = SHRUNK[path.stem.split('_')[0]] + ['max_duration=2ba', 'eval_data=null']
    for index, teacher in enumerate(config.get('teachers') or []):
        if 'model' in teacher:  # without a network there are no published weights
            overrides.append(f'teachers.{index}.model.weights=null')
    return overrides


@pytest.mark.parametrize('path', YAMLS, ids=NAMES)
def test_checks(path):
    check(load(path))


@pytest.mark.filterwarnings('ignore::UserWarning:torch', 'ignore:.*lr_scheduler.step:UserWarning')
@pytest.mark.parametrize('path', YAMLS, ids=NAMES)
def test_trains_two_batches(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_imagefolder(tmp_path / 'imagenet', classes=2, per_class=8)
    monkeypatch.setenv('IMAGENET_DIR', str(tmp_path / 'imagenet'))
    recipe = tmp_path / 'yamls' / path.name
    recipe.parent.mkdir()
    recipe.write_text(path.read_text())
    for teacher in load(path).config.get('teachers') or []:
        if 'recipe' in teacher:  # a shrunk one, beside the recipe
            source = path.parent / teacher['recipe']
            config = load(source, shrunk(source)).config
            (recipe.parent / teacher['recipe']).write_text(yaml.safe_dump(config))
    summary = run(recipe, shrunk(path))
    assert summary['batches'] == 2
    distills = 'teachers' in load(path).config
    assert (summary['teacher_forwards'] > 0) == distills
    folder = tmp_path / 'runs' / path.stem
    assert json.loads((folder / 'summary.json').read_text()) == summary
    assert (folder / summary['checkpoint']).is_file() and (folder / 'curves.png').is_file()


@pytest.mark.parametrize('path', [path for path in YAMLS if '_kd' in path.stem], ids=lambda path: path.stem)
def test_a_twin_differs_in_the_distillation_alone(path):
    baseline = path.with_name(path.stem.split('_kd')[0] + '.yaml')

    def content(path):
        return [line for line in path.read_text().splitlines() if not line.startswith('#')]

    def undistilled(path):
        config = load(path).config
        config.pop('teachers', None)
        algorithms = {k: v for k, v in (config.pop('algorithms', None) or {}).items() if k not in DISTILLATION}
        return {**config, **({'algorithms': algorithms} if algorithms else {})}

    assert undistilled(path) == load(baseline).config
    assert set(content(baseline)) < set(content(path))


@pytest.mark.parametrize('path', YAMLS, ids=NAMES)
def test_the_header_names_the_command(path):
    header = path.read_text().split('\n\n')[0].splitlines()
    assert all(line.startswith('#') for line in header)
    assert any(line.endswith(f'composer yamls/{path.name}') for line in header)
