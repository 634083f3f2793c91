import math

import pytest

from composer_kd.recipes.load import RecipeError, load


def test_values_and_where_they_stand(write):
    path = write('optimizer:\n  name: sgd\n  lr: 1e-3  # YAML 1.1 would make this text\nteachers:\n- name: network\n')
    recipe = load(path, ['model.width=8', 'teachers.0.checkpoint=x.pt'])
    assert recipe.config == {
        'model': {'name': 'small_convnet', 'num_classes': 10, 'width': 8},
        'train_data': {'name': 'digits', 'split': 'train', 'batch_size': 64},
        'max_duration': '1ep',
        'optimizer': {'name': 'sgd', 'lr': 0.001},
        'teachers': [{'name': 'network', 'checkpoint': 'x.pt'}],
    }
    assert recipe.where(['optimizer', 'lr']) == 'x.yaml:6'
    assert recipe.where(['optimizer', 'momentum']) == 'x.yaml:4'  # the nearest that stands there
    assert recipe.where(['teachers', 0, 'name']) == 'x.yaml:8'
    assert recipe.where(['teachers', 0, 'checkpoint']) == 'command line'
    assert recipe.where(['model', 'width']) == 'command line'
    assert recipe.where(['model', 'num_classes']) == 'x.yaml:1'
    assert recipe.where() == 'x.yaml:1'


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        *[('1e-3', 0.001), ('1E3', 1000.0), ('1.5e2', 150.0), ('-.5', -0.5), ('1.', 1.0), ('.inf', math.inf)],
        *[
            ('3', 3),
            ('0x10', 16),
            ('1_000', 1000),
            ('true', True),
            ('False', False),
            ('no', 'no'),
            ('null', None),
            ('', None),
        ],
        *[('1ep', '1ep'), ('e3', 'e3'), ('"1e3"', '1e3'), ('2024-01-01', '2024-01-01'), ('1.2.3', '1.2.3')],
        ('[0.9, 1e-2]', [0.9, 0.01]),
    ],
)
def test_scalars(write, text, value):
    for recipe in (load(write(f'seed: {text}\n')), load(write(), [f'seed={text}'])):
        assert recipe.config['seed'] == value
        assert type(recipe.config['seed']) is type(value)


def test_override_of_a_section_replaces_its_lines(write):
    recipe = load(write(), ['model={name: resnet18}'])
    assert recipe.config['model'] == {'name': 'resnet18'}
    assert recipe.where(['model', 'width']) == 'command line'


def test_override_makes_a_section_and_an_algorithm(write):
    recipe = load(
        write('callbacks:\n'), ['algorithms.ema.half_life=10ba', 'callbacks.lr_monitor={}', 'seed=1', 'seed=2']
    )
    assert recipe.config['algorithms'] == {'ema': {'half_life': '10ba'}}
    assert recipe.config['callbacks'] == {'lr_monitor': {}}
    assert recipe.config['seed'] == 2


def test_interpolation(write, monkeypatch):
    monkeypatch.setenv('SOMEWHERE', '/data')
    recipe = load(write('load_path: ${oc.env:SOMEWHERE}\nrun_name: ${max_duration}\nseed: ${oc.env:NOT_SET,null}\n'))
    assert recipe.config['load_path'] == '/data'
    assert recipe.config['run_name'] == '1ep'
    assert recipe.config['seed'] is None
    assert load(write('run_name: ${max_duration}\n'), ['max_duration=2ep']).config['run_name'] == '2ep'


def test_merge_keys_and_aliases(write):
    recipe = load(write('callbacks: &all {a: 1, b: 2}\nloggers: {<<: *all, b: 3}\n'), ['callbacks.a=5'])
    assert recipe.config['loggers'] == {'a': 1, 'b': 3}
    assert recipe.config['callbacks'] == {'a': 5, 'b': 2}
    twice = 'callbacks: &all {a: 1, b: 2}\nloggers: &more {<<: *all, b: 3}\nalgorithms: *more\n'
    assert load(write(twice)).config['algorithms'] == {'a': 1, 'b': 3}


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        ('model: {name: x}\n', 'x.yaml:4: model: given twice, first in line 1; remove one'),
        ('optimizer:\n  lr: 1\n  lr: 2\n', 'x.yaml:6: optimizer.lr: given twice, first in line 5; remove one'),
        ('a: [1\n', "x.yaml:5: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ('\tb: 1\n', "x.yaml:4: not valid YAML: found character '\\t' that cannot start any token"),
        ('a: !!python/object/apply:os.getcwd []\n', 'x.yaml:4: not valid YAML: could not determine a constructor'),
        ('a: !set {b}\n', 'x.yaml:4: not valid YAML: could not determine a constructor'),
        ('a: !!set {b}\n', 'x.yaml:4: a: '),
        ('a: &a [*a]\n', 'x.yaml:1: not valid YAML: an alias contains itself'),
        ('? [a]\n: b\n', 'x.yaml:4: not valid here: a key must be a word'),
        ('seed: ${sed}\n', "x.yaml:4: seed: Interpolation key 'sed' not found"),
        ('teachers:\n- {model: "${modle}"}\n', "x.yaml:5: teachers.0.model: Interpolation key 'modle' not found"),
        ('seed: ${\n', 'x.yaml:4: seed: '),
        ('seed: ???\n', 'x.yaml:4: seed: Missing mandatory value'),
        ('---\na: 1\n', 'x.yaml:4: not valid YAML: but found another document'),
    ],
)
def test_wrong_files(write, more, message):
    with pytest.raises(RecipeError) as error:
        load(write(more))
    assert str(error.value).startswith(message)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('text', ['', '- a\n', 'just text\n', 'services: {web: {image: nginx}}\n', '3\n'])
def test_files_that_are_no_recipes(write, text):
    with pytest.raises(RecipeError, match=r'^x.yaml:1: this is no recipe: a recipe is a mapping with model'):
        load(write(text, head=''))


def test_files_that_cannot_be_read(write, tmp_path):
    path = write()
    with pytest.raises(RecipeError, match=r'^y.yaml: cannot read the recipe: No such file'):
        load('y.yaml')
    path.write_bytes(b'\xff\xfe\x00')
    with pytest.raises(RecipeError, match='cannot read the recipe'):
        load(path)
    path.write_text('a\0b')
    with pytest.raises(RecipeError, match=r'x.yaml:1: not valid YAML: unacceptable character'):
        load(path)
    with pytest.raises(RecipeError, match='cannot read the recipe: Is a directory'):
        load(tmp_path)


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('modle.width=3', "modle.width: no 'modle' here; did you mean 'model'?"),
        ('model.net.width=3', "model.net.width: no 'net' here; there are: name, num_classes, width"),
        ('max_duration.x=3', "max_duration.x: no 'x' in the value '1ep'"),
        ('teachers.1.name=x', "teachers.1.name: no entry '1' in a list of 1; the first is 0"),
        ('teachers.first=x', "teachers.first: no entry 'first' in a list of 1; the first is 0"),
        ('seed=[1', "seed: '[1' is not valid YAML"),
        ('--help', "an override is written key=value, not '--help'"),
        ('=3', "an override is written key=value, not '=3'"),
    ],
)
def test_wrong_overrides(write, override, message):
    with pytest.raises(RecipeError) as error:
        load(write('teachers: [{name: network}]\n'), [override])
    assert str(error.value) == f'command line: {message}'
