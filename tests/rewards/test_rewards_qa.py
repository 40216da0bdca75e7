"""Question answering: the matcher, its hacks, and the converter from multiple choice."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.errors import UserError
from omni_fast.rewards.qa import Choice, QaMatcher, normalise, to_text_answers
from omni_fast.rewards.score import Part

CAPITALS = ["Paris", "London", "Rome", "Guatemala City", "Washington, D.C.", "São Tomé", "N'Djamena", "Lima", "Oslo"]
names = st.text(string.ascii_lowercase, min_size=3, max_size=9).filter(lambda word: word not in ("the", "not", "nor"))


def matcher(gold: str) -> QaMatcher:
    return QaMatcher(gold, candidates=CAPITALS)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The U.S.A.", "usa"),
        ("twenty-one", "21"),
        ("1,000.50", "1000.5"),
        ("007", "7"),
        ("Ｐａｒｉｓ", "paris"),
        ("São Tomé & Príncipe", "Sao Tome and Principe"),
        ("Xi’an", "Xi'an"),
        ("Saint-Denis", "saint denis"),
    ],
)
def test_ways_of_writing_the_same_answer(one, other):
    assert normalise(one) == normalise(other)


def test_different_answers_stay_different():
    assert len({normalise(text) for text in ("5", "50", "5%", "0.5", "5 apples", "C", "C+")}) == 7


@pytest.mark.parametrize("gold", CAPITALS)
@pytest.mark.parametrize(
    "frame",
    ["{}", "{}.", "The capital is {}.", "{} is the capital.", "Answer: {}", "The answer is {}. I am sure.", "**{}**",
              "<answer>{}</answer>", "It's {}.", "\\boxed{{{}}}"]
)  # fmt: skip
def test_the_right_answer_in_any_frame(gold, frame):
    assert matcher(gold).score(frame.format(gold)).value == 1.0


@pytest.mark.parametrize("gold", CAPITALS)
@pytest.mark.parametrize(
    "make",
    [
        lambda gold: ", ".join(CAPITALS),
        lambda gold: "\n".join([gold, *CAPITALS]),
        lambda gold: f"The answer is {gold}. Or {'Lima' if gold != 'Lima' else 'Oslo'}.",
        lambda gold: f"{gold} or {'Lima' if gold != 'Lima' else 'Oslo'}",
        lambda gold: f"not {gold}",
        lambda gold: f"It isn't {gold}.",
        lambda gold: f"The answer is not {gold}.",
        lambda gold: f"{gold} is not the capital.",
        lambda gold: f"Anything but {gold}",
        lambda gold: f"What is the capital? Choose one of: {', '.join(CAPITALS)}.",
        lambda gold: f"{gold} {gold}xyz Atlantis",
        lambda gold: f"Atlantis, {gold}, Gondor",
        lambda gold: "",
        lambda gold: "?!",
        lambda gold: " ".join(["word"] * 30 + [gold]),
    ],
)
def test_hacks_score_zero(gold, make):
    assert matcher(gold).score(make(gold)).value == 0.0


def test_overlapping_candidates_are_told_apart():
    guinea = ["Guinea", "Guinea-Bissau", "Equatorial Guinea", "Niger", "Nigeria"]
    assert QaMatcher("Guinea-Bissau", candidates=guinea).score("Guinea-Bissau").value == 1.0
    assert QaMatcher("Guinea", candidates=guinea).score("Equatorial Guinea").value == 0.0
    assert QaMatcher("Niger", candidates=guinea).score("Nigeria").value == 0.0


def test_aliases_are_accepted_and_collisions_refused():
    assert QaMatcher("United Kingdom", aliases=["UK", "Britain"]).score("The U.K.").value == 1.0
    for bad in (["Paris", "paris!"], ["Rome", "rome"], ["Paris", "the"]):
        with pytest.raises(UserError):
            QaMatcher("Paris", candidates=bad)
    with pytest.raises(UserError):
        QaMatcher("...")


@pytest.mark.parametrize(
    ("gold", "reply", "reason"),
    [
        ("-5", "5", "wrong"),
        ("5", "-5", "wrong"),
        ("5", "\u22125", "wrong"),
        ("-5", "It is \u22125.", "ok"),
        ("1990-1995", "1990 to 1995", "wrong"),
        ("1990-1995", "1990-1995", "ok"),
        ("COVID-19", "covid 19", "ok"),
        ("Paris", "\\boxed{\\text{Paris}}", "ok"),
        ("Paris", "I think it's Paris.", "ok"),
        ("Paris", "Rome is Paris", "too_many"),  # a guess on either side of "is"
        ("Paris", "Paris is Rome", "too_many"),
        ("21", "20 is 21", "too_many"),
        ("Paris", "The capital is Paris", "ok"),
        ("Paris", "France's capital is Paris", "ok"),
        ("What Is Love", "What is love", "ok"),
        ("What Is Love", "What is Rome", "wrong"),
        ("A", "The answer is A.", "ok"),
        ("A", "B", "wrong"),
        ("J. K. Rowling", "J.K. Rowling", "ok"),
        ("J.K. Rowling", "The answer is J. K. Rowling.", "ok"),
        ("J.K. Rowling", "K.J. Rowling", "wrong"),
        ("Dr. Seuss", "It is Dr. Seuss.", "ok"),
        ("56", "The answer is 5. 6.", "wrong"),
    ],
)
def test_without_known_candidates(gold, reply, reason):
    assert QaMatcher(gold).score(reply) == Part(float(reason == "ok"), reason)


def test_the_letter_of_a_choice_is_an_answer():
    letters = QaMatcher("A", candidates="ABCD")
    assert [letters.score(text).value for text in ("A", "(A)", "B", "A or B", "B, not A")] == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_reasoning_is_not_read():
    assert matcher("Paris").score("<think>London? Rome? Not Oslo.</think>Paris").value == 1.0
    assert matcher("Paris").score("<think>" + "London or Rome? " * 500 + "</think>\nParis").value == 1.0
    assert matcher("Paris").score("Rome</think>Paris or Rome").value == 0.0
    assert matcher("Paris").score("<think>Paris").reason == "no_answer"


@settings(deadline=None, max_examples=2000)
@given(st.one_of(st.text(max_size=300), st.binary(max_size=300).map(lambda b: b.decode("utf-8", "surrogateescape"))))
def test_no_text_raises_and_none_is_right_by_accident(text):
    part = matcher("Guatemala City").score(text)
    assert part.value == 0.0
    assert normalise(normalise(text)) == normalise(text) or any(ch.isdigit() for ch in normalise(text))


def test_long_texts_are_bounded():
    for text in ("a" * 300_000, "is " * 100_000, "<answer>" * 30_000, "Paris " * 60_000, "1," * 100_000):
        assert matcher("Rome").score(text).value == 0.0


@settings(deadline=None, max_examples=200)
@given(st.lists(names, min_size=2, max_size=8, unique=True), st.data())
def test_exactly_one_candidate_wins(words, data):
    gold = data.draw(st.sampled_from(words))
    grader = QaMatcher(gold, candidates=words)
    if normalise(gold) != gold:
        return
    assert [grader.score(word).value for word in words] == [float(word == gold) for word in words]
    assert grader.score(" ".join(words)).value == 0.0


def test_conversion_keeps_what_makes_sense_and_counts_the_rest():
    choices = [
        Choice("What is the capital of France?", ("Paris", "Rome"), 0, "capital"),
        Choice("What is the capital of Peru?", ("Lima", "Oslo", "Cairo"), 0, "capital"),
        Choice("How many legs has a spider?", ("eight", "six"), 0, "number"),
        Choice("Which of the following is a mammal?", ("whale", "shark"), 0, "animal"),
        Choice("The red planet is called?", ("Mars", "all of the above"), 0, "planet"),
        Choice("The planet Mars is called?", ("Mars", "Venus"), 0, "planet"),
        Choice("How many is a dozen?", ("12", "twelve"), 0, "number"),
        Choice("Bad?", ("x", "y"), 7),
        Choice("Alone?", ("x",), 0, "lonely"),
    ]
    with pytest.raises(UserError, match="at least 2, got 1"):
        to_text_answers(choices, candidates=1)
    rows, dropped = to_text_answers(choices, candidates=4)
    assert [row["answer"] for row in rows] == ["Paris", "Lima", "eight"]
    assert dropped == {
        "ill_posed": 1, "meta_option": 1, "gold_in_stem": 1, "collision": 1, "bad_gold": 1, "too_few": 1
    }  # fmt: skip
    assert set(rows[0]["candidates"]) <= {"Paris", "Rome", "Lima", "Oslo", "Cairo"}, "same kind only"


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(names, st.lists(names, min_size=2, max_size=5)), min_size=1, max_size=8), st.integers(2, 9))
def test_every_converted_item_can_be_graded(raw, count):
    choices = [Choice(f"Question about {stem}?", tuple(options), 0, "word") for stem, options in raw]
    rows, dropped = to_text_answers(choices, candidates=count)
    assert len(rows) + dropped.total() == len(choices)
    for row in rows:
        gold, candidates = row["answer"], row["candidates"]
        assert 2 <= len(candidates) <= count and gold in candidates
        grader = QaMatcher(gold, candidates=candidates)
        assert grader.score(gold).value == 1.0
        assert grader.score(", ".join(candidates)).value == 0.0
