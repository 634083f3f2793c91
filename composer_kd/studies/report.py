"""`composer-kd report`: what studies have found, for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from composer_kd.files import write
from composer_kd.recipes.load import RecipeError
from composer_kd.studies.curves import CHARGES, Charge
from composer_kd.studies.report_findings import find
from composer_kd.studies.report_markdown import markdown
from composer_kd.studies.report_page import page
from composer_kd.studies.report_pictures import pictures
from composer_kd.studies.study import GOALS


def report(
    folders: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    charge: Charge = 'none',
    metric: str | None = None,
    goal: str | None = None,
) -> Path:
    """Write `report.html`, `report.md` and their pictures.

    Args:
        folders: Of studies, at least one; the rows of several are put together.
        out: Where to write. Default: the first folder.
        charge: What each run is charged beside its own training: the making of the `recording` that it learns from, the
            training of its `teacher`, `all` of these, or `none`.
        metric: What is compared. Default: None, what the studies say.
        goal: Whether more of it is better, `max`, or less, `min`. Default: None, what the studies say.

    Returns:
        The page.

    Raises:
        RecipeError: There are no results, or damaged ones; they cannot be compared; plotly is not installed.
    """
    for option, given, known in (('charge', charge, CHARGES), ('goal', goal or 'max', GOALS)):
        if given not in known:
            raise RecipeError(f'--{option} {given}: must be one of {", ".join(known)}')
    findings = find(folders, charge, metric, goal)
    drawn = pictures(findings)
    text, shown = markdown(findings, [*drawn]), page(findings, [*drawn])
    folder = Path(out if out is not None else folders[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in {**drawn, 'report.md': text, 'report.html': shown}.items():
            write(folder / name, content)
    except OSError as error:
        raise RecipeError(f'cannot write the report to {folder}: {error.strerror}', 1) from error
    return folder / 'report.html'
