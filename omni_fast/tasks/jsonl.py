"""A task from a file: one declarative block (docs/tasks.md) names the columns, the prompt template and the verifier.

Every gold answer is run through its own verifier at load time. An item whose gold does not score 1, or for which a
reply that answers nothing (empty, the prompt again, a stub function) scores above 0, would teach the wrong thing: it is
dropped and reported. Fixed columns, by verifier: qa reads `candidates` and `aliases` (lists, optional); code reads
`entry` (function name) and `tests` (list of {"args": [...], "expected": ...}), its answer is a reference solution;
judge reads `words` (list, optional). A column `id` names the items; without one the line number does.
Splits are drawn by the seed over distinct prompts: 70 % train, 10 % select, 20 % test.
Limits: the whole file is read into memory.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omni_fast.config import TaskConfig
from omni_fast.errors import UserError
from omni_fast.rewards.code import Case, Tests, extract_code
from omni_fast.rewards.compose import Composition
from omni_fast.rewards.judge.base import Reply
from omni_fast.rewards.score import Part, Score
from omni_fast.rewards.text_checks import gate, strip_reasoning
from omni_fast.tasks.base import Item, Json, Resources, Split, Task, words_of
from omni_fast.tasks.files import Row, read_rows
from omni_fast.tasks.qa import matcher
from omni_fast.tasks.splits import partition

PART = {"math": "correct", "qa": "correct", "code": "tests", "judge": "preference"}
_PLACE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_ -]*)\}")
_MIN_ITEMS = 10
_EXAMPLES = 3  # of dropped items in a message


@dataclass(frozen=True, slots=True, order=True)
class Dropped:
    """An item that was left out. line: of the file. reason: "gold:REASON", "stub:WHICH", "duplicate" or "row"."""

    line: int
    reason: str
    text: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a check of a file found. kept: number of items that stay."""

    file: str
    verifier: str
    kept: int
    dropped: Sequence[Dropped]

    def lines(self) -> list[str]:
        """For people: the counts by reason, with examples."""
        few = f": too few, a task needs at least {_MIN_ITEMS} usable items" if self.kept < _MIN_ITEMS else ""
        passed = f"{self.file}: {self.kept} items pass their own verifier ({self.verifier})"
        text = [f"{passed}, {len(self.dropped)} dropped{few}"]
        for reason, count in Counter(drop.reason for drop in self.dropped).most_common():
            examples = [drop for drop in self.dropped if drop.reason == reason][:_EXAMPLES]
            text += [f"  {count} x {reason}", *(f"    line {drop.line}: {drop.text}" for drop in examples)]
        return text


class FileTask:
    """The items of a file behind the `Task` interface; what its own verifier refuses is left out and in `report`."""

    def __init__(self, block: TaskConfig, seed: int, resources: Resources) -> None:
        """Raises UserError when the file is unreadable or lacks a column. With too few usable items it has none."""
        self.name, self.system, self.max_new_tokens = block.name, block.system or "", block.max_new_tokens
        self.verifier, self.resources = block.verifier, resources
        self.composition = Composition("additive", {PART[self.verifier]: 1.0})
        rows = read_rows(block.file)
        source = _gold_source(block, {column for _, row in rows for column in row})
        items: list[tuple[int, Item]] = []
        dropped: list[Dropped] = []
        seen: set[tuple[str, str]] = set()
        for line, row in rows:
            try:
                item = _item(line, row, block, source)
            except (ValueError, UserError) as error:
                dropped.append(Dropped(line, "row", str(error)))
                continue
            if seen & (own := {("id", item.id), ("prompt", item.prompt)}):
                dropped.append(Dropped(line, "duplicate", _short(f"{item.id}: {item.prompt}")))
            else:
                seen |= own
                items.append((line, item))
        kept: list[Item] = []
        for (line, item), reason in zip(items, self._refusals([item for _, item in items]), strict=True):
            if reason:
                dropped.append(Dropped(line, reason, _short(f"{item.prompt} -> {item.answer['gold']}")))
            else:
                kept.append(item)
        self.report = Report(block.file, self.verifier, len(kept), sorted(dropped))
        self._items: Mapping[Split, Sequence[Item]] = {}
        if len(kept) >= _MIN_ITEMS:
            rng = random.Random(f"jsonl:{self.name}:{seed}")
            self._items = partition(kept, {"train": 0.7, "select": 0.1, "test": 0.2}, rng)

    def items(self, split: Split) -> Sequence[Item]:
        return self._items[split]

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[Score]:
        return [Score({PART[self.verifier]: part}) for part in self._grade(items, completions)]

    def metric(self, items: Sequence[Item], completions: Sequence[str]) -> list[float | None]:
        values = [part.value for part in self._grade(items, completions, metric=True)]
        if self.verifier == "code":
            return [None if value is None else float(value == 1.0) for value in values]
        return values

    def _refusals(self, items: Sequence[Item]) -> list[str]:
        """Why each item is dropped, or ""."""
        golds = [str(item.answer["gold"]) for item in items]
        if self.verifier == "judge":  # a reference is a bar, not a truth: it must pass the gates that replies meet
            refused = [
                gate(i.prompt, strip_reasoning(gold), words_of(i.answer)) for i, gold in zip(items, golds, strict=True)
            ]
            return [f"gold:{reason}" if reason else "" for reason in refused]
        reasons = ["" if part.value == 1.0 else f"gold:{part.reason}" for part in self._grade(items, golds)]
        stubs = {"empty": [""] * len(items), "prompt": [item.prompt for item in items]}  # replies that answer nothing
        if self.verifier == "code":
            for name, value in (("none", "None"), ("echo", "values[0]")):
                stubs[name] = [f"def {item.answer['entry']}(*values):\n    return {value}" for item in items]
        for name, replies in stubs.items():
            paid = [bool(part.value) for part in self._grade(items, replies)]
            reasons = [reason or f"stub:{name}" * hit for reason, hit in zip(reasons, paid, strict=True)]
        return reasons

    def _grade(self, items: Sequence[Item], completions: Sequence[str], metric: bool = False) -> list[Part]:
        if self.verifier == "math":
            return self.resources.math().score(completions, [str(item.answer["gold"]) for item in items])
        if self.verifier == "code":
            tests = [_tests(item.answer) for item in items]
            sources = [extract_code(text, test.entry) for text, test in zip(completions, tests, strict=True)]
            return self.resources.code().score(sources, tests)
        pairs = zip(items, completions, strict=True)
        if self.verifier == "judge":
            judge = (self.resources.metric_judge if metric else self.resources.reward_judge)()
            return judge.judge([Reply(i.prompt, text, str(i.answer["gold"]), words_of(i.answer)) for i, text in pairs])
        return [matcher(item.answer).score(text) for item, text in pairs]


