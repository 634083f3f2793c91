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
