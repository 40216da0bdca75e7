"""Function synthesis: a stub with a description in the prompt, the body from the model, hidden inputs for the reward.

Splits share no operation (`functions.OPERATIONS`), so held-out items ask for functions never trained on.
The hidden inputs of the reward are drawn anew for every batch of completions, so a table of outputs cannot be learned;
those of the metric are fixed by the item, so that two policies meet the same tests. The prompt shows no test.
Limits: one function with one expression; bigger programs come with data of the user (`jsonl`).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from itertools import product, zip_longest

from omni_fast.config import TaskConfig
from omni_fast.rewards.code import Case, Tests
from omni_fast.rewards.sandbox import Data
from omni_fast.rewards.score import Part, Score
from omni_fast.tasks.base import Item, Json, Resources, Split
from omni_fast.tasks.functions import OPERATIONS, Operation, draw, reference
from omni_fast.tasks.splits import BuiltIn, Level, Sizes, partition

CASES = 10  # hidden tests of a sample
ENTRY = "f"
_CANDIDATES = 80  # inputs drawn, of which CASES are taken so that the expected values differ
_COMMENTS = ("return {text}", "{text}", "gives {text}")
_NAMES = {"n": ("n", "x", "number"), "s": ("s", "text", "word"), "items": ("items", "numbers", "values")}
_TINY = tuple(f"{name}_constant" for name in ("add", "subtract", "multiply", "modulo", "above", "below"))
_SHARES: Mapping[Split, float] = {"train": 0.5, "select": 0.15, "test": 0.35}
_TINY_SIZES = Sizes(train=24, select=7, test=17)


def program(completion: str) -> str | None:
    """The source in a reply that is code alone, its fence opened by our prefix; None when anything follows the fence.

    The system message asks for code only, so a talkative reply is wrong, however right its code.
    """
    source, _, rest = completion.removeprefix("```python\n").partition("```")
    return None if rest.strip() else source


def hidden_tests(answer: Mapping[str, Json], key: str) -> Tests:
    """CASES calls with their expected values, a function of `key`; never all the same value.

    Inputs are taken in turn from the groups of equal outcome: a boolean function is asked for both, half and half.
    """
    rng = random.Random(key)
    kinds, expression = str(answer["arguments"]), str(answer["expression"])
    parameters = tuple(str(answer["parameters"]).split(", "))
    function = reference(parameters, expression)
    groups: dict[str, list[tuple[Data, ...]]] = {}
    for _ in range(_CANDIDATES):
        arguments = tuple(draw(kind, rng) for kind in kinds)
        groups.setdefault(repr(function(*arguments)), []).append(arguments)
    queues = list(groups.values())
    chosen = [queues[turn % len(queues)].pop() for turn in range(min(CASES, len(queues)))]
    while len(chosen) < CASES:
        queues = [queue for queue in queues if queue]
        chosen += [queue.pop() for queue in queues[: CASES - len(chosen)]]
    return Tests(ENTRY, tuple(Case(arguments, function(*arguments)) for arguments in chosen))


def _digest(item: Item, completions: Sequence[str]) -> str:
    return hashlib.sha256("\0".join((item.id, *completions)).encode("utf-8", "replace")).hexdigest()


def _pools(seed: int) -> dict[Split, list[Item]]:
    """Operations in turn, each with its constants, parameter names and wordings in random order."""
    rng = random.Random(f"code:default:{seed}")
    pools: dict[Split, list[Item]] = {}
    for split, operations in partition(OPERATIONS, _SHARES, rng).items():
        queues = []
        for operation in operations:
            choices = product(operation.constants or ("",), range(len(_renamings(operation))), range(len(_COMMENTS)))
            queues.append([_item(operation, *choice) for choice in choices])
            rng.shuffle(queues[-1])
        pools[split] = [item for turn in zip_longest(*queues) for item in turn if item]
    return pools


def _renamings(operation: Operation) -> list[tuple[str, ...]]:
    parameters = operation.parameters
    if len(parameters) == 1:
        return [(name,) for name in _NAMES[parameters[0]]]
    return [parameters, ("x", "y", "z")[: len(parameters)], ("p", "q", "r")[: len(parameters)]]


def _item(operation: Operation, constant: int | str, rename: int, comment: int) -> Item:
    names = dict(zip(operation.parameters, _renamings(operation)[rename], strict=True))

    def filled(text: str) -> str:
        words = r"\b(?:" + "|".join(names) + r")\b(?!')"  # not the letter inside a quoted constant
        return re.sub(words, lambda match: names[match.group()], text).replace("{k}", str(constant))

    signature = f"def {ENTRY}({', '.join(names.values())}):"
    text, expression = filled(operation.text), filled(operation.expression)
    answer: dict[str, Json] = {
        "operation": operation.name,
        "arguments": operation.arguments,
        "parameters": ", ".join(names.values()),
        "expression": expression,
    }
    return Item(
        f"{operation.name}/{constant}/{rename}/{comment}",
        f"Complete in one line:\n{signature}  # {_COMMENTS[comment].format(text=text)}",
        answer,
        f"```python\n{signature}\n    return",
    )


def _tiny_pools(seed: int) -> dict[Split, list[Item]]:
    """ "n + 3" from "n plus 3": splits share no pair of operation and constant."""
    rng = random.Random(f"code:tiny:{seed}")
    chosen = [
        (operation, constant) for operation in OPERATIONS if operation.name in _TINY for constant in operation.constants
    ]
    return {split: [_tiny_item(*pair) for pair in pairs] for split, pairs in partition(chosen, _SHARES, rng).items()}


def _tiny_item(operation: Operation, constant: int | str) -> Item:
    item = _item(operation, constant, 0, 0)
    return Item(item.id, operation.text.replace("{k}", str(constant)), item.answer, f"def {ENTRY}(n): return")


class CodeTask(BuiltIn):
    """Part `tests`: what the verifier gives for the hidden inputs. The metric: 1 when all are passed, else 0."""

    kind = "code"
    part = "tests"
    levels = {
        "default": Level(Sizes(), "You write Python. Reply with code only.", _pools),
        "tiny": Level(_TINY_SIZES, "", _tiny_pools),
    }

    def __init__(self, block: TaskConfig, seed: int, resources: Resources) -> None:
        super().__init__(block, seed, resources)
        self.verifier = resources.code()

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[Score]:
        draws = [_digest(item, completions) for item in items]
        return [Score({"tests": part}) for part in self._run(items, completions, draws)]

    def metric(self, items: Sequence[Item], completions: Sequence[str]) -> list[float | None]:
        parts = self._run(items, completions, ["metric"] * len(items))
        return [None if part.value is None else float(part.value == 1.0) for part in parts]

    @staticmethod
    def demonstrate(item: Item, items: Sequence[Item], rng: random.Random) -> tuple[str, str]:
        """Replies open with the item's prefix."""
        expression = str(item.answer["expression"])
        wrong = rng.choice([other for one in items if (other := str(one.answer["expression"])) != expression])
        return f"{item.prefix} {expression}", f"{item.prefix} {wrong}"

    def _run(self, items: Sequence[Item], completions: Sequence[str], draws: Sequence[str]) -> list[Part]:
        tests = [
            hidden_tests(item.answer, f"{self.seed}:{item.id}:{draw}") for item, draw in zip(items, draws, strict=True)
        ]
        programs = [program(completion) for completion in completions]
        alone = [(source, test) for source, test in zip(programs, tests, strict=True) if source is not None]
        graded = iter(self.verifier.score([source for source, _ in alone], [test for _, test in alone]))
        return [Part(0.0, "more_than_code") if source is None else next(graded) for source in programs]