def load_task(block: TaskConfig, seed: int, resources: Resources) -> Task:
    """The task of a block. Raises UserError when the file is unreadable or too little of it is usable."""
    task = FileTask(block, seed, resources)
    if not task._items:
        shown = "\n".join(task.report.lines())
        raise UserError(f"task '{block.name}' cannot be trained, correct its data:\n{shown}")
    return task


def check(block: TaskConfig, *, resources: Resources) -> Report:
    """Run every gold answer of a file through its own verifier."""
    return FileTask(block, 0, resources).report


def guess_block(path: str) -> TaskConfig:
    """A block for a file whose columns have usual names, so that a file can be checked before a config exists."""
    rows = [row for _, row in read_rows(path)]
    columns = {column for row in rows for column in row}
    prompt = next((name for name in ("prompt", "question", "instruction", "problem") if name in columns), None)
    answer = next((name for name in ("answer", "gold", "solution", "canonical_solution") if name in columns), "")
    if prompt is None or not (answer or "reference" in columns):
        raise UserError(
            f"'{path}' has the columns {sorted(columns)}; rename those of prompt and answer to 'prompt' and 'answer'"
        )
    numbers = all(re.search(r"\d\W*$", str(row.get(answer, ""))) for row in rows)
    verifier = "code" if "tests" in columns else "judge" if "reference" in columns else "math" if numbers else "qa"
    fields = {"prompt": f"{{{prompt}}}", "answer": answer, "reference": "reference", "verifier": verifier}
    return TaskConfig.model_validate({"name": "data", "kind": "jsonl", "file": path, **fields})


def _gold_source(block: TaskConfig, columns: set[str]) -> str:
    """Column or template of the gold answer. Raises UserError for what the block names and the columns lack."""
    task, shown = f"task '{block.name}'", sorted(columns)
    key = "reference" if block.verifier == "judge" else "answer"
    source = str(getattr(block, key))
    if not _PLACE.search(block.prompt):
        raise UserError(f"{task}: prompt '{block.prompt}' has no {{column}} place; the columns are {shown}")
    if not source:
        raise UserError(f"{task}: verifier '{block.verifier}' needs `{key}`, the column of the gold answer")
    wanted = {*_PLACE.findall(block.prompt), *(_PLACE.findall(source) or [source])}
    wanted |= {"entry", "tests"} if block.verifier == "code" else set()
    if missing := sorted(wanted - columns):
        raise UserError(f"{task}: '{block.file}' has no column {', '.join(missing)}; its columns are {shown}")
    return source


def _item(line: int, row: Row, block: TaskConfig, source: str) -> Item:
    """Raises ValueError or UserError saying what is wrong with the row."""
    answer: dict[str, Json] = {"gold": _fill(source, row) if _PLACE.search(source) else _text(row, source)}
    for column in {"qa": ("candidates", "aliases"), "judge": ("words",)}.get(block.verifier, ()):
        values = row.get(column) or []
        if not isinstance(values, list) or not all(isinstance(value, str | int | float) for value in values):
            raise ValueError(f"column {column!r} must be a list of texts")
        answer[column] = values
    if block.verifier == "code":
        answer |= {"entry": _text(row, "entry"), "tests": row.get("tests")}
        _tests(answer)
    if block.verifier == "qa":
        matcher(answer)
    prompt = _fill(block.prompt, row)
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return Item(str(row.get("id") or f"line-{line}"), prompt, answer)


def _fill(template: str, row: Row) -> str:
    return _PLACE.sub(lambda match: _text(row, match.group(1)), template)


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(f"column {column!r} is missing or empty")
    return str(value)


def _tests(answer: Mapping[str, Json]) -> Tests:
    cases = []
    for test in tests if isinstance(tests := answer["tests"], list) else ():
        match test:
            case {"args": list(arguments), "expected": expected}:
                cases.append(Case(tuple(arguments), expected))  # type: ignore[arg-type]
            case _:
                raise ValueError('every test must be {"args": [...], "expected": ...}')
    if not cases:
        raise ValueError('column \'tests\' must be a list of {"args": [...], "expected": ...}')
    return Tests(str(answer["entry"]), tuple(cases))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."
