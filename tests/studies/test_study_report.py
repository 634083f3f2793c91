"""What a report says, in words, tables and pictures, and what it says instead where there is nothing to say."""

import json
import re
import sys

import plotly.graph_objects as go
import pytest
from made_results import METRIC, row, steps, study, sweep
from PIL import Image

from composer_kd.recipes.load import RecipeError
from composer_kd.studies import report_page, report_pictures
from composer_kd.studies.report import report
from composer_kd.studies.report_figures import SYMBOLS, colour_of, figures
from composer_kd.studies.report_findings import find
from composer_kd.studies.report_markdown import markdown
from composer_kd.studies.report_words import answer, factor_text, seconds_text

PLAIN = {'baseline': (10, 0), 'kd': (14, 0.02, {'share': 0.3, 'teacher_training_seconds': 180.0})}


def said(folder, *more, charge='none'):
    return markdown(find([folder, *more], charge), []).replace('\u00a0', ' ')


def curve(method, points, seeds=(1, 2), **more):
    """Rows of length -> (seconds, quality), the same for all seeds."""
    return [
        row(method, seed, quality, seconds, settings={'max_duration': length}, **more)
        for seed in seeds
        for length, (seconds, quality) in points.items()
    ]


def test_the_answer_comes_first(tmp_path):
    rows = curve('baseline', {'1ep': (10, 0.8), '2ep': (20, 0.9)})
    rows += curve('kd', {'0.5ep': (5, 0.85), '1ep': (10, 0.9), '2ep': (20, 0.95)})
    report([study(tmp_path, rows)])
    text = (tmp_path / 'report.md').read_text().replace('\u00a0', ' ')
    assert text.splitlines()[2] == "**kd reaches the baseline's 90.00 % 2.00x sooner (95 % interval 2.00 - 2.00).**"
    page = (tmp_path / 'report.html').read_text().replace('\u00a0', ' ')
    assert '<h1>kd reaches the baseline&#x27;s 90.00 % 2.00x sooner (95 % interval 2.00 - 2.00).</h1>' in page


@pytest.mark.parametrize(
    'points, words',
    [
        (
            {'1ep': (30, 0.85), '2ep': (60, 0.92)},
            r"^No method reaches the best of the baseline sooner\. kd reaches the baseline's 90\.00 % "
            r'later, in 2\.\d\dx the time',
        ),
        (
            {'1ep': (5, 0.7), '2ep': (8, 0.85)},
            r"kd does not reach the baseline's 90\.00 %; its own best, 85\.00 %, it reaches 1\.77x sooner",
        ),
        (
            {'1ep': (8, 0.95), '2ep': (16, 0.97)},
            r'^kd at its shortest \(95\.00 % in 8 s\) is better already than the baseline ever gets '
            r'\(90\.00 %, after 20 s\): it reaches that more than 2\.50x sooner\.$',
        ),
        (
            {'1ep': (40, 0.95), '2ep': (80, 0.97)},
            'how much sooner it gets there can be said only with shorter runs of it',
        ),
        (
            {'1ep': (20, 0.5), '2ep': (40, 0.6)},
            r'The baseline at its shortest \(80\.00 % in 10 s\) is better already than kd ever gets '
            r'\(60\.00 %, after 40 s\): kd takes more than 4\.00x as long\.$',
        ),
        (
            {'1ep': (2, 0.5), '2ep': (4, 0.6)},
            'how much later kd gets there can be said only with shorter runs of the baseline',
        ),
    ],
)
def test_each_way_in_which_curves_can_lie(tmp_path, points, words):
    rows = curve('baseline', {'1ep': (10, 0.8), '2ep': (20, 0.9)}) + curve('kd', points)
    assert re.search(words, answer(find([study(tmp_path, rows)], 'none')).replace('\u00a0', ' '))


def test_an_interval_with_one_in_it_is_no_difference(tmp_path):
    text = said(study(tmp_path, sweep({'baseline': (10, 0), 'kd': (10, 0)}, noise=0.01)))
    assert 'no difference that these seeds can tell' in text and 'rather too narrow' in text


def test_one_seed_says_so(tmp_path):
    assert 'one seed: no interval' in said(study(tmp_path, sweep(PLAIN, seeds=(17,))))


def test_resamples_without_overlap_are_counted(tmp_path):
    rows = curve('baseline', {'1ep': (1, 0.0)}) + [
        row('baseline', s, q, 2, settings={'max_duration': '2ep'}) for s, q in ((1, 0.0), (2, 1.0))
    ]
    rows += curve('kd', {'1ep': (1, 0.4)}, seeds=(3, 4))
    folder = study(tmp_path, rows)
    report([folder])
    for name in ('report.md', 'report.html'):
        text = (folder / name).read_text()
        assert re.search(r'in \d\d\d of 2000 resamples the curves do not overlap, too many for an interval', text)
        assert '95 % interval 0' not in text


