"""Tasks from files and from the user's own class: what is kept, what is dropped, what is said."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from omni_fast.config import TaskConfig
from omni_fast.errors import UserError
from omni_fast.rewards.code import CodeVerifier
from omni_fast.rewards.judge.rubric import RubricJudge
from omni_fast.rewards.math import MathVerifier
from omni_fast.rewards.sandbox import Sandbox
from omni_fast.rewards.score import Part, Score
from omni_fast.tasks import build_tasks
from omni_fast.tasks.base import SPLITS, Resources
from omni_fast.tasks.files import read_rows
from omni_fast.tasks.jsonl import check, guess_block


def never() -> CodeVerifier:
    raise AssertionError("no block asked for code")


@pytest.fixture(scope="module")
def resources() -> Iterator[Resources]:
    with MathVerifier(workers=1) as math:
        yield Resources(lambda: math, never, RubricJudge, RubricJudge)


@pytest.fixture(scope="module")
def sandboxed(resources: Resources) -> Iterator[Resources]:
    sandbox = Sandbox(workers=1)
    try:
        sandbox.start()
    except UserError as error:
        pytest.skip(str(error))
    yield Resources(resources.math, lambda: CodeVerifier(sandbox), RubricJudge, RubricJudge)
    sandbox.close()


def write(path: Path, rows: Sequence[object]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def block(file: str, **fields: object) -> TaskConfig:
    given = {"name": "mine", "kind": "jsonl", "file": file, "prompt": "{question}", "answer": "answer"}
    return TaskConfig.model_validate(given | {"verifier": "math"} | fields)


def sums(n: int) -> list[object]:
    return [{"question": f"What is {a} + 100?", "answer": a + 100} for a in range(1, n + 1)]


def test_a_good_file_becomes_three_disjoint_splits(tmp_path: Path, resources: Resources) -> None:
    made = build_tasks([block(write(tmp_path / "a.jsonl", sums(50)))], seed=0, resources=resources)["mine"]
    prompts = [item.prompt for split in SPLITS for item in made.items(split)]
    assert sorted(prompts) == sorted(f"What is {a} + 100?" for a in range(1, 51))
    assert [len(made.items(split)) for split in SPLITS] == [35, 5, 10]
    item = made.items("test")[0]
    assert made.metric([item, item], [f"= {item.answer['gold']}", "= 1"]) == [1.0, 0.0]
    again = build_tasks([block(write(tmp_path / "a.jsonl", sums(50)))], seed=0, resources=resources)["mine"]
    assert again.items("train") == made.items("train")


def test_golds_that_fail_their_verifier_are_dropped_and_shown(tmp_path: Path, resources: Resources) -> None:
    rows = [
        *sums(20),
        {"question": "How many?", "answer": "it depends on (((the"},  # fine as a string: equal to itself
        {"question": "Next after 41?", "answer": "9!"},
        {"question": "Say 7", "answer": "7"},
        {"question": "What is 3 + 100?", "answer": "103"},
        {"question": "Nothing", "answer": ""},
        {"question": ["a"], "answer": "1"},
    ]
    report = check(block(write(tmp_path / "a.jsonl", rows)), resources=resources)
    reasons = {drop.line: drop.reason for drop in report.dropped}
    assert reasons[23] == "stub:prompt"  # the prompt ends in its own answer
    assert reasons[24] == "duplicate"
    assert reasons[25] == "row" and reasons[26] == "row"
    assert report.kept + len(report.dropped) == len(rows)
    text = "\n".join(report.lines())
    assert "stub:prompt" in text and "line 23: Say 7 -> 7" in text


def test_qa_and_judge_blocks(tmp_path: Path, resources: Resources) -> None:
    rows: list[object] = [
        {"question": f"Where is house {n}?", "answer": f"street {n}", "candidates": [f"street {n}", "hill", "lake"]}
        for n in range(30)
    ]
    rows.append({"question": "Bad?", "answer": "A hill", "candidates": ["hill", "the hill"]})
    qa = block(write(tmp_path / "q.jsonl", rows), verifier="qa")
    report = check(qa, resources=resources)
    assert report.kept == 30 and report.dropped[0].line == 31 and "read the same" in report.dropped[0].text
    made = build_tasks([qa], seed=0, resources=resources)["mine"]
    item = made.items("test")[0]
    assert made.metric([item] * 2, [str(item.answer["gold"]), f"{item.answer['gold']} or the hill"]) == [1.0, 0.0]

    good = "The old man carried the {} up the hill before the rain came down."
    nouns = ["moon", "river", "bread", "lamp", "boat", "stone", "letter", "bell", "coat", "apple", "key", "song"]
    stories = [{"topic": noun, "reference": good.format(noun), "words": [noun]} for noun in nouns]
    stories.append({"topic": "nothing", "reference": "Sure! Here is a sentence.", "words": []})
    writing = block(
        write(tmp_path / "w.jsonl", stories), verifier="judge", prompt="Write on {topic}.", reference="reference"
    )
    report = check(writing, resources=resources)
    assert report.kept == len(nouns) and report.dropped[0].reason == "gold:master_key"
    made = build_tasks([writing], seed=0, resources=resources)["mine"]
    item = made.items("test")[0]
    values = made.metric([item, item], [str(item.answer["gold"]), ""])
    assert values[0] is not None and values[0] > 0.8 and values[1] == 0.0


def test_code_block_checks_references_and_stubs_in_the_sandbox(tmp_path: Path, sandboxed: Resources) -> None:
    def row(n: int, solution: str, tests: object) -> object:
        return {"question": f"Add {n} to x.", "answer": solution, "entry": "f", "tests": tests}

    def tests(n: int) -> list[object]:
        return [{"args": [x], "expected": x + n} for x in (1, 5, 9)]

    rows = [row(n, f"def f(x):\n    return x + {n}", tests(n)) for n in range(1, 13)]
    rows.append(row(50, "def f(x):\n    return x - 50", tests(50)))
    rows.append(row(51, "def f(x):\n    return None", [{"args": [1], "expected": None}]))
    rows.append(row(52, "def f(x):\n    return x", [{"args": [1], "expected": 1}]))
    rows.append(row(53, "def f(x):\n    return x", "assert f(1) == 1"))
    code = block(write(tmp_path / "c.jsonl", rows), verifier="code")
    report = check(code, resources=sandboxed)
    assert report.kept == 12
    assert {drop.line: drop.reason for drop in report.dropped} == {
        13: "gold:wrong",
        14: "stub:none",
        15: "stub:echo",
        16: "row",
    }
    made = build_tasks([code], seed=0, resources=sandboxed)["mine"]
    item = made.items("train")[0]
    assert made.metric([item, item], [str(item.answer["gold"]), "def f(x):\n    return 2"]) == [1.0, 0.0]


def test_parquet_reads_like_lines(tmp_path: Path, resources: Resources) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(sums(20)), tmp_path / "a.parquet")
    assert check(block(str(tmp_path / "a.parquet")), resources=resources).kept == 20
    (tmp_path / "b.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(UserError, match="not a readable parquet file"):
        read_rows(str(tmp_path / "b.parquet"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "answer": 1}\n{"question": \n', r"line 2 is not JSON"),
        ('{"question": "a", "answer": 1}\n\n\n[1, 2]\n', r"line 4 is a list"),
        ('{"question": "a", "answer": 1}\n"text"\n', r"line 2 is a str"),
        ("", "holds no rows"),
        ("\n \n", "holds no rows"),
        ('{"question": "a", "answer": 1}\n', "at least 10 usable items"),
        ('{"prompt": "a", "answer": 1}\n', r"no column question; its columns are \['answer', 'prompt'\]"),
        ("[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(
    tmp_path: Path, resources: Resources, content: str, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        build_tasks([block(str(tmp_path / "bad.jsonl"))], seed=0, resources=resources)


def test_bytes_that_are_no_text_name_their_line(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"a": 1}\n\xff\xfe\x00\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_rows(str(tmp_path / "bad.jsonl"))
    with pytest.raises(UserError, match="no data file"):
        read_rows(str(tmp_path / "missing.jsonl"))


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    good = "\n".join(json.dumps(row) for row in sums(20)).encode()
    rng = random.Random(0)
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 5)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        (tmp_path / "bad.jsonl").write_bytes(bytes(bad))
        try:
            assert read_rows(str(tmp_path / "bad.jsonl"))
        except UserError as error:
            assert ", line " in str(error)


def test_guess_block_knows_usual_columns(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, object], str]] = [
        ({"question": "a", "answer": "so 12"}, "math"),
        ({"prompt": "a", "answer": "Paris"}, "qa"),
        ({"prompt": "a", "solution": "def f(): ...", "tests": [], "entry": "f"}, "code"),
        ({"instruction": "a", "reference": "b"}, "judge"),
    ]
    for number, (row, verifier) in enumerate(cases):
        assert guess_block(write(tmp_path / f"{number}.jsonl", [row])).verifier == verifier
    with pytest.raises(UserError, match="rename"):
        guess_block(write(tmp_path / "x.jsonl", [{"text": "a"}]))


OWN = """
from omni_fast.rewards.compose import Composition
from omni_fast.rewards.score import Part, Score
from omni_fast.tasks.base import Item

