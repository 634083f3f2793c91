"""Which rows make a curve, what its runs are charged, and what is said of results that are no good."""

import json

import numpy as np
import pytest
from made_results import METRIC, row, steps, study, sweep

from composer_kd.recipes.load import RecipeError
from composer_kd.studies.curves import baseline_of, charged, courses, lines, missing, read_results
from composer_kd.studies.rows import write_rows

STOP = 'algorithms.early_stop_distillation.stop'


def read(*folders):
    return read_results(folders)


def test_a_curve_is_a_method_with_the_same_settings_but_for_the_length(tmp_path):
    rows = sweep(
        {'kd a': (1, 0, {'settings': {STOP: 0.1}}), 'kd b': (1, 0, {'settings': {STOP: 0.2}}), 'baseline': (1, 0)}
    )
    found = lines(read(study(tmp_path, rows)))
    assert [line.name for line in found] == ['baseline', 'kd stop=0.1', 'kd stop=0.2']
    assert all(len(line.rows) == 12 for line in found)
    assert [length for length, _ in found[0].points()] == ['2ep', '4ep', '8ep', '16ep']
    assert all(baseline_of(line, found) is found[0] for line in found[1:])


def test_a_curve_is_compared_with_the_baseline_of_the_same_settings(tmp_path):
    rows = [
        row(method, 1, 0.9, 1.0, settings={'max_duration': '1ep', 'optimizer.lr': rate, **more})
        for rate in (0.1, 0.2)
        for method, more in (('baseline', {}), ('kd', {'model.width': 8}))
    ]
    found = lines(read(study(tmp_path, rows)))
    names = {line.name: line for line in found}
    baseline = baseline_of(names['kd lr=0.2 width=8'], found)
    assert baseline is names['baseline lr=0.2']
    assert baseline_of(names['kd lr=0.1 width=8'], [names['baseline lr=0.2']]) is None


def test_settings_whose_keys_end_alike_are_told_apart(tmp_path):
    settings = {'max_duration': '1ep', 'model.name': 'a', 'optimizer.name': 'b'}
    (line,) = lines(read(study(tmp_path, [row('kd', 1, 0.9, 1.0, settings=settings)])))
    assert line.name == 'kd model.name=a optimizer.name=b'


def test_a_length_that_is_the_same_in_all_runs_is_that_of_the_recipe(tmp_path):
    rows = [row('kd', seed, 0.9, 1.0, config={'max_duration': '7ep'}) for seed in (1, 2)]
    (line,) = lines(read(study(tmp_path, rows)))
    assert line.points() == [('7ep', [0, 1])]


def test_only_finished_students_are_points(tmp_path):
    rows = [
        row('kd', 1, 0.9, 1.0),
        row('kd', 2, 0.1, 1.0, status='failed', error='out of memory'),
        row('kd', 3, 0.1, 1.0, status='pruned'),
        row('kd', 4, 'nan', 1.0),
        row('teacher', 1, 0.95, 9.0, role='teacher'),
    ]
    (line,) = lines(read(study(tmp_path, rows)))
    assert (line.runs.seeds, line.runs.quality) == ([1], [0.9])
    assert [other['seed'] for other in line.others] == [2, 3, 4]


@pytest.mark.parametrize('charge, seconds', [('none', 1), ('recording', 11), ('teacher', 101), ('all', 111)])
def test_what_a_run_is_charged(tmp_path, charge, seconds):
    some = row('kd', 1, 0.9, 1.0, recording_seconds=10.0, teacher_training_seconds=100.0, teacher_seconds=0.5)
    assert charged(some, charge) == seconds
    (line,) = lines(read(study(tmp_path, [some])), charge)
    assert line.runs.seconds == [seconds]


