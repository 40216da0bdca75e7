"""Rewards and metrics of the four domains on replies whose worth is known. Code runs in the real sandbox."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.config import TaskConfig
from omni_fast.errors import UserError
from omni_fast.rewards.code import CodeVerifier, same
from omni_fast.rewards.judge.base import Judge, Reply
from omni_fast.rewards.judge.rubric import RubricJudge
from omni_fast.rewards.math import MathVerifier
from omni_fast.rewards.sandbox import Sandbox
from omni_fast.rewards.score import Part
from omni_fast.tasks import BUILT_IN
from omni_fast.tasks.base import Item, Resources
from omni_fast.tasks.code import CASES, _item, hidden_tests, program
from omni_fast.tasks.functions import OPERATIONS, draw, reference
from omni_fast.tasks.splits import BuiltIn

EVERY = [
    _item(operation, constant, rename, 0)
    for operation in OPERATIONS
    for constant in (operation.constants or ("",))[:2]
    for rename in range(2)
]


def never() -> CodeVerifier:
    raise AssertionError("no program is run")


def make(kind: str, code: Callable[[], CodeVerifier] = never, judges: Sequence[Judge] = (RubricJudge(),)) -> BuiltIn:
    own = Resources(MathVerifier, code, lambda: judges[0], lambda: judges[-1])
    return BUILT_IN[kind](TaskConfig.model_validate({"name": kind, "kind": kind}), 0, own)


@pytest.fixture(scope="module")
def code() -> Iterator[BuiltIn]:
    sandbox = Sandbox(workers=1)
    try:
        sandbox.start()
    except UserError as error:
        pytest.skip(str(error))
    yield make("code", lambda: CodeVerifier(sandbox))
    sandbox.close()


def test_math_pays_for_the_last_number_alone() -> None:
    task = make("math")
    item = next(item for item in task.items("test") if item.prompt.startswith("What is") and "+" in item.id)
    gold = int(str(item.answer["gold"]))
    replies = [f"It is {gold}.", f"{gold} or {gold + 1}", "I do not know", "", f"\\boxed{{{gold}}}", f"-{gold}"]
    assert task.metric([item] * len(replies), replies) == [1, 0, 0, 0, 1, 0]
    reasons = [score.parts["correct"].reason for score in task.score([item] * 2, [str(gold + 1), "none"])]
    assert reasons == ["wrong", "no_answer"]


def test_every_math_gold_is_right() -> None:
    task = make("math")
    for item in task.items("train"):
        assert int(str(item.answer["gold"])) == eval(item.id.split("/")[0])  # noqa: S307


def test_qa_wants_one_candidate_as_the_answer() -> None:
    task = make("qa")
    item = next(item for item in task.items("test") if item.id.startswith("capital/"))
    gold, candidates = str(item.answer["gold"]), item.answer["candidates"]
    assert isinstance(candidates, list)
    other = next(str(candidate) for candidate in candidates if candidate != gold)
    tails = [f" {gold}.", f" {gold}", f" {other}.", f" {gold}, not {other}.", f" {', '.join(map(str, candidates))}", ""]
    assert task.metric([item] * len(tails), [item.prefix + tail for tail in tails]) == [1, 1, 0, 0, 0, 0]


class Fixed:
    """A judge whose verdict is known, so that reward and metric can be told apart."""

    def __init__(self, value: float | None) -> None:
        self.value = value
        self.seen: list[Reply] = []

    name = "fixed"

    def judge(self, replies: Sequence[Reply]) -> list[Part]:
        self.seen += replies
        return [Part(self.value, "ok" if self.value is not None else "judge_down") for _ in replies]


def test_writing_trains_on_one_judge_and_reports_the_other() -> None:
    reward, metric = Fixed(1.0), Fixed(None)
    task = make("writing", judges=(reward, metric))
    items = task.items("test")[:2]
    good, short = "one two three four five six seven eight nine ten", "A lake uses fire and a train."
    assert [score.parts["preference"].value for score in task.score(items, [good, short])] == [1.0, 0.0]
    assert task.metric(items, [short, good]) == [0.0, None]
    assert task.metric(items[:1], [f"<think>{good}</think>{short}"]) == [0.0], "what is thought is not written"
    assert [reply.completion for reply in reward.seen + metric.seen] == [good, good]
    assert reward.seen[0].prompt.endswith(" and ".join(map(str, items[0].answer["words"])) + ".")  # type: ignore[arg-type]
    assert reward.seen[0].required == tuple(str(items[0].answer["words"])[2:-2].split("', '"))


def test_writing_references_are_good_replies() -> None:
    task = make("writing")
    items = task.items("train")[:100]
    values = [value for value in task.metric(items, [str(item.answer["reference"]) for item in items]) if value]
    assert len(values) >= 99 and sum(values) / len(values) > 0.9


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_operations_tell_stubs_from_the_reference(operation: object) -> None:
    """No constant, echo of an argument, or neighbour constant may pass all hidden inputs."""
    own = [item for item in EVERY if item.answer["operation"] == operation.name]  # type: ignore[attr-defined]
    for item in own:
        cases = hidden_tests(item.answer, "key").cases
        assert len(cases) == CASES
        expected = [case.expected for case in cases]
        assert not all(same(expected[0], value) for value in expected)
        for place in range(len(cases[0].args)):
            assert not all(same(case.expected, case.args[place]) for case in cases), "returning an argument passes"


def test_hidden_inputs_vary_with_the_batch_and_are_fixed_for_the_metric() -> None:
    item = EVERY[0]
    assert hidden_tests(item.answer, "a") == hidden_tests(item.answer, "a") != hidden_tests(item.answer, "b")


def test_boolean_functions_are_asked_for_both_answers() -> None:
    for item in EVERY:
        expected = [case.expected for case in hidden_tests(item.answer, "x").cases]
        if all(isinstance(value, bool) for value in expected):
            assert 2 <= sum(map(bool, expected)) <= CASES - 2, item.id


def test_renaming_reaches_every_parameter_and_no_constant() -> None:
    for item in EVERY:
        names = str(item.answer["parameters"]).split(", ")
        arguments = [draw(kind, random.Random(0)) for kind in str(item.answer["arguments"])]
        reference(tuple(names), str(item.answer["expression"]))(*arguments)  # NameError if a name was missed
        assert all(name in item.prompt.split("#")[1] for name in names), item.prompt
        assert "{" not in item.prompt + str(item.answer["expression"])


def test_every_reference_passes_and_no_stub_does(code: BuiltIn) -> None:
    golds = [f"{item.prefix} {item.answer['expression']}\n```" for item in EVERY]
    assert {score.parts["tests"].reason for score in code.score(EVERY, golds)} == {"ok"}
    plain = EVERY[::2]
    first = [str(item.answer["parameters"]).split(", ")[0] for item in plain]
    talkative = code.score(plain, [f"{gold} That is all." for gold in golds[::2]])
    assert {score.parts["tests"].reason for score in talkative} == {"more_than_code"}
    for stubs in (["None"] * len(plain), ["True"] * len(plain), first):
        replies = [f"{item.prefix} {stub}\n```" for item, stub in zip(plain, stubs, strict=True)]
        assert code.metric(plain, replies) == [0.0] * len(plain)


WITHOUT_SANDBOX = (make("math"), make("qa"), make("writing"))


@given(text=st.text(max_size=200))
@settings(deadline=None, max_examples=25)
def test_no_text_upsets_a_domain(code: BuiltIn, text: str) -> None:
    for task in (*WITHOUT_SANDBOX, code):
        item = task.items("train")[0]
        for reply in (text, item.prefix + text):
            assert task.score([item], [reply])[0].valid
            value = task.metric([item], [reply])[0]
            assert value is not None and 0.0 <= value <= 1.0


def test_an_invalid_score_stays_invalid() -> None:
    class Down(CodeVerifier):
        def __init__(self) -> None: ...

        def score(self, sources: Sequence[str], tests: Sequence[object]) -> list[Part]:
            return [Part(None, "infrastructure") for _ in sources]

    task = make("code", Down)
    item: Item = task.items("test")[0]
    assert not task.score([item], ["x"])[0].valid
    assert task.metric([item], ["x"]) == [None]


def test_a_program_is_code_alone() -> None:
    code = "def f(n):\n    return n\n"
    for reply in (f"```python\n{code}```", f"```python\n{code}```\n\n", f"```python\n{code}", code):
        assert program(reply) == code
    for rest in ("\nThis returns n.", " ```python\ndef f(n): return 1\n```"):
        assert program(f"```python\n{code}```{rest}") is None
