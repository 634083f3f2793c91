from collections.abc import Callable
from pathlib import Path

import pytest

MINIMAL = """\
model: {name: small_convnet, num_classes: 10, width: 4}
train_data: {name: digits, split: train, batch_size: 64}
max_duration: 1ep
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a recipe, MINIMAL with lines added, into the folder in which the test works."""
    monkeypatch.chdir(tmp_path)

    def write_recipe(more: str = '', name: str = 'x.yaml', head: str = MINIMAL) -> Path:
        path = Path(name)
        path.write_text(head + more)
        return path

    return write_recipe