def test_what_was_to_be_run_and_has_no_row_is_missing(tmp_path):
    rows = sweep({'baseline': (1, 0), 'kd': (1, 0)}, lengths=(2, 4), seeds=(1, 2))
    students = [row['cell'] for row in rows]
    gone, failed = rows.pop(), rows[0]
    failed |= {'status': 'failed', 'error': 'x'}
    (results,) = read(study(tmp_path, rows, students=students))
    assert missing(results) == [gone['cell']]
    (results,) = read(study(tmp_path, rows))  # which says nothing of what was to be run
    assert missing(results) == []


def test_several_studies_are_put_together(tmp_path):
    one = study(tmp_path / 'one', sweep({'baseline': (1, 0), 'kd': (1, 0)}), name='one')
    two = study(tmp_path / 'two', sweep({'baseline': (1, 0), 'recorded': (1, 0)}), name='two')
    found = lines(read(one, two))
    assert [line.name for line in found] == ['one/baseline', 'two/baseline', 'kd', 'recorded']
    assert [baseline_of(line, found) for line in found[2:]] == found[:2]


def test_studies_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [study(tmp_path / name, sweep({'baseline': (1, 0)}), name='same') for name in 'ab']
    assert [line.name for line in lines(read(*folders))] == [f'{folder}/baseline' for folder in folders]


def test_the_arms_of_a_sequence(tmp_path):
    rows = steps({'without': [(10, 0.5), (10, 0.6)], 'with': [(10, 0.5), (4, None), (9, 0.7)]})
    rows[-2] |= {'train_seconds': 5.0}
    without, taught = courses(read(study(tmp_path, rows, kind='search', points=None)))
    assert without.is_baseline and not taught.is_baseline
    assert taught.steps.total.tolist() == [10, 15, 24]
    assert np.array_equal(taught.steps.quality, [0.5, np.nan, 0.7], equal_nan=True)


def test_a_failed_step_costs_what_is_known_of_it(tmp_path):
    rows = steps({'without': [(10, 0.5), (10, 0.6)]})
    rows[1] |= {'status': 'failed', 'train_seconds': None, 'metrics': {}}
    (course,) = courses(read(study(tmp_path, rows, kind='chain', points=None)))
    assert course.steps.total.tolist() == [10, 10]


def test_an_arm_may_say_that_it_is_the_baseline(tmp_path):
    rows = steps({'with': [(10, 0.5)], 'without': [(10, 0.5)]})
    rows[1] |= {'baseline': True}
    found = courses(read(study(tmp_path, rows, kind='chain', points=None)))
    assert [course.is_baseline for course in found] == [False, True]


def test_students_are_judged_by_what_goes_on_from_them(tmp_path):
    rows = [row('kd', seed, 0.1, 5.0) for seed in (1, 2, 3, 4)]
    rows[3] |= {'status': 'failed', 'error': 'out of memory'}
    then = {'role': 'follow-up', 'seconds': 1.0}
    rows += [
        row('tuned', 1, 0.8, **then, of='kd-seed1'),
        row('tuned', 2, 0.9, **then, of='kd-seed2', status='failed', error='no disk'),
        row('other', 3, 0.9, **then, of='kd-seed3'),
    ]
    students = [row['cell'] for row in rows[:4]]
    folder = study(tmp_path, rows, metric='tuned/metrics/eval/F1', then=['tuned', 'other'], students=students)
    for each in rows[4:]:
        each['metrics'] = {'metrics/eval/F1': each['metrics'][METRIC]}
    write_rows(folder, rows)
    (results,) = read(folder)
    assert [r['seed'] for r in results.students] == [1, 2, 4]  # nothing has gone on from the third one yet
    (line,) = lines([results])
    assert ([*line.runs.seconds], [*line.runs.quality]) == ([5.0], [0.8])  # not 1 second: what is timed is the student
    assert [r['error'] for r in line.others] == ['no disk (tuned-seed2)', 'out of memory']
    assert {r['status'] for r in line.others} == {'failed'} and missing(results) == ['kd-seed3']
    assert [r['cell'] for r in results.judged()] == ['kd-seed1', 'kd-seed2', 'kd-seed4']

    (results,) = read_results([folder], METRIC, 'min')
    assert results.goal == 'min' and [results.quality(r) for r in results.students[:3]] == [0.1] * 3
    with pytest.raises(
        RecipeError, match=r'results.jsonl:1: kd-seed1 did not report tuned/metrics/eval/F2; did you mean'
    ):
        read_results([folder], 'tuned/metrics/eval/F2')


