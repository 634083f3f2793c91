import dataclasses
import json
import random
from pathlib import Path

import pytest

from composer_kd.recipes import RecipeError
from composer_kd.recipes.load import read
from composer_kd.studies.search import Search, candidates, checked
from composer_kd.studies.study import Study

SPACE = """\
search:
  optimizer.lr: {low: 1.0e-3, high: 1.0, log: true}
  model.width: {choices: [8, 16, 32]}
  train_data.batch_size: {low: 32, high: 128, step: 32}
  optimizer.momentum: {low: 0, high: 0.9}
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Make the study of a search file."""
    monkeypatch.chdir(tmp_path)

    def make(more='', goal='max', space=SPACE):
        Path('s.yaml').write_text(f'metric: x\ngoal: {goal}\n{space}{more}')
        found = Study.of(read('s.yaml', 'sequence'), 'search', ['search', 'sampler', 'pruner', 'storage'])
        found.folder.mkdir(parents=True, exist_ok=True)
        return found

    return make


def quality(params):
    return -abs(params['optimizer.lr'] - 0.1) + params['model.width'] / 100


def go_on(search, start, stop):
    found = []
    for number in range(start, stop):
        params = search.proposed(number).params
        found.append(params)
        if number == 2:
            search.tell(number, 'failed')
        elif number == 3:
            assert not search.is_to_end(number, [0.1, 0.2])
            search.tell(number, 'pruned')
        else:
            search.tell(number, 'finished', quality(params))
    return found


SAMPLERS = {
    'tpe': 'sampler: {name: tpe_sampler, seed: 3, n_startup_trials: 3, multivariate: true}\n',
    'qmc': 'sampler: {name: qmc, warn_independent_sampling: false}\n',
    'nsgaii': 'sampler: {name: nsgaii_sampler, population_size: 3}\n',
}


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_a_search_goes_on_as_it_would_have_gone_on(study, sampler):
    of = study(SAMPLERS[sampler])
    whole = go_on(Search(of, 'a'), 0, 6)
    assert len({json.dumps(params, sort_keys=True) for params in whole}) == 6
    for number in range(6):
        search = Search(of, 'b')
        assert search.proposed(number).params == whole[number]
        assert go_on(search, number, number + 1) == whole[number : number + 1]


def test_seeds_and_outcomes_make_other_searches(study):
    first = go_on(Search(study(SAMPLERS['tpe']), 'a'), 0, 6)
    assert Search(study(SAMPLERS['tpe'].replace('seed: 3', 'seed: 4')), 'b').proposed(0).params != first[0]
    worse = Search(study(SAMPLERS['tpe']), 'c')
    for number in range(6):
        assert (worse.proposed(number).params == first[number]) == (number < 3)
        worse.tell(number, 'finished', random.Random(number).random())


def test_values_are_of_what_is_searched(study):
    for params in go_on(Search(study(), 'a'), 0, 4):
        assert 1e-3 <= params['optimizer.lr'] <= 1.0
        assert params['model.width'] in (8, 16, 32)
        assert params['train_data.batch_size'] in (32, 64, 96, 128)
        assert isinstance(params['optimizer.momentum'], float)
    space, _, _ = checked(study())
    assert [candidates(found) for found in space.values()] == [[1e-3, 1.0], [8, 16, 32], [32, 128], [0, 0.9]]


@pytest.mark.parametrize(('goal', 'bad'), [('max', 0.1), ('min', 0.9)])
def test_the_pruner_ends_what_falls_behind(study, goal, bad):
    of = study('pruner: {name: median_pruner, n_startup_trials: 2, n_warmup_steps: 1}\n', goal)
    search = Search(of, 'a')
    for number in range(2):
        search.proposed(number)
        assert not search.is_to_end(number, [0.5, 0.5, 0.5])
        search.tell(number, 'finished', 0.5)
    search.proposed(2)
    assert not search.is_to_end(2, [])
    assert not search.is_to_end(2, [bad])  # it may be good yet
    # What was written down before the driver was killed is judged by the next one.
    assert Search(of, 'a').is_to_end(2, [bad, bad, 0.5])
    assert search.evaluated(2) == 2
    assert search.outcome(2) == 'running'
    search.tell(2, 'pruned')
    assert [search.outcome(number) for number in range(3)] == ['finished', 'finished', 'pruned']


