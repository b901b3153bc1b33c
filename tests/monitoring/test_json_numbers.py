"""Documents stay JSON whatever numbers a training has."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from obsinfra.monitoring.json_numbers import finite

LEAVES = st.none() | st.booleans() | st.integers() | st.text() | st.floats()
DOCUMENTS = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(DOCUMENTS)
def test_what_comes_out_is_json_and_only_other_numbers_are_changed(document: object) -> None:
    json.dumps(finite(document), allow_nan=False)
    assert finite(finite(document)) == finite(document)


def test_what_stands_for_a_number_that_is_not_finite() -> None:
    values = {"a": [math.nan, 1.5, -math.inf], "b": (math.inf,), 3: 2}
    assert finite(values) == {"a": ["nan", 1.5, "-inf"], "b": ["inf"], "3": 2}
    assert finite(values, instead=lambda number: None) == {"a": [None, 1.5, None], "b": [None], "3": 2}
