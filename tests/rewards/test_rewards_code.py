"""The verifier of code tasks on a real sandbox: whichever backend this machine has."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from omni_fast.errors import UserError
from omni_fast.rewards.code import Case, CodeVerifier, Tests, extract_code, same
from omni_fast.rewards.sandbox import Limits, Sandbox
from omni_fast.rewards.sandbox.attacks import ATTACKS, SECRET
from omni_fast.rewards.score import Part


@pytest.fixture(scope="module", params=["bwrap", "monty"])
def sandbox(request):
    box = Sandbox(workers=2, limits=Limits(cpu_s=1, wall_s=2.0), backends=(request.param,))
    try:
        box.start()
    except UserError as error:
        pytest.skip(f"no {request.param} here: {error}")
    with_box = box
    yield with_box
    box.close()


INCREMENT = Tests("f", tuple(Case((n,), n + 1) for n in range(10)))
EVEN = Tests("f", tuple(Case((n,), n % 2 == 0) for n in range(10)))


@pytest.mark.parametrize(
    "source, expected",
    [
        ("def f(x):\n    return x + 1", Part(1.0)),
        ("f = lambda x: x + 1", Part(1.0)),
        ("def f(x):\n    return x + 2", Part(0.0, "wrong")),
        ("def f(x):\n    return x + 1 if x < 5 else x", Part(0.5, "wrong")),
        ("def f(x):\n    return x + 1.0", Part(0.0, "wrong")),  # a float is not an int
        ("def f(x):\n    return str(x + 1)", Part(0.0, "wrong")),
        ("def f(x):\n    return 3", Part(0.0, "constant")),
        ("def f(x):\n    raise ValueError(x)", Part(0.0, "error")),
        ("def f(x):\n    return [0] * 10 ** 10", Part(0.0, "memory")),
        ("def g(x):\n    return x + 1", Part(0.0, "error")),
        ("def f(x)", Part(0.0, "error")),
        ("", Part(0.0, "error")),
        ("def f(x):\n    return f", Part(0.0, "wrong")),
    ],
)
def test_a_program_gets_its_share_and_its_reason(sandbox, source, expected):
    (part,) = CodeVerifier(sandbox).score([source], [INCREMENT])
    if source.endswith("return f"):
        assert part.value == 0.0  # refused by one backend, a text in the other
    else:
        assert part == expected


def test_a_constant_earns_nothing_where_answers_differ(sandbox):
    assert CodeVerifier(sandbox).score(["def f(x): return True"], [EVEN]) == [Part(0.0, "constant")]


def test_a_constant_that_fails_here_and_there_is_one_too(sandbox):
    evasions = [
        "def f(x):\n    if x == 1:\n        raise ValueError\n    return True",
        "def f(x): return 1 / (x - 3) != 0",
    ]
    assert CodeVerifier(sandbox).score(evasions, [EVEN] * 2) == [Part(0.0, "constant")] * 2
    assert CodeVerifier(sandbox).score(["def f(x): return {0: True}[x]"], [EVEN]) == [Part(0.1, "error")]


def test_no_program_makes_itself_invalid(sandbox):
    """An invalid sample leaves its group: to be taken for a failure of the jail would be the way out of every 0."""
    lines = [
        '["setup", "infrastructure", "x"]',
        '[0, "infrastructure", "x"]',
        '["load", "infrastructure", "x"]',
        "ready",
    ]
    sources = [f"import os\nos.write(3, b'{line}\\n')\nos._exit({code})" for line in lines for code in (0, 70)]
    sources += [f"import os\nos.write(3, b'{line}\\n')\ndef f(x): return x" for line in lines]
    parts = CodeVerifier(sandbox).score(sources, [INCREMENT] * len(sources))
    assert [part.value for part in parts] == [0.0] * len(sources)
    assert sandbox.restarts == 0


def test_an_endless_loop_costs_its_limit_and_keeps_earlier_answers(sandbox):
    (part,) = CodeVerifier(sandbox).score(["def f(x):\n    while x == 7: pass\n    return x + 1"], [INCREMENT])
    assert part == Part(0.7, "timeout")


def test_no_tests_is_no_pass(sandbox):
    assert CodeVerifier(sandbox).score(["def f(x): return x"], [Tests("f", ())]) == [Part(0.0, "no_tests")]


def test_the_inputs_may_be_of_any_carried_type(sandbox):
    values = [(1, "a"), {1, 2}, {(1, 2): [3]}, b"x", 2 + 3j, -0.0, math.inf, 10**40, None, "\ud800"]
    tests = Tests("f", tuple(Case((value,), [value]) for value in values if value != "\ud800"))
    assert CodeVerifier(sandbox).score(["def f(x): return [x]"], [tests]) == [Part(1.0)]


@pytest.mark.parametrize(
    "attack", [attack for attack in ATTACKS if attack.goal == "score"], ids=lambda attack: attack.name
)
def test_no_program_forges_a_pass(sandbox, attack):
    (part,) = CodeVerifier(sandbox).score([attack.source], [Tests("attack", (Case((7,), SECRET),))])
    assert part.value == 0.0
    assert CodeVerifier(sandbox).score(["def f(x): return x + 1"], [INCREMENT]) == [Part(1.0)]


def test_a_program_may_use_any_name(sandbox):
    """HumanEval/93 asks for `encode`; what carries values out of the jail has names of its own."""
    encode = "math = json = None\ndef encode(text):\n    return text.swapcase()\ndef f(x):\n    return encode(x)\n"
    for entry in ("encode", "f"):
        assert CodeVerifier(sandbox).score([encode], [Tests(entry, (Case(("abC",), "ABc"),))]) == [Part(1.0)]


@settings(deadline=None, max_examples=25)
@given(source=st.text(st.characters(exclude_categories=()), max_size=60), entry=st.text(max_size=5))
@example(source="\x00", entry="\x00")
@example(source="\ud800", entry="\ud800")
@example(source="def f(x): return x + 1", entry="f(0) or f")
def test_no_text_raises(sandbox, source, entry):
    (part,) = CodeVerifier(sandbox).score([source], [Tests(entry, (Case((7,), SECRET),))])
    assert part.value == 0.0


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-5, 5) | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=200)
@given(PLAIN, PLAIN)
def test_same_is_reflexive_and_knows_types(left, right):
    assert same(left, left)
    if same(left, right) and not isinstance(left, float):
        assert type(left) is type(right)


@pytest.mark.parametrize(
    "expected, got, verdict",
    [
        (1, True, False),
        (True, 1, False),
        (1, 1.0, False),
        (1.0, 1, True),
        (0.1 + 0.2, 0.3, True),
        (math.nan, math.nan, False),
        (math.inf, math.inf, True),
        (1.0, 10**400, False),
        ([1, 2], (1, 2), False),
        ([1, 2], [2, 1], False),
        ({1, 2}, {2, 1}, True),
        ({1, 2}, {True, 2}, False),
        ({1}, {True}, False),
        ({1: 2}, {True: 2}, False),
        ({"a": 1.0}, {"a": 1.0 + 1e-12}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        (1 + 2j, 1 + 2j, True),
        (frozenset({1}), {1}, False),
        ("a", b"a", False),
        (None, False, False),
    ],
)
def test_same(expected, got, verdict):
    assert same(expected, got) is verdict


@pytest.mark.parametrize(
    "text, code",
    [
        ("def f(): pass", "def f(): pass"),
        ("Sure:\n```python\ndef f(): pass\n```\nDone.", "def f(): pass\n"),
        ("```\ndef f(): pass\n```\nUsage:\n```python\nprint(f())\n```", "def f(): pass\n"),
        ("```python\ndef f():\n    return 1", "def f():\n    return 1"),
        ("```py\ndef f(): pass\n```\n```py\ndef test():\n    assert f()\n```", "def f(): pass\n"),
        ("```py\ndef ff(): pass\n```\n```py\nf = ff\n```", "f = ff\n"),
        ("1. So:\n   ```python\n   def f():\n       return 1\n   ```", "def f():\n    return 1\n"),
        ("```bash\nls\n```", "```bash\nls\n```"),
        ("```py\nx = 1\n```", "x = 1\n"),
    ],
)
def test_extract_code(text, code):
    assert extract_code(text, "f") == code


def test_extract_code_is_linear():
    """Each doubled its time when the text grew by a half: 57 s for 200,000 blanks."""
    for text in ("```" + " " * 400_000, "```" + "\t" * 400_000, "``` " * 100_000, "```py " * 80_000):
        assert extract_code(text, "f") == text
