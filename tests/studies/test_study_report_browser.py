"""The page of a report in a real browser, as wide as a desk's screen and as a phone's."""

import json
import re
import shutil
import subprocess

import pytest
from made_results import steps, study, sweep
from PIL import Image

from composer_kd.studies.report import report

CHROMIUM = shutil.which('chromium')
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='needs chromium in the PATH')

QUIET = [
    *('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--hide-scrollbars'),
    *('--disable-background-networking', '--disable-component-update', '--disable-sync', '--disable-extensions'),
]

# A page that shows the report in two frames, and says what is in them.
FRAMES = """
<body style="margin: 0">
<iframe width="1400" height="3000" src="report.html"></iframe>
<iframe width="390" height="3000" src="report.html"></iframe>
<pre id="found"></pre>
<script>
const overlaps = (boxes) => boxes.some((a, i) => boxes.some((b, j) =>
  i < j && a.width && b.width && a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom));
const look = (frame) => {
  const page = frame.contentDocument, all = (what) => [...page.querySelectorAll(what)];
  return {
    answer: page.querySelector('h1').textContent,
    width: frame.clientWidth,
    needed: page.documentElement.scrollWidth,
    plots: all('.plot').map((plot) => ({
      width: plot.querySelector('.main-svg').getBoundingClientRect().width,
      points: plot.querySelectorAll('.points path').length,
      lines: plot.querySelectorAll('.js-line').length,
      overlap: overlaps([...plot.querySelectorAll('.xtick text')].map((text) => text.getBoundingClientRect())) ||
        overlaps([...plot.querySelectorAll('.ytick text')].map((text) => text.getBoundingClientRect())),
    })),
  };
};
const frames = [...document.querySelectorAll('iframe')];
addEventListener('load', () => setTimeout(() => {
  const found = {shown: frames.map(look)};
  frames[0].contentDocument.querySelector('.chips button').click();
  setTimeout(() => {
    found.hidden = look(frames[0]);
    document.getElementById('found').textContent = JSON.stringify(found);
  }, 1000);
}, 1000));
</script>
"""


def browse(page, *options, profile):
    assert CHROMIUM is not None
    command = [CHROMIUM, *QUIET, f'--user-data-dir={profile}', '--virtual-time-budget=8000', *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def found_in(folder, profile):
    """What the browser shows of the report, after it is known that nothing went wrong."""
    frames = folder / 'frames.html'
    frames.write_text(FRAMES)
    options = ['--allow-file-access-from-files', '--enable-logging=stderr', '--dump-dom', '--window-size=1900,3000']
    done = browse(frames, *options, profile=profile)
    assert 'CONSOLE' not in done.stderr, done.stderr  # errors, and what the page's policy did not let it fetch
    text = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert text, done.stderr
    return json.loads(text[1])


@pytest.fixture
def profile(tmp_path):
    yield tmp_path / 'profile'
    shutil.rmtree(tmp_path / 'profile', ignore_errors=True)


def test_a_sweep_is_drawn_at_every_width(tmp_path, profile):
    methods = {'baseline': (10, 0), 'kd': (14, 0.02, {'share': 0.3}), 'a method with a rather long name': (9, 0.1)}
    report([study(tmp_path / 'made', sweep(methods))])
    found = found_in(tmp_path / 'made', profile)
    for shown in found['shown']:
        assert 'sooner' in shown['answer']
        assert shown['needed'] <= shown['width']  # nothing to scroll to the side for
        time, speedup = shown['plots']
        assert time['points'] == 3 * (12 + 4) and time['lines'] == 3 + 1
        assert speedup['points'] == 2
        for plot in shown['plots']:
            assert not plot['overlap']
            assert 0.8 * min(shown['width'], 1040) < plot['width'] <= shown['width']
    assert found['hidden']['plots'][0]['points'] == 2 * (12 + 4)  # without the baseline, which was clicked away


def test_a_sequence_is_drawn(tmp_path, profile):
    arms = {'without': [(3000, 0.8), (3000, 0.85), (3000, 0.9)], 'with': [(3000, 0.8), (1200, None), (3300, 0.92)]}
    report([study(tmp_path / 'made', steps(arms), kind='search', points=None)])
    for shown in found_in(tmp_path / 'made', profile)['shown']:
        (plot,) = shown['plots']
        assert plot['points'] == 5 and plot['lines'] == 2 and not plot['overlap']
        assert shown['needed'] <= shown['width']


@pytest.mark.parametrize('scheme, paper', [(0, (18, 22, 27)), (1, (255, 255, 255))], ids=['dark', 'light'])
def test_both_schemes_show_a_picture(tmp_path, profile, scheme, paper):
    page = report([study(tmp_path / 'made', sweep({'baseline': (10, 0), 'kd': (9, 0.01)}))])
    options = [f'--blink-settings=preferredColorScheme={scheme}', '--window-size=1400,1000']
    browse(page, *options, f'--screenshot={tmp_path}/page.png', profile=profile)
    picture = Image.open(tmp_path / 'page.png').convert('RGB')
    colours = picture.getcolors(picture.width * picture.height)
    assert max(colours)[1] == paper and len(colours) > 100
