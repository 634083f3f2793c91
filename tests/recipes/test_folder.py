from pathlib import Path

import pytest

from composer_kd.recipes import RecipeError, load
from composer_kd.recipes.folder import check_name, claim, finished_run
from composer_kd.recipes.lock import FolderLock
from helpers import on_two_ranks

FAIL = """
import time
from composer_kd.recipes.folder import on_rank_zero
from composer_kd.recipes.load import RecipeError

class Strange(Exception):
    def __init__(self, message):
        self.cannot_be_sent = lambda: message

def fail(error):
    raise error

begin = time.monotonic()
for error in (Strange('x'), KeyError('checkpoint'), RecipeError('x.yaml:1: wrong', exit_code=1)):
    try:
        on_rank_zero(lambda: fail(error))
    except Exception as caught:
        print(type(caught).__name__, getattr(caught, 'exit_code', 0))
print(on_rank_zero(lambda: dist.get_global_rank()), time.monotonic() - begin < 20)
"""


def test_what_fails_on_rank_zero_fails_on_all(tmp_path):
    first, second = on_two_ranks(FAIL, tmp_path)
    assert first.split('\n')[:4] == ['Strange 0', 'KeyError 0', 'RecipeError 1', '0 True']
    assert second.split('\n')[:4] == ['RuntimeError 0', 'RuntimeError 0', 'RecipeError 1', '0 True']


def test_a_folder_that_a_killed_process_had_just_made(write):
    write('run_name: y\n')
    recipe, folder = load('x.yaml', ['runs_dir=runs']), Path('runs/y')
    for left in ((), ('.recipe.yaml.tmp',), ('.recipe.yaml.tmp', 'letter.txt')):
        folder.mkdir(parents=True, exist_ok=True)
        for name in left:
            (folder / name).write_text('seed')
        if 'letter.txt' in left:
            with pytest.raises(RecipeError, match='runs/y is there already'):
                check_name(recipe)
            with pytest.raises(RecipeError, match='runs/y is there, but is no run'):
                finished_run(recipe)
            return
        check_name(recipe)
        assert finished_run(recipe) is None
        with FolderLock(recipe) as lock:
            assert claim(recipe, lock) == (folder, True)
        assert [path.name for path in folder.iterdir()] == ['recipe.yaml']
        (folder / 'recipe.yaml').unlink()
