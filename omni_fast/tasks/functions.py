"""The operations that the code domain asks for, and how inputs for them are drawn.

An operation is one line of Python with a plain description. `{k}` is a small constant, so that one operation gives
several functions. The table is data: adding a line adds a function. References are ours, hence trusted, and run in this
process; what a model writes never does.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from omni_fast.rewards.sandbox import Data

WORDS = (
    "apple", "river", "stone", "cloud", "garden", "winter", "silver", "market", "candle", "forest", "level", "banana",
    "kayak", "yellow", "pepper", "island", "mirror", "rocket", "noon", "cotton",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Operation:
    """name: unique. arguments: one letter each (see `draw`). text: what is returned. expression: the reference.

    constants: values of `{k}`; empty where there is no constant.
    """

    name: str
    arguments: str
    text: str
    expression: str
    constants: tuple[int | str, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Parameter names: by kind for one argument, a, b, c for several."""
        single = {"i": "n", "p": "n", "s": "s", "w": "s", "l": "items"}
        return (single[self.arguments],) if len(self.arguments) == 1 else tuple("abc"[: len(self.arguments)])


def draw(kind: str, rng: random.Random) -> Data:
    """One input. i: -20..20, p: 1..20, w: a word, s: a phrase of one to three words, l: one to six integers -9..9."""
    if kind == "i":
        return rng.randint(-20, 20)
    if kind == "p":
        return rng.randint(1, 20)
    if kind == "w":
        return rng.choice(WORDS)
    if kind == "s":
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 3)))
    return [rng.randint(-9, 9) for _ in range(rng.randint(1, 6))]


@lru_cache(maxsize=4096)
def reference(parameters: tuple[str, ...], expression: str) -> Callable[..., Data]:
    """The reference as a callable. Its source is a line of the table below, never a model's."""
    function: Callable[..., Data] = eval(f"lambda {', '.join(parameters)}: {expression}")  # noqa: S307
    return function


_SMALL = (2, 3, 4, 5, 6, 7, 8, 9)
_LETTERS = ("a", "e", "o", "r", "n")

