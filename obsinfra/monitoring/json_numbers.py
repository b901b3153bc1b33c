"""JSON has no NaN and no infinity: what documents of the monitoring hold in their place.

Called wherever one is written: the page's document, the run's history, the spans' file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def finite(value: Any, instead: Callable[[float], Any] = str) -> Any:
    """`value`, all the way down, with what `instead` makes of each number that is not finite.

    Args:
        value: numbers, texts, mappings, lists and tuples; tuples become lists, keys become texts.
        instead: the number as text by default, as in `"inf"`.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else instead(value)
    if isinstance(value, Mapping):
        return {str(key): finite(item, instead) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item, instead) for item in value]
    return value
