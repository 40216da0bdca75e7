"""The verifier of code tasks: run the function on hidden inputs inside the sandbox, compare its values out here.

The comparison knows types (True is not 1, a tuple is not a list) and tolerates rounding only where a float is expected.
Tests are data, never code, so no exit status, printed marker or overridden `__eq__` can make a sample pass.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from omni_fast.rewards.sandbox import Call, Data, Job, Sandbox
from omni_fast.rewards.score import Part

RELATIVE, ABSOLUTE = 1e-6, 1e-9
_FENCE = re.compile(r"```[ \t]*+([A-Za-z0-9_+-]*+)[ \t]*+\n(.*?)(?:```|\Z)", re.DOTALL)  # nothing to try twice


@dataclass(frozen=True, slots=True)
class Case:
    """One hidden test: the arguments, and the value that must come back."""

    args: tuple[Data, ...]
    expected: Data


@dataclass(frozen=True, slots=True)
class Tests:
    """The hidden tests of one item."""

    __test__ = False  # not a test class for pytest
    entry: str
    cases: tuple[Case, ...]


class CodeVerifier:
    """Part `tests` of a score: the share of hidden cases passed."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    def score(self, sources: Sequence[str], tests: Sequence[Tests]) -> list[Part]:
        """One part per source text (`sources[k]` is judged by `tests[k]`), in 0..1; invalid where the jail failed.

        Equal programs with equal tests run once.

        Reasons: "ok" (all passed), "wrong", "constant" (one same value wherever it gave one, although the answers
        differ), "error", "timeout", "memory", "killed", "protocol", "infrastructure".
        """
        keys = [(source, repr(test)) for source, test in zip(sources, tests, strict=True)]
        distinct = dict(zip(keys, tests, strict=True))
        jobs = [Job(key[0], test.entry, [case.args for case in test.cases]) for key, test in distinct.items()]
        runs = zip(distinct.items(), self.sandbox.run(jobs), strict=True)
        parts = {key: self._part(calls, test.cases) for (key, test), calls in runs}
        return [parts[key] for key in keys]

    def _part(self, calls: Sequence[Call], cases: Sequence[Case]) -> Part:
        if any(call.outcome == "infrastructure" for call in calls):
            return Part(None, "infrastructure")
        passed = [
            call.outcome == "ok" and same(case.expected, call.value) for call, case in zip(calls, cases, strict=True)
        ]
        if all(passed):
            return Part(1.0 if passed else 0.0, "ok" if passed else "no_tests")
        reason = next((call.outcome for call in calls if call.outcome != "ok"), "wrong")
        if not any(passed):
            return Part(0.0, reason)
        given = [call.value for call in calls if call.outcome == "ok"]
        if len(given) > 1 and all(same(given[0], value) for value in given):
            return Part(0.0, "constant")  # passes the boolean cases of its kind without having looked at the input
        return Part(sum(passed) / len(passed), reason)


def same(expected: Data, got: Data) -> bool:
    """Whether two values are equal, types included; floats within 1e-6 relative, NaN equal to nothing. Never raises."""
    if isinstance(expected, float):
        return isinstance(got, float | int) and not isinstance(got, bool) and _close(expected, got)
    if type(expected) is not type(got):
        return False
    if isinstance(expected, complex) and isinstance(got, complex):
        return _close(expected.real, got.real) and _close(expected.imag, got.imag)
    if isinstance(expected, list | tuple) and isinstance(got, list | tuple):
        return len(expected) == len(got) and all(map(same, expected, got))
    if isinstance(expected, dict) and isinstance(got, dict):
        return set(map(_typed, expected)) == set(map(_typed, got)) and all(same(expected[key], got[key]) for key in got)
    if isinstance(expected, set | frozenset) and isinstance(got, set | frozenset):
        return set(map(_typed, expected)) == set(map(_typed, got))
    return expected == got


def _close(expected: float, got: float) -> bool:
    try:
        return math.isclose(expected, got, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    except OverflowError:  # an integer beyond the floats
        return False


def _typed(key: Data) -> object:
    """A hashable stand-in that keeps 1, 1.0 and True apart inside sets and keys."""
    return type(key), frozenset(map(_typed, key)) if isinstance(key, frozenset) else (
        tuple(map(_typed, key)) if isinstance(key, tuple) else key
    )


def extract_code(text: str, entry: str) -> str:
    """The program in a completion: its last fenced block that defines `entry`, else its last block, else all of it.

    Tests and examples in blocks of their own are left out. A block that the token limit cut off counts to the end of the
    text, and one in a list item loses its margin.
    """
    blocks = [body for language, body in _FENCE.findall(text) if language.lower() in ("", "python", "py", "python3")]
    defines = re.compile(rf"^[ \t]*(?:def {re.escape(entry)}\b|{re.escape(entry)} *[=:])", re.MULTILINE)
    defining = [body for body in blocks if defines.search(body)]
    return textwrap.dedent((defining or blocks or [text])[-1])
