"""A task added to what is measured: one run and 2 K + 2 evaluations, and the folder of all tasks from the start."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_study import run, written

from omni_fast import config as plain
from omni_fast import plan, train
from omni_fast.checkpoint import load_tensors
from omni_fast.errors import UserError
from omni_fast.progress import Progress
from omni_fast.run import Interrupted, Run
from omni_fast.study import records
from omni_fast.train import Trainer

pytestmark = pytest.mark.timeout(600)

THREE = ("sort", "scramble", "reverse")
CURRICULUM = "curriculum = { steps_per_stage = 3 }\n"


def measured(path: Path, folder: Path, *overrides: str) -> Run:
    with Progress(Console(file=io.StringIO())) as progress:
        train.measure(plain.load(str(path), overrides), folder, progress)
    return Run.read(folder)


@pytest.fixture(scope="module")
def configs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of a run of two tasks, and of one with a third behind them."""
    place = tmp_path_factory.mktemp("configs")
    two, three = (written(place, model, tasks=tasks, extra=CURRICULUM) for tasks in (THREE[:2], THREE))
    return two, three


@pytest.fixture(scope="module")
def from_the_start(configs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return measured(configs[1], tmp_path_factory.mktemp("start") / "run")


@pytest.fixture
def folder(configs: tuple[Path, Path], tmp_path: Path) -> Path:
    """A folder in which the two tasks are measured."""
    measured(configs[0], tmp_path / "run")
    return tmp_path / "run"


def work(rows: list[dict[str, Any]]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Steps by stage, and (policy, task) of every evaluation, `select` and `test` as one."""
    steps: dict[str, int] = {}
    for row in rows:
        if row["event"] == "step":
            steps[row["stage"]] = row["step"]
    scored = [(row["stage"], task) for row in rows if row["event"] == "eval" for task in row["scores"]]
    assert all(scored.count(pair) == 2 for pair in scored)
    return steps, list(dict.fromkeys(scored))


def test_an_added_task_costs_one_run_and_2k_plus_2_evaluations(
    configs: tuple[Path, Path], folder: Path, from_the_start: Run
) -> None:
    before = Run.read(folder).rows()
    extended = measured(configs[1], folder)
    steps, scored = work(extended.rows()[len(before) :])
    assert steps == {"single:reverse": 3}
    k = 2
    assert len(scored) == 2 * k + 2 and scored == [
        *(("base" if name == "base" else f"single:{name}", "reverse") for name in ("base", "sort", "scramble")),
        *(("single:reverse", task) for task in THREE),
    ]
    assert extended.state["evaluated"] == from_the_start.state["evaluated"]
    assert extended.state["probe"] == from_the_start.state["probe"]
    for name in ("base", *(f"single-{task}" for task in THREE)):
        own, other = (load_tensors(place.folder / "weights" / name) for place in (extended, from_the_start))
        assert all(own[key].equal(other[key]) for key in other)
    solved, same = plan.solve(extended), plan.solve(from_the_start)
    assert solved.decision == same.decision and solved.statement == same.statement


def test_killed_while_it_extends_it_goes_on(
    configs: tuple[Path, Path], folder: Path, from_the_start: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = len(Run.read(folder).rows())
    evaluate = Trainer.evaluate

    def stopped(self: Trainer, name: str, *splits: Any) -> None:
        if name == "single:scramble":
            raise Interrupted("stopped")
        evaluate(self, name, *splits)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", stopped)
        with pytest.raises(Interrupted):
            measured(configs[1], folder)
    with pytest.raises(UserError, match="sort, scramble, reverse, behind which new ones may stand, and got"):
        measured(configs[0], folder)
    extended = measured(configs[1], folder)
    steps, scored = work(extended.rows()[count:])
    assert steps == {"single:reverse": 3} and len(scored) == 6
    assert extended.state["evaluated"] == from_the_start.state["evaluated"]


@pytest.mark.parametrize(
    ("tasks", "overrides", "words"),
    [
        (
            ("sort", "reverse"),
            (),
            "has the tasks sort, scramble, behind which new ones may stand, and got sort, reverse",
        ),
        (("scramble", "sort", "reverse"), (), "and got scramble, sort, reverse"),
        (("sort", "reverse", "scramble"), (), "behind which new ones may stand"),
        (THREE, ("tasks.sort.max_new_tokens=7",), "another configuration (tasks.sort.max_new_tokens was 6 and is 7"),
        (THREE, ("optimizer.learning_rate=1e-5",), "another configuration (optimizer.learning_rate was 0.001"),
        (THREE, ("curriculum.steps_per_stage=4",), "another configuration (curriculum.steps_per_stage was 3"),
    ],
)
def test_any_other_change_is_refused_and_changes_nothing(
    model: Path, folder: Path, tmp_path: Path, tasks: tuple[str, ...], overrides: tuple[str, ...], words: str
) -> None:
    before = {path: path.read_bytes() for path in folder.glob("*.json*")}
    with pytest.raises(UserError) as caught:
        measured(written(tmp_path, model, tasks=tasks, extra=CURRICULUM), folder, *overrides)
    assert words in str(caught.value)
    assert {path: path.read_bytes() for path in folder.glob("*.json*")} == before


def test_a_curriculum_that_has_begun_takes_no_more_tasks(
    configs: tuple[Path, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Trainer, *stages: object) -> None:
        raise Interrupted("stopped")

    with monkeypatch.context() as patch, Progress(Console(file=io.StringIO())) as progress:
        patch.setattr(Trainer, "checkpoint", stopped)
        with pytest.raises(Interrupted):
            train.train(plain.load(str(configs[0])), folder, progress)
    with pytest.raises(UserError, match=r"has begun its curriculum \(curriculum:1:\w+\) without reverse"):
        measured(configs[1], folder)


def test_a_mistake_in_the_added_task_leaves_the_folder_as_it_was(
    configs: tuple[Path, Path], folder: Path, from_the_start: Run
) -> None:
    with pytest.raises(UserError, match="has no class Revers"):
        measured(configs[1], folder, "tasks.reverse.cls=omni_fast.study.tiny:Revers")
    assert measured(configs[1], folder).state["evaluated"] == from_the_start.state["evaluated"]


def test_a_study_takes_a_task_and_trains_anew_only_what_has_all_tasks(model: Path, tmp_path: Path) -> None:
    arms = ["base", "single", "user", "joint"]
    two, three = (written(tmp_path, model, arms, tasks=tasks) for tasks in (THREE[:2], THREE))
    whole, _ = run(three, tmp_path / "start")
    before, _ = run(two, tmp_path / "run", "study.keep_weights=true")
    rows = (tmp_path / "run/seeds/0/metrics.jsonl").read_text().count("\n")
    extended, told = run(three, tmp_path / "run", "study.keep_weights=true")
    assert "these train anew, on all tasks: joint, user" in told
    lines = (tmp_path / "run/seeds/0/metrics.jsonl").read_text().splitlines()[rows:]
    steps, scored = work([json.loads(line) for line in lines])
    trained = {stage.partition("-")[0]: n for stage, n in steps.items()}
    assert trained == {"reverse3": 3, "joint9": 9, "sort3+scramble3+reverse3": 3}, "the first two stages were there"
    by_policy: dict[str, list[str]] = {}
    for name, task in scored:
        by_policy.setdefault(name.partition("-")[0], []).append(task)
    assert by_policy == {
        **{name: ["reverse"] for name in ("base", "sort3", "scramble3", "sort3+scramble3")},
        **{name: list(THREE) for name in ("reverse3", "joint9", "sort3+scramble3+reverse3")},
    }
    for a, b in zip(extended.cells, whole.cells, strict=True):
        assert (a.arm, a.order, a.cost.samples_train) == (
            b.arm,
            b.order,
            b.cost.samples_train,
        ) and a.status == "finished"
        assert [node.weights for node in a.stages] == [node.weights for node in b.stages], a.arm
        assert a.final is not None and b.final is not None
        for task in THREE:
            assert a.final.scores.values["test"][task].tolist() == b.final.scores.values["test"][task].tolist()
            assert a.final.sweep[1.0].values["test"][task].tolist() == b.final.sweep[1.0].values["test"][task].tolist()
    old = records.read(tmp_path / "run/before-reverse")
    assert old.tasks == ("sort", "scramble") and [c.cost.samples_train for c in old.cells] == [
        c.cost.samples_train for c in before.cells
    ]


def test_a_study_stopped_while_it_extends_reports_what_is_there(
    model: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    two, three = (written(tmp_path, model, ["base", "single", "solved"], tasks=tasks) for tasks in (THREE[:2], THREE))
    run(two, tmp_path / "run")
    evaluate = Trainer.evaluate

    def stopped(self: Trainer, name: str, *splits: Any) -> None:
        if name.startswith("scramble"):
            raise Interrupted("stopped")
        evaluate(self, name, *splits)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", stopped)
        with pytest.raises(Interrupted):
            run(three, tmp_path / "run")
    done = cli("study", "status", str(tmp_path / "run"))
    assert done.returncode == 0 and "5 cells: 2 finished, 3 pending" in done.stdout, done.stdout + done.stderr
    extended, _ = run(three, tmp_path / "run")
    assert {cell.status for cell in extended.cells} == {"finished"}
    for overrides, words in [
        (("tasks.sort.max_new_tokens=7",), "tasks.sort.max_new_tokens was 6 and is 7"),
        (("optimizer.learning_rate=1e-5",), "another configuration .optimizer.learning_rate was 0.001 and is 1e-05"),
    ]:
        with pytest.raises(UserError, match=words):
            run(three, tmp_path / "run", *overrides)
    with pytest.raises(UserError, match="sort, scramble, reverse, behind which new ones may stand, and got"):
        run(two, tmp_path / "run")
