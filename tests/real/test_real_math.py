"""The maths verifier at length: 5,000 hostile strings, and agreement with math-verify alone on ordinary answers."""

import random
import time
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.rewards.math import MathVerifier, Reason, normalise, number

REASONS = {reason for kind in get_args(Reason) for reason in get_args(kind)} - {"worker_lost"}


def hostile(rng: random.Random) -> str:
    """One text that tries to stall, exhaust or crash whoever reads it."""
    n = rng.choice((1, 5, 19, 50, 300, 3000))
    inner = rng.choice(
        (
            lambda: "{" * n + "1" + "}" * n,
            lambda: "(" * n + "1" + ")" * rng.randrange(n + 1),
            lambda: "\\frac{1}{" * n + "2" + "}" * n,
            lambda: "\\sqrt{" * n + "2" + "}" * n,
            lambda: "^".join(["9"] * (n % 40 + 1)),
            lambda: "9^{" * (n % 40) + "9" + "}" * (n % 40),
            lambda: f"{10 ** (n % 60)}" + "!" * rng.randrange(1, 4),
            lambda: "+".join(f"x^{{{k}}}" for k in range(n)),
            lambda: f"(x+y+z)^{{{10 * n}}}",
            lambda: f"\\sum_{{i=1}}^{{{10**9}}} i^{{{n}}}",
            lambda: f"\\int_0^{{{n}}} \\sin(x^{{{n}}}) dx",
            lambda: f"\\binom{{{10**9}}}{{{n * 1000}}}",
            lambda: f"\\lim_{{x \\to 0}} \\frac{{\\sin({n}x)}}{{x^{{{n}}}}}",
            lambda: f"\\begin{{pmatrix}}{'1&' * n}1\\end{{pmatrix}}",
            lambda: "\\prod_{i=1}^{99999} i",
            lambda: "x=" * n + "1",
            lambda: "1<" * n + "x",
            lambda: "\\{" + ",".join(str(k) for k in range(n)) + "\\}",
            lambda: "9" * n,
            lambda: "0." + "3" * n,
            lambda: "\\text{" + "\u202e\u0301\U0001d7d8" * (n % 60) + "}",
            lambda: "\ud800" * (n % 60) + "\x00\x1b[2J",
            lambda: "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x110000)))) for _ in range(n % 200)),
            lambda: "__import__('os').system('true')" + "," * (n % 9),
            lambda: "\\" * n,
            lambda: "$" * n,
            lambda: "%" * (n % 50) + "50%" * (n % 30),
            lambda: rng.choice(("\\infty-\\infty", "0/0", "0^0", "\\frac{0}{0}", "zoo", "nan", "oo", "1/0", "\\log 0")),
            lambda: f"{n}e{n}{n}",
            lambda: f"{rng.randrange(99)}^{{{n}}}^{{{n}}}",
        )
    )()
    if rng.random() < 0.02:
        inner = inner * (200_000 // max(1, len(inner)))
    shapes = ("\\boxed{%s}", "#### %s", "<answer>%s</answer>", "the answer is $%s$", "%s", "\\boxed{" * 20 + "%s")
    return rng.choice(shapes).replace("%s", inner)


def test_5000_hostile_strings_end_in_bounded_time():
    rng = random.Random(0)
    completions = [hostile(rng) for _ in range(5000)]
    golds = [rng.choice(("3", "1/2", "x^2+1", "\\frac{\\pi}{4}", "\\{1,2\\}")) for _ in completions]
    started = time.monotonic()
    with MathVerifier(workers=2, timeout_s=2.0) as verifier:
        parts = verifier.score(completions, golds)
        reasons = Counter(part.reason for part in parts)
        assert set(reasons) <= REASONS, reasons
        assert all(part.valid for part in parts)
        # Each string may cost one time limit on one of two workers, and nothing beyond it.
        assert time.monotonic() - started < 60 + reasons["timeout"] * 2.5
        assert reasons["timeout"] < 150, reasons
        assert verifier.score([r"\boxed{x+x}", "#### 4"], ["2x", "4"]) == verifier.score(["#### 1"] * 2, ["1"] * 2)


def test_a_hostile_gold_answer_is_no_worse():
    rng = random.Random(1)
    golds = [hostile(rng) for _ in range(300)]
    with MathVerifier(workers=2, timeout_s=1.0) as verifier:
        assert all(part.valid for part in verifier.score(["\\boxed{x+1}"] * len(golds), golds))


PLAIN = (
    "\\sqrt{2}", "2\\sqrt{3}", "\\pi", "\\frac{\\pi}{4}", "x+1", "(x+1)^2", "x^2+2x+1", "\\{1,2,3\\}", "(1,2)", "[0,1)",
    "50\\%", "\\infty", "e^{2}", "2^{10}", "1024", "x=5", "5\\text{ cm}", "\\frac{\\sqrt{3}}{2}", "1.5\\times 10^{3}",
    "1500", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "90^\\circ", "3x^2-2x", "\\log 2", "\\$18", "18", "y = 2x + 1", "0.5",
)  # fmt: skip


def ordinary(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return str(rng.randint(-999, 9999))
    if kind < 0.45:
        return f"{rng.randint(1000, 9999999):,}"
    if kind < 0.6:
        return f"{rng.uniform(-100, 100):.{rng.randint(1, 4)}f}"
    if kind < 0.75:
        return rng.choice(("", "-")) + f"\\frac{{{rng.randint(1, 30)}}}{{{rng.randint(1, 30)}}}"
    if kind < 0.8:
        return f"{rng.randint(1, 30)}/{rng.randint(1, 30)}"
    return rng.choice(PLAIN)


def reworded(gold: str, rng: random.Random) -> str:
    """The same number written differently, where it is one, or now and then another answer."""
    if rng.random() < 0.4:
        return ordinary(rng)
    value = number(normalise(gold))
    if value is None or rng.random() < 0.5:
        return gold
    fraction = f"{'-' if value[0] < 0 else ''}\\frac{{{abs(value[0].numerator)}}}{{{value[0].denominator}}}"
    return rng.choice((fraction, f"{float(value[0]):.{rng.choice((2, 6, 8))}f}", gold.replace(",", "")))


def test_agreement_with_math_verify_alone():
    """Texts in forms that both know. What only we read (`#### x+1`, `<answer>`) is not in it; those would disagree."""
    math_verify = pytest.importorskip("math_verify")
    rng = random.Random(7)
    wrappers = ("We get \\boxed{%s}.", "So it is $\\boxed{%s}$", "Therefore the final answer is $%s$.", "#### %s")
    golds, completions = [], []
    for _ in range(2500):
        gold = ordinary(rng)
        answer = reworded(gold, rng)
        wrapper = rng.choice(wrappers)
        if wrapper.startswith("####") and number(normalise(answer)) is None:
            wrapper = wrappers[0]
        golds.append(gold)
        completions.append(wrapper.replace("%s", answer))
    with MathVerifier(workers=2) as verifier:
        parts = verifier.score(completions, golds)
    ours = [part.value == 1.0 for part in parts]
    different = []
    for gold, completion, part in zip(golds, completions, parts, strict=True):
        alone = bool(math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(completion)))
        if alone != (part.value == 1.0):
            different.append((gold, completion, part.reason))
    assert 0.3 < sum(ours) / len(ours) < 0.8
    assert len(different) <= 0.005 * len(ours), different
    # Explained: behind `####` math-verify alone does not read a number with an escaped dollar before it; we do. And what
    # is left to be worked out ("2^{10}" for 1024) it pays; we do not.
    explained = {row for row in different if row[:2] == ("\\$18", "#### \\$18") or row[2] == "unfinished"}
    assert set(different) == explained, different


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier(workers=2, timeout_s=1.0) as verifier:
        yield verifier


@settings(deadline=None, max_examples=2500)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=()), max_size=80)
            | st.text(alphabet="0123456789.,/-+^!{}()[]\\$%= \nboxedfracsqrtpi", max_size=60).map(
                lambda t: "\\boxed{" + t + "}"
            ),
            st.text(alphabet="0123456789.,/-+^{}()\\xyfrac", max_size=20),
        ),
        min_size=4,
        max_size=4,
    )
)
def test_10000_texts_and_golds_raise_nothing(verifier, pairs):
    parts = verifier.score([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    assert len(parts) == 4
    assert all(part.value in (0.0, 1.0) and part.reason in REASONS for part in parts)