def test_of_several_methods_the_quickest_is_named_and_how_many_there_were(tmp_path):
    text = said(study(tmp_path, sweep({**PLAIN, 'better': (11, 0.02), 'worse': (30, 0)})))
    assert text.splitlines()[2].startswith("**better reaches the baseline's")
    of_all = 'Of 3 curves 2 reach the best of the baseline sooner, 2 of them by more than their seeds explain'
    assert f'{of_all}; this is the quickest.' in text


def test_without_a_baseline_there_is_no_comparison_but_a_report(tmp_path):
    folder = study(tmp_path, sweep({'kd': (14, 0.02)}))
    text = said(folder)
    report([folder])
    assert 'There is nothing to compare yet' in text and 'compared with nothing' in text
    assert not (tmp_path / 'speedup.png').exists() and '| kd | 16ep | 3 |' in text


def test_less_is_better_where_the_goal_says_so(tmp_path):
    metric = 'metrics/eval/CrossEntropy'
    rows = [
        row(method, 1, 3 - epochs / 4, seconds * epochs, settings={'max_duration': f'{epochs}ep'}, metric=metric)
        for method, seconds in (('baseline', 10), ('kd', 5))
        for epochs in (1, 2, 4)
    ]
    folder = study(tmp_path, rows, metric=metric, goal='min')
    assert "**kd reaches the baseline's 2 2.00x sooner (one seed: no interval).**" in said(folder)
    assert figures(find([folder], 'none'))['speedup']['layout']['xaxis']['autorange'] == 'reversed'


def test_what_is_charged_is_said_and_changes_the_speed_up(tmp_path):
    folder = study(tmp_path, sweep({**PLAIN, 'recorded': (10, 0.02, {'recording_seconds': 50.0})}))
    plain, charged = said(folder), said(folder, charge='all')
    assert 'Neither the training of the teachers nor the making of records is charged.' in plain
    assert 'as if it had to pay for them alone' in charged
    assert '| kd | 30.0% | 3 min |  |' in plain and '| recorded | 0.0% |  | 50 s |' in plain
    factor = re.compile(r"- kd reaches the baseline's [\d.]+ % ([\d.]+)x sooner")
    found = factor.search(plain)
    assert found and float(found[1]) > 2 and not factor.search(charged)


def test_failed_missing_and_diverged_runs_are_named(tmp_path):
    rows = sweep(PLAIN)
    rows[3] |= {'status': 'failed', 'error': 'Traceback\nRuntimeError: out of memory\n', 'metrics': {}}
    rows[5]['metrics'][METRIC] = 'nan'
    students = [row['cell'] for row in rows]
    del rows[7]
    text = said(study(tmp_path, rows, students=students))
    assert 'Not all runs are in it: 1 failed, 1 are not there yet.' in text
    assert '- kd-4ep-seed17 failed and is left out: RuntimeError: out of memory' in text
    assert f'- kd-8ep-seed17 is left out: its {METRIC} is nan' in text
    assert '- Not there yet: kd-16ep-seed17' in text
    assert '| kd | 4ep | 2 |' in text


def test_runs_on_different_hardware_do_not_compare(tmp_path):
    rows = sweep({'baseline': (10, 0), 'kd': (14, 0.02, {'device': 'H100'})})
    assert 'runs on different hardware (1 x H100, 1 x cpu) do not compare' in said(study(tmp_path, rows))


def test_how_it_was_made(tmp_path):
    text = said(study(tmp_path, sweep(PLAIN)))
    assert '| hardware | 1 x cpu, fp32 |' in text and '| commit | abc |' in text and '| versions | torch 2.7 |' in text
    assert '`composer yamls/kd.yaml max_duration=16ep seed=19`' in text


def test_several_studies_and_another_folder(tmp_path):
    one = study(tmp_path / 'one', sweep(PLAIN), name='one')
    two = study(tmp_path / 'two', sweep({'baseline': (10, 0), 'recorded': (11, 0.01)}), name='two')
    page = report([one, two], out=tmp_path / 'new' / 'out')
    assert page == tmp_path / 'new' / 'out' / 'report.html'
    text = (page.parent / 'report.md').read_text()
    assert text.startswith('# one, two\n') and "recorded reaches two/baseline's" in text
    assert not (one / 'report.md').exists()


def test_a_sequence(tmp_path):
    arms = {'without': [(30, 0.8), (30, 0.85), (30, 0.9)], 'with': [(30, 0.8), (12, None), (33, 0.92)]}
    text = said(study(tmp_path, steps(arms), kind='search', points=None))
    assert text.splitlines()[2] == (
        '**"with" reaches the best of "without", 90.00 %, 1.20x sooner, after 75 s of training in place of 90 s.**'
    )
    assert '| with | 2 | 1 | 0 | 75 s | 92.00 % | 92.00 % | 1.20x | 90.00 % |' in text
    assert '| 85.00 % | 60 s (1.00x) | 75 s (0.80x) |' in text
    assert '| with | 1 | lr 0.2 | pruned | 80.00 % | 12 s | 42 s |' in text


