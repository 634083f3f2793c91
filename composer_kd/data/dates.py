"""The rows of a table that are of a time."""

from collections.abc import Iterable, Iterator
from datetime import date

from composer_kd.data.tables import Row
from composer_kd.data.text_files import TextError


def rows_between(
    rows: Iterable[tuple[str, Row]], column: str, since: date | None, before: date | None
) -> Iterator[tuple[str, Row]]:
    """The rows of these days, in their order.

    Args:
        rows: Where each row stands, and its values by column.
        column: That of the date: `2024-01-31`, with or without a time of the day behind it, which does not count.
        since: The first day, None if there is none.
        before: The day after the last one, None if there is none.

    Raises:
        ValueError: There is no such column.
        TextError: A row has no date.
    """
    for place, row in rows:
        if column not in row:
            raise ValueError(f'{place}: there is no column {column!r}, but: {", ".join(row)}')
        try:
            day = day_of(str(row[column]))
        except ValueError:
            what = f'{column} is {row[column]!r}, which is no date such as 2024-01-31'
            raise TextError(f'{place}: {what}; repair this line') from None
        if (since is None or day >= since) and (before is None or day < before):
            yield place, row


def day_of(text: str) -> date:
    """The day that an ISO date names, whatever time of the day stands behind it.

    Raises:
        ValueError: It names none.
    """
    return date.fromisoformat(text.strip().replace('T', ' ').partition(' ')[0])


def day_given(name: str, value: str | None) -> date | None:
    """The day that an option names.

    Raises:
        ValueError: It names none.
    """
    if value is None:
        return None
    try:
        return day_of(value)
    except ValueError:
        raise ValueError(f'{name} must be a date such as 2024-01-31, not {value!r}') from None
