"""What teams tell each other while they learn."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from composer_kd.exchange.exchange import Exchange
from composer_kd.exchange.folder import FolderExchange
from composer_kd.exchange.predictions import PredictionsExchange
from composer_kd.exchange.weights import WeightsExchange

__all__ = ['Exchange', 'FolderExchange', 'PredictionsExchange', 'WeightsExchange', 'make_exchange']

_EXCHANGES = {exchange.name: exchange for exchange in (PredictionsExchange, WeightsExchange, FolderExchange)}


def make_exchange(asked: str | Mapping[str, Any] | Exchange) -> Exchange:
    """The exchange that is asked for: by its name, by its name and options, or as it is.

    Raises:
        ValueError: There is no such exchange, or it has no such option.
    """
    if not isinstance(asked, str | Mapping):
        return asked
    options: dict[str, Any] = {'name': asked} if isinstance(asked, str) else dict(asked)
    name = options.pop('name', None)
    if name not in _EXCHANGES:
        raise ValueError(f'unknown exchange {name!r}; known: {", ".join(_EXCHANGES)}')
    known = [*inspect.signature(_EXCHANGES[name]).parameters]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f'exchange {name!r} has no option {unknown[0]!r}; known: {", ".join(known) or "none"}')
    try:
        return _EXCHANGES[name](**options)
    except TypeError as error:
        raise ValueError(f'exchange {name!r}: {error}') from error