def test_trials_that_failed_run_again_under_their_numbers(study, monkeypatch):
    monkeypatch.setattr('optuna.delete_study', None)  # there is no moment at which a trial is not there
    search = Search(study(), 'a')
    params = go_on(search, 0, 5)
    Search(study(), 'b').proposed(0)
    Search(study(), 'b').tell(0, 'failed')
    search.run_failed_again()
    assert Search(study(), 'b').outcome(0) == 'failed'
    outcomes = ['finished', 'finished', 'running', 'pruned', 'finished']
    assert [search.outcome(number) for number in range(5)] == outcomes
    assert [search.proposed(number).params for number in range(5)] == params
    search.tell(2, 'finished', 0.5)
    assert search.outcome(2) == 'finished'


def test_optuna_speaks_among_our_lines(study, capsys):
    search = Search(study(), 'a')
    search.proposed(0)
    search.tell(0, 'finished', 0.5)
    captured = capsys.readouterr()
    assert not captured.out and not captured.err
    import optuna

    optuna.logging.get_logger('optuna.somewhere').warning('look here')
    captured = capsys.readouterr()
    assert captured.out == 'optuna: look here\n' and not captured.err


MISTAKES = {
    'nothing': ('search: {}\n', 's.yaml:3: search: say what is searched'),
    'words': ('search:\n  x: big\n', "s.yaml:4: search.x: must be a mapping, not 'big'"),
    'key': ('search:\n  x: {lo: 1, high: 2}\n', "s.yaml:4: search.x.lo: there is no 'lo' here; did you mean 'low'?"),
    'half': ('search:\n  x: {low: 1}\n', 's.yaml:4: search.x: must be {low: 1, high: 10}'),
    'order': ('search:\n  x: {low: 2, high: 1}\n', 's.yaml:4: search.x: `low <= high` must hold'),
    'log': ('search:\n  x: {low: 0.0, high: 1.0, log: true}\n', 's.yaml:4: search.x: `low > 0` must hold'),
    'step': ('search:\n  x: {low: 1, high: 4, step: 2}\n', 's.yaml:4: search.x: '),
    'both': ('search:\n  x: {choices: [1], low: 2}\n', 's.yaml:4: search.x: must be {choices: [...]}'),
    'lists': ('search:\n  x: {choices: [[1]]}\n', 's.yaml:4: search.x: must be {choices: [...]}'),
    'sampler': (
        SPACE + 'sampler: {name: tpe_samplr}\n',
        "sampler.name: there is no sampler 'tpe_samplr'; did you mean",
    ),
    'argument': (SPACE + 'sampler: {name: tpe, sed: 1}\n', "s.yaml:8: sampler.sed: TPESampler has no argument 'sed'"),
    'pruner': (SPACE + 'pruner: {name: hyper}\n', "s.yaml:8: pruner.name: there is no pruner 'hyper'"),
    'range': (SPACE + 'pruner: {name: percentile_pruner, percentile: 200.0}\n', 's.yaml:8: pruner: '),
    'storage': (
        SPACE + 'storage: nowhere\n',
        's.yaml:8: storage: cannot open the database of this URL: Could not parse',
    ),
    'folder': (
        SPACE + 'storage: sqlite:///no/s.db\n',
        'storage: cannot open the database sqlite:///no/s.db: (sqlite3.',
    ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_one_line(study, mistake):
    text, message = MISTAKES[mistake]
    with pytest.raises(RecipeError) as caught:
        Search(study(space=text), 'a')
    assert message in str(caught.value)
    assert '\n' not in str(caught.value)


def test_no_password_is_shown(study):
    with pytest.raises(RecipeError, match=r'cannot open the database nonesuch://me:\*\*\*@there/db: ') as caught:
        Search(study('storage: nonesuch://me:secret@there/db\n'), 'a')
    assert 'secret' not in str(caught.value)


def test_a_database_of_another_search_is_not_gone_on_with(study):
    Search(study(), 'a').proposed(0)
    with pytest.raises(RecipeError, match=r's\.yaml:2: goal: sqlite:.*a\.db holds a search with another goal'):
        Search(study(goal='min'), 'a')
    other = dataclasses.replace(study(), metric='y')
    with pytest.raises(RecipeError, match=r's\.yaml:1: metric: sqlite:.*a\.db holds a search with another metric'):
        Search(other, 'a')
    with pytest.raises(RecipeError, match=r's\.yaml:3: search: .* holds a search over something else'):
        Search(study(space=SPACE.replace('128', '256')), 'a')
