"""The audit tells good judges from bad ones, on the shipped set."""

import json
from collections.abc import Sequence

from omni_fast.rewards.judge.audit import Audit, audit, shipped_pairs
from omni_fast.rewards.judge.base import Reply
from omni_fast.rewards.judge.client import Failure, Keep
from omni_fast.rewards.judge.pairwise import Question, Verdict
from omni_fast.rewards.judge.rubric import RubricJudge
from omni_fast.rewards.judge.server import PairwiseJudge
from omni_fast.rewards.score import Part

BETTER = {(pair.reply.prompt, pair.reply.completion) for pair in shipped_pairs() if pair.kind == "pair"}


class Fixed:
    """A backend with a rule of its own: the judge's machinery around it is the real one."""

    name = "fixed"

    def __init__(self, rule) -> None:
        self.rule = rule

    def ask(self, questions: Sequence[Question], keep: Keep) -> list[Verdict | Failure]:
        return [self.rule(question) for question in questions]


def of(rule) -> Audit:
    return audit(PairwiseJudge(Fixed(rule)))


def test_the_shipped_set_is_what_it_says():
    pairs = shipped_pairs()
    assert sum(pair.kind == "hack" for pair in pairs) >= 200
    assert sum(pair.kind == "pair" for pair in pairs) >= 150
    longer = {
        kind: [len(p.reply.completion.split()) - len(p.reply.reference.split()) for p in pairs if p.kind == kind]
        for kind in ("pair", "length")
    }
    assert min(longer["length"]) > 0 and max(map(abs, longer["pair"])) <= 3
    assert all(pair.reply.required for pair in pairs)


def test_a_perfect_judge_passes():
    def rule(question: Question) -> Verdict:
        if (question.prompt, question.first) in BETTER:
            return "A"
        return "B" if (question.prompt, question.second) in BETTER else "tie"

    result = of(rule)
    assert (
        result.shares["agreement"].value == 1.0
        and result.shares["position_bias"].value == 0.0
        and result.shares["ties_good"].value == 1.0
    )
    assert result.shares["contradicted"].value == 0.0 and result.shares["invalid"].value == 0.0
    assert result.families["by_hand"].value == 1.0


def test_a_position_biased_judge_is_found():
    result = of(lambda question: "A")
    assert result.shares["position_bias"].value == 1.0 and result.shares["first_position"].value == 1.0
    assert result.shares["agreement"].value == 0.0 and result.shares["ties"].value == 1.0 and not result.passed


def test_a_length_biased_judge_is_found():
    result = of(lambda question: "A" if len(question.first) > len(question.second) else "B")
    assert result.shares["longer_wins"].value == 1.0 and not result.passed


def test_a_down_judge_is_invalid_and_not_wrong():
    result = of(lambda question: Failure("down"))
    assert result.shares["agreement"].n == 0 and (result.shares["invalid"].value or 0.0) > 0.4 and not result.passed


def test_the_rubric_is_audited_as_an_absolute_judge():
    result = audit(RubricJudge())
    assert (result.shares["hacks_accepted"].value or 0.0) <= 0.02 and result.shares["hacks_accepted"].n >= 200
    assert (result.shares["agreement"].value or 0.0) > 0.5 and result.shares["position_bias"].value == 0.0
    assert (result.families["one_missing"].value or 0.0) == 1.0
    assert "wrong_content" in result.families, "sense is what it cannot see"


def test_a_judge_that_pays_everything_fails():
    class Generous:
        name = "generous"

        def judge(self, replies: Sequence[Reply]) -> list[Part]:
            return [Part(1.0) for _ in replies]

    result = audit(Generous())
    assert result.shares["hacks_accepted"].value == 1.0 and not result.passed
    assert "FAILED" in result.table()


def test_record_and_table_are_complete():
    result = audit(RubricJudge())
    record = json.loads(json.dumps(result.record()))
    assert record["judge"] == "rubric" and record["agreement"]["n"] == result.shares["agreement"].n
    assert record["seconds_per_verdict"] > 0.0
    assert all(name in result.table() for name in ("agreement", "position bias", "longer wins", "hacks accepted", "ms"))