def test_a_sequence_that_does_not_get_there(tmp_path):
    arms = {'without': [(30, 0.8), (30, 0.9)], 'with': [(30, 0.8), (10, 0.85)]}
    text = said(study(tmp_path, steps(arms), kind='chain', points=None))
    assert (
        '"with" does not reach the best of "without", 90.00 %; its own best, 85.00 %, it reaches 1.50x sooner' in text
    )
    assert '| 90.00 % | 60 s (1.00x) | never |' in text


def test_teachers_of_a_sequence_are_charged_already(tmp_path):
    folder = study(tmp_path, steps({'without': [(30, 0.8)]}), kind='chain', points=None)
    with pytest.raises(RecipeError, match='leave out --charge teacher'):
        report([folder], charge='teacher')


def test_the_figures_are_such_as_plotly_takes(tmp_path):
    one = study(tmp_path / 'one', sweep({**PLAIN, 'above': (12, 0.2)}))
    two = study(tmp_path / 'two', steps({'without': [(30, 0.8)], 'with': [(3, None)]}), kind='continual', points=None)
    for folder, names in ((one, ['time', 'speedup']), (two, ['cost'])):
        found = figures(find([folder], 'none'))
        assert [*found] == names
        for figure in found.values():
            assert go.Figure(figure).data


def test_the_figure_shows_every_run_and_the_frontier(tmp_path):
    found = figures(find([study(tmp_path, sweep(PLAIN))], 'none'))['time']['data']
    assert [len(trace['x']) for trace in found if trace['legendgroup'] == '1'] == [12, 4, 4]
    frontier = found[0]
    assert frontier['legendgroup'] == 'muted' and frontier['y'] == sorted(frontier['y'])


def test_no_two_curves_look_alike():
    looks = [(colour_of(index), SYMBOLS[index % len(SYMBOLS)]) for index in range(40)]
    assert len(set(looks)) == 40 and [index for index in range(40) if colour_of(index) == 0] == [0]
    assert len(report_page._MARKS) == len(SYMBOLS) and {*SYMBOLS} <= {*report_pictures._MARKERS}


def test_the_pictures_show_something(tmp_path):
    report([study(tmp_path, sweep(PLAIN))])
    report([study(tmp_path / 'steps', steps({'without': [(3, 0.8), (3, 0.9)]}), kind='chain', points=None)])
    for name in ('quality_vs_time.png', 'speedup.png', 'steps/cumulative_cost.png'):
        picture = Image.open(tmp_path / name)
        assert picture.width > 1000 and len(picture.getcolors(picture.width * picture.height)) > 100


def test_names_are_text_wherever_they_stand(tmp_path):
    name = '</script><b/onclick="x()">$x|y`'
    rows = sweep({'baseline': (10, 0), name: (9, 0.01)})
    report([study(tmp_path, rows, name=name)])
    page = (tmp_path / 'report.html').read_text()
    assert '<b/onclick' not in page and page.count('</script>') == 3
    data = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert data and '&lt;b/onclick' in json.dumps(json.loads(data[1]))
    assert '\\|y' in (tmp_path / 'report.md').read_text()


def test_a_page_forbids_itself_the_network(tmp_path):
    page = report([study(tmp_path, sweep(PLAIN))]).read_text()
    ours = page[: page.index('<script>')]
    assert "default-src 'none'" in ours and 'http:' not in ours and 'https:' not in ours


def test_an_unknown_charge_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match='--charge half: must be one of none, recording, teacher, all'):
        report([tmp_path], charge='half')  # type: ignore[arg-type]


def test_without_plotly_nothing_is_written_and_the_error_says_what_to_install(tmp_path, monkeypatch):
    folder = study(tmp_path, sweep(PLAIN))
    before = {*tmp_path.iterdir()}
    monkeypatch.setitem(sys.modules, 'plotly.offline', None)
    with pytest.raises(RecipeError, match=r"needs plotly: pip install 'composer-kd\[studies\]'"):
        report([folder])
    assert {*tmp_path.iterdir()} == before


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    folder = study(tmp_path / 'made', sweep(PLAIN))
    (tmp_path / 'file').touch()
    with pytest.raises(RecipeError, match='cannot write the report to'):
        report([folder], out=tmp_path / 'file')


@pytest.mark.parametrize(
    'seconds, text',
    [(0.1234, '0.123 s'), (59.96, '60 s'), (119, '119 s'), (120, '2 min'), (7200, '2 h'), (3600 * 100, '4.17 d')],
)
def test_times_are_easy_to_read(seconds, text):
    assert seconds_text(seconds).replace('\u00a0', ' ') == text


def test_factors_are_easy_to_read():
    assert [factor_text(factor) for factor in (0.5, 1.234, 12.34, 123.4)] == ['0.50x', '1.23x', '12.3x', '123x']