class Length:
    system = ""
    composition = Composition("additive", {"length": 1.0})

    def __init__(self, name, seed, max_new_tokens):
        self.name, self.max_new_tokens = name, max_new_tokens

    def items(self, split):
        return [Item(f"{split}-{n}", f"{split} {n}") for n in range(4)]

    def score(self, items, completions):
        return [Score({"length": Part(1.0 / (1 + len(text)))}) for text in completions]

    def metric(self, items, completions):
        return [score.parts["length"].value for score in self.score(items, completions)]

class Half:
    def __init__(self, name, seed, max_new_tokens): ...

class Odd:
    def __init__(self, colour): ...

class NoFile(Length):
    def items(self, split):
        return open("/nowhere/data.csv").readlines()

class Texts(Length):
    def items(self, split):
        return ["1 + 1", "1 + 2"]

class Empty(Length):
    def items(self, split):
        return []

class Alike(Length):
    def items(self, split):
        return [Item("same", split)]

class Plain(Length):
    composition = {"length": 1.0}

class Wrong(Length):
    def score(self, items, completions):
        return self.wrong

    def metric(self, items, completions):
        return self.wrong
"""


def test_own_class_is_built_and_checked(tmp_path: Path, resources: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_task_module.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def own(cls: str) -> TaskConfig:
        return TaskConfig(name="own", kind="python", cls=cls)

    made = build_tasks([own("own_task_module:Length")], seed=0, resources=resources)["own"]
    assert made.metric(made.items("test")[:1], ["ab"]) == [1 / 3]
    for cls, message in [
        ("own_task_module", 'must read "module:Class"'),
        ("no_such_module_here:A", "cannot be imported"),
        ("own_task_module:Absent", "has no class Absent"),
        ("own_task_module:Half", "lacks name, system"),
        ("own_task_module:Odd", "the constructor of task 'own' raised TypeError: .*'name'"),
        (
            "own_task_module:NoFile",
            r"items\('train'\) of task 'own' raised FileNotFoundError: .*own_task_module.py, line",
        ),
        (
            "own_task_module:Texts",
            r"task 'own' has \['1 \+ 1', '1 \+ 2'\] in split 'train'; every split needs some `Item`s",
        ),
        ("own_task_module:Empty", r"task 'own' has \[\] in split 'train'; every split needs"),
        ("own_task_module:Alike", "two items with the id 'same'; ids differ within a task"),
        ("own_task_module:Plain", "composition is {'length': 1.0}; it has to be a `Composition`"),
    ]:
        with pytest.raises(UserError, match=message):
            build_tasks([own(cls)], seed=0, resources=resources)
    (tmp_path / "own_broken_module.py").write_text("class Length(:", encoding="utf-8")
    with pytest.raises(UserError, match=r"import of task 'own' raised SyntaxError: .*own_broken_module.py, line 1"):
        build_tasks([own("own_broken_module:Length")], seed=0, resources=resources)

    wrong = build_tasks([own("own_task_module:Wrong")], seed=0, resources=resources)["own"]
    for given, message in [
        ([Score({"length": Part(1.0)})], "it has to give 2 times a `Score` with length"),
        ([1.0, 0.0], "it has to give 2 times a `Score` with length"),
        ([Score({"other": Part(1.0)})] * 2, "it has to give 2 times a `Score` with length"),
        (None, "the score of task 'own' raised TypeError"),
    ]:
        sys.modules["own_task_module"].Wrong.wrong = given
        with pytest.raises(UserError, match=message):
            wrong.score(wrong.items("train")[:2], ["", ""])
    for given, message in [
        ([1.0], "the metric of task 'own' gave 1 values for 2 items"),
        ([0.5, 1.5], r"gave the value 1.5; it has to give each item one number in 0..1, or None"),
        (["good", "bad"], "the metric of task 'own' raised ValueError: .*'good'"),
    ]:
        sys.modules["own_task_module"].Wrong.wrong = given
        with pytest.raises(UserError, match=message):
            wrong.metric(wrong.items("train")[:2], ["", ""])
    sys.modules["own_task_module"].Wrong.wrong = [None, 1]
    assert wrong.metric(wrong.items("train")[:2], ["", ""]) == [None, 1.0]
    monkeypatch.delitem(sys.modules, "own_task_module")


def test_blocks_start_only_what_they_need() -> None:
    def refuse() -> MathVerifier:
        raise AssertionError("no block asked for math")

    blocks = [TaskConfig(name="q", kind="qa"), TaskConfig(name="w", kind="writing", level="tiny", system="Write.")]
    made = build_tasks(blocks, seed=0, resources=Resources(refuse, never, RubricJudge, RubricJudge))
    assert list(made) == ["q", "w"] and made["w"].system == "Write." and made["q"].max_new_tokens == 16
