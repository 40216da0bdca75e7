"""The tagged encoding: types survive both ways, and hostile bytes give WireError and nothing else."""

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from omni_fast.rewards.sandbox import wire

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**300), max_value=10**300)
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters(exclude_categories=()))  # lone surrogates too
    | st.binary()
)
HASHABLE = st.recursive(SCALARS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=4), max_leaves=8)
VALUES = st.recursive(
    HASHABLE,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(HASHABLE, inner, max_size=4)
        | st.dictionaries(st.text(alphabet="$adint"), inner, max_size=4)
        | st.sets(HASHABLE, max_size=4)
    ),
    max_leaves=20,
)


def shape(value):
    """Types as well as values: 1, 1.0 and True are equal to Python."""
    if isinstance(value, dict):
        return dict, sorted(((repr(shape(key)), shape(item)) for key, item in value.items()), key=repr)
    if isinstance(value, (set, frozenset)):
        return type(value), sorted((shape(item) for item in value), key=repr)
    if isinstance(value, (list, tuple)):
        return type(value), [shape(item) for item in value]
    return type(value), repr(value)


@settings(deadline=None, max_examples=150)
@given(VALUES)
@example({"$tuple": [1]})
@example({1: "a", "1": "b", (1,): "c", None: "d", False: "e"})
@example([0.0, -0.0, math.inf, -math.inf, 2**63, -(2**63), 2**64])
def test_values_come_back_with_their_types(value):
    assert shape(wire.loads(wire.dumps(value))) == shape(value)


def test_not_a_number_crosses():
    assert math.isnan(wire.loads(wire.dumps(float("nan"))))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200) | st.text(alphabet='{}[]"$:,tuplesdicnfoa0123456789.-', max_size=60).map(str.encode))
@example(b"[" * 100_000)
@example(b"9" * 10_000)
@example(b'{"$set": [[]]}')
@example(b'{"$dict": [1]}')
@example(b'{"$dict": [[[], 1]]}')
@example(b'{"$complex": ["1"]}')
@example(b'{"$complex": [[], {}]}')
@example(b'{"$int": "zz"}')
@example(b'{"$int": 5}')
@example(b'{"$bytes": "\\u00ff"}')
@example(b'{"$tuple": {}}')
@example(b'{"$tuple": [], "$set": []}')
@example(b'{"$nothing": []}')
@example(b"NaN")
@example(b"Infinity")
@example(b'"\xff"')
def test_hostile_bytes_give_data_or_wire_error(line):
    try:
        value = wire.loads(line)
    except wire.WireError:
        return
    assert shape(wire.loads(wire.dumps(value))) == shape(value)


class Liar(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize("value", [Liar(7), type("S", (str,), {})("a"), type("F", (float,), {})(1.5)])
def test_a_subclass_arrives_as_the_plain_type(value):
    assert type(wire.loads(wire.dumps(value))) is type(value).__mro__[1]


@pytest.mark.parametrize(
    "value", [object(), len, (n for n in ()), range(3), type, [object()], {"a": object()}, {object(): 1}]
)
def test_what_is_not_data_is_refused(value):
    with pytest.raises(wire.WireError):
        wire.dumps(value)


def test_depth_is_bounded_both_ways():
    deep = []
    for _ in range(wire.MAX_DEPTH + 5):
        deep = [deep]
    with pytest.raises(wire.WireError):
        wire.dumps(deep)
    with pytest.raises(wire.WireError):
        wire.loads(json.dumps(deep).encode())