@pytest.mark.parametrize('text', ['{"study": "made", "cell', '[]\n', '{"study": 3}\n', 'NaN\n'])
def test_a_damaged_row_is_named(tmp_path, text):
    folder = study(tmp_path / 'made', sweep({'baseline': (1, 0)}, lengths=(2,), seeds=(1, 2)))
    with (folder / 'results.jsonl').open('a') as file:
        file.write(text)
    with pytest.raises(RecipeError, match=r'made/results.jsonl:3: '):
        read(folder)


@pytest.mark.parametrize(
    'change, said',
    [
        ({'train_seconds': None}, 'train_seconds None'),
        ({'train_seconds': 0.0}, 'train_seconds 0.0'),
        (
            {'metrics': {'metrics/eval/MulticlassAcuracy': 0.5}},
            f"did not report {METRIC}; did you mean 'metrics/eval/Mu",
        ),
        ({'metrics': {METRIC: [0.5]}}, 'is no number'),
        ({'metrics': {METRIC: 'much'}}, 'is no number'),
    ],
)
def test_a_finished_run_without_what_a_curve_needs_is_named(tmp_path, change, said):
    folder = study(tmp_path / 'made', [row('kd', 1, 0.9, 1.0), row('kd', 2, 0.9, 1.0, **change)])
    with pytest.raises(RecipeError, match=r'made/results.jsonl:2: kd-seed2') as error:
        read(folder)
    assert said in str(error.value)


def test_a_folder_without_a_study_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match=r'nowhere: there is no study; give the folder of one'):
        read(tmp_path / 'nowhere')


@pytest.mark.parametrize('rows, todo', [([], 'let one finish first'), ([('failed', 'x')], 'see .*results.jsonl')])
def test_a_study_without_a_finished_run_is_an_error(tmp_path, rows, todo):
    rows = [row('kd', 1, 0.9, 1.0, status=status, error=error) for status, error in rows]
    with pytest.raises(RecipeError, match=f'no run of this study is finished; {todo}'):
        read(study(tmp_path, rows))


@pytest.mark.parametrize('key, value', [('goal', 'most'), ('kind', 'sweeps'), ('metric', 3), ('name', None)])
def test_damaged_settings_of_a_study_are_named_with_their_line(tmp_path, key, value):
    folder = study(tmp_path, [row('kd', 1, 0.9, 1.0)])
    text = ''.join(
        f'{json.dumps(value) and key}: {json.dumps(value)}\n' if line.startswith(f'{key}:') else line
        for line in (folder / 'study.yaml').read_text().splitlines(keepends=True)
    )
    (folder / 'study.yaml').write_text(text)
    number = next(n for n, line in enumerate(text.splitlines(), 1) if line.startswith(f'{key}:'))
    with pytest.raises(RecipeError, match=f'study.yaml:{number}: {key}: must be'):
        read(folder)


@pytest.mark.parametrize('change', [{'goal': 'min'}, {'metric': 'metrics/eval/F1'}, {'kind': 'chain'}])
def test_what_cannot_be_compared_is_not(tmp_path, change):
    one = study(tmp_path / 'one', [row('kd', 1, 0.9, 1.0)])
    metric = change.get('metric', METRIC)
    other = study(tmp_path / 'two', [row('kd', 1, 0.9, 1.0, metric=metric)], **change)
    with pytest.raises(RecipeError, match=r'two/study.yaml: .* report them one by one'):
        read(one, other)
    with pytest.raises(RecipeError, match='named twice'):
        read(one, one)