OPERATIONS: tuple[Operation, ...] = (
    # one number
    Operation("double", "i", "twice n", "n * 2"),
    Operation("triple", "i", "n times three", "n * 3"),
    Operation("square", "i", "n squared", "n ** 2"),
    Operation("cube", "i", "n cubed", "n ** 3"),
    Operation("negate", "i", "the negative of n", "-n"),
    Operation("half", "i", "half of n", "n / 2"),
    Operation("absolute", "i", "the absolute value of n", "abs(n)"),
    Operation("successor", "i", "n plus one", "n + 1"),
    Operation("add_constant", "i", "n plus {k}", "n + {k}", _SMALL),
    Operation("subtract_constant", "i", "n minus {k}", "n - {k}", _SMALL),
    Operation("multiply_constant", "i", "n times {k}", "n * {k}", _SMALL),
    Operation("modulo_constant", "p", "the remainder of n divided by {k}", "n % {k}", _SMALL),
    Operation("divide_constant", "p", "n divided by {k}, rounded down", "n // {k}", _SMALL),
    Operation("is_even", "p", "True if n is even", "n % 2 == 0"),
    Operation("is_odd", "p", "True if n is odd", "n % 2 == 1"),
    Operation("is_positive", "i", "True if n is positive", "n > 0"),
    Operation("is_negative", "i", "True if n is negative", "n < 0"),
    Operation("is_multiple", "p", "True if n is divisible by {k}", "n % {k} == 0", (2, 3, 4, 5)),
    Operation("above_constant", "i", "True if n is greater than {k}", "n > {k}", _SMALL),
    Operation("below_constant", "i", "True if n is less than {k}", "n < {k}", _SMALL),
    Operation("last_digit", "p", "the last digit of n", "n % 10"),
    Operation("as_text", "i", "n as a string", "str(n)"),
    Operation("power_of_two", "p", "two to the power n", "2 ** n"),
    Operation("square_plus", "i", "n squared plus {k}", "n ** 2 + {k}", _SMALL),
    Operation("double_plus", "i", "two times n plus {k}", "2 * n + {k}", _SMALL),
    # several numbers
    Operation("add", "ii", "the sum of a and b", "a + b"),
    Operation("subtract", "ii", "a minus b", "a - b"),
    Operation("multiply", "ii", "the product of a and b", "a * b"),
    Operation("average", "ii", "the average of a and b", "(a + b) / 2"),
    Operation("larger", "ii", "the larger of a and b", "max(a, b)"),
    Operation("smaller", "ii", "the smaller of a and b", "min(a, b)"),
    Operation("greater", "ii", "True if a is greater than b", "a > b"),
    Operation("less", "ii", "True if a is less than b", "a < b"),
    Operation("remainder", "pp", "the remainder of a divided by b", "a % b"),
    Operation("quotient", "pp", "a divided by b", "a / b"),
    Operation("power", "pp", "a to the power b", "a ** b"),
    Operation("distance", "ii", "the absolute difference of a and b", "abs(a - b)"),
    Operation("sum_of_squares", "ii", "the sum of the squares of a and b", "a ** 2 + b ** 2"),
    Operation("square_of_sum", "ii", "the square of the sum of a and b", "(a + b) ** 2"),
    Operation("product_plus", "ii", "a times b plus {k}", "a * b + {k}", _SMALL),
    Operation("sum_plus", "ii", "a plus b plus {k}", "a + b + {k}", _SMALL),
    Operation("sum_times", "ii", "the sum of a and b, times {k}", "(a + b) * {k}", _SMALL),
    Operation("add_three", "iii", "the sum of a, b and c", "a + b + c"),
    Operation("multiply_three", "iii", "the product of a, b and c", "a * b * c"),
    Operation("largest_three", "iii", "the largest of a, b and c", "max(a, b, c)"),
    Operation("smallest_three", "iii", "the smallest of a, b and c", "min(a, b, c)"),
    Operation("average_three", "iii", "the average of a, b and c", "(a + b + c) / 3"),
    # text
    Operation("upper", "s", "s in upper case", "s.upper()"),
    Operation("title", "s", "s in title case", "s.title()"),
    Operation("reverse_text", "s", "s reversed", "s[::-1]"),
    Operation("length_text", "s", "the length of s", "len(s)"),
    Operation("first_letter", "s", "the first character of s", "s[0]"),
    Operation("last_letter", "s", "the last character of s", "s[-1]"),
    Operation("prefix_text", "s", "the first {k} characters of s", "s[:{k}]", (2, 3, 4)),
    Operation("suffix_text", "s", "the last {k} characters of s", "s[-{k}:]", (2, 3, 4)),
    Operation("repeat_text", "w", "s repeated {k} times", "s * {k}", (2, 3, 4, 5)),
    Operation("words", "s", "the list of words in s", "s.split()"),
    Operation("count_words", "s", "the number of words in s", "len(s.split())"),
    Operation("count_letter", "s", "how often '{k}' is in s", "s.count('{k}')", _LETTERS),
    Operation("has_letter", "w", "True if '{k}' is in s", "'{k}' in s", _LETTERS),
    Operation("starts_with", "w", "True if s starts with '{k}'", "s.startswith('{k}')", ("r", "c", "m", "s")),
    Operation("ends_with", "w", "True if s ends with '{k}'", "s.endswith('{k}')", ("r", "n", "t", "e")),
    Operation("replace_letter", "s", "s with '{k}' replaced by 'x'", "s.replace('{k}', 'x')", _LETTERS),
    Operation("no_spaces", "s", "s without spaces", "s.replace(' ', '')"),
    Operation("join_texts", "ww", "a followed by b", "a + b"),
    Operation("spaced_texts", "ww", "a and b with one space between", "a + ' ' + b"),
    Operation("same_length", "ww", "True if a and b have the same length", "len(a) == len(b)"),
    Operation("palindrome", "w", "True if s is a palindrome", "s == s[::-1]"),
    # lists of numbers
    Operation("sum_list", "l", "the sum of items", "sum(items)"),
    Operation("length_list", "l", "the length of items", "len(items)"),
    Operation("largest_item", "l", "the largest number in items", "max(items)"),
    Operation("smallest_item", "l", "the smallest number in items", "min(items)"),
    Operation("first_item", "l", "the first element of items", "items[0]"),
    Operation("last_item", "l", "the last element of items", "items[-1]"),
    Operation("sorted_list", "l", "items sorted", "sorted(items)"),
    Operation("reverse_list", "l", "items reversed", "items[::-1]"),
    Operation("mean_list", "l", "the average of items", "sum(items) / len(items)"),
    Operation("count_item", "l", "how often {k} is in items", "items.count({k})", (1, 2, 3)),
    Operation("has_item", "l", "True if {k} is in items", "{k} in items", (1, 2, 3)),
    Operation("prefix_list", "l", "the first {k} elements of items", "items[:{k}]", (2, 3)),
    Operation("suffix_list", "l", "the last {k} elements of items", "items[-{k}:]", (2, 3)),
    Operation("tail_list", "l", "items without the first element", "items[1:]"),
    Operation("doubled_list", "l", "the list of items, each times {k}", "[x * {k} for x in items]", (2, 3, 4)),
    Operation("shifted_list", "l", "the list of items, each plus {k}", "[x + {k} for x in items]", (1, 2, 3)),
    Operation("evens", "l", "the even numbers in items", "[x for x in items if x % 2 == 0]"),
    Operation("positives", "l", "the positive numbers in items", "[x for x in items if x > 0]"),
    Operation("unique_count", "l", "the number of different items", "len(set(items))"),
    Operation("spread", "l", "the largest of items minus the smallest", "max(items) - min(items)"),
    Operation("longer_than", "l", "True if items has more than {k} elements", "len(items) > {k}", (1, 2, 3, 4)),
)  # fmt: skip
