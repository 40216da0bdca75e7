"""Small studies on two digit tasks: to the end, stopped and killed on the way, with arms that fail."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from small_study import run, written

from omni_fast import config as plain
from omni_fast.curriculum.decide import decide
from omni_fast.curriculum.transfer import measure
from omni_fast.errors import RunError, UserError
from omni_fast.policy.update import Policy
from omni_fast.records import empty_state
from omni_fast.rollout.engine import Prompt, Sampling
from omni_fast.rollout.local import LocalEngine
from omni_fast.run import Interrupted
from omni_fast.study import config as configs
from omni_fast.study import driver, records, seed_run, tiny
from omni_fast.study.arms import Design
from omni_fast.study.records import Study
from omni_fast.study.report import write_report
from omni_fast.study.seed_run import SeedRun
from omni_fast.study.tree import Tree

pytestmark = pytest.mark.timeout(600)

PROGRAM = str(Path(sys.executable).with_name("omni-fast"))
ALL = [
    "base", "single", "joint", "solved", "reversed", "random", "user", "merge", "sft", "online", "refresh", "repeat",
    "probe", "every_order",
]  # fmt: skip
AT_STEP_4 = zlib.crc32(b"0:sort+scramble:4")  # seeds the samples of that step of joint training
FEW = ["base", "single", "joint", "solved", "merge"]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Study]:
    """config, folder, study: every arm, left alone."""
    place = tmp_path_factory.mktemp("whole")
    config = written(place, model, ALL)
    return config, place / "run", run(config, place / "run")[0]


def test_every_arm_is_finished_and_complete(whole: tuple[Path, Path, Study]) -> None:
    study = whole[2]
    assert [(cell.arm, cell.reason) for cell in study.cells if cell.status != "finished"] == []
    assert len(study.cells) == 1 + 2 + 1 + 4 + 4 + 1 + 4 + 1 + 2 + 2 + 2
    for cell in study.cells:
        assert cell.base is not None and cell.final is not None
        for node in (cell.base, *cell.stages):
            assert {task: v.size for task, v in node.scores.values["select"].items()} == {"sort": 12, "scramble": 12}
            assert {task: v.size for task, v in node.scores.values["test"].items()} == {"sort": 16, "scramble": 16}
            assert set(node.scores.entropy) == {"sort", "scramble"} and len(node.weights) == 64
        assert set(cell.final.sweep) == {1.0} and cell.final.sweep[1.0].values["test"]["sort"].size == 16


def test_full_arms_have_equal_budgets_and_transfer_is_charged_apart(whole: tuple[Path, Path, Study]) -> None:
    study = whole[2]
    budget, single = 2 * 3 * 16, 3 * 16
    for arm in (
        "joint",
        "solved",
        "reversed",
        "random",
        "user",
        "refresh",
        "sft",
        "merge:ties",
        "online:sec",
        "online:tac",
    ):
        (cell,) = study.of(arm)
        assert cell.cost.samples_train == budget, arm
        charged = {"solved": single, "reversed": single, "refresh": 2 * single}.get(arm, 0)  # the other single-task run
        assert cell.cost.samples_transfer == charged, arm
        assert cell.cost.completions_transfer == (3 * 24 if charged else 0)
    (base,) = study.of("base")
    assert base.cost.samples_train == 0 and base.final is base.base


def test_arms_that_begin_alike_share_their_policies(whole: tuple[Path, Path, Study]) -> None:
    study = whole[2]
    (user,), (same,) = study.of("user"), study.of("order:sort>scramble")
    assert user.stages == same.stages
    assert study.of("single:sort")[0].final is user.stages[0] is study.pair(0, "sort")
    assert study.pair(0, "sort", "sort") is study.of("repeat:sort")[0].final


def test_the_solved_order_is_that_of_the_select_scores(whole: tuple[Path, Path, Study]) -> None:
    study = whole[2]
    (solved,), (reverse,) = study.of("solved"), study.of("reversed")
    assert solved.base is not None
    single = {}
    for task in study.tasks:
        node = study.pair(0, task)
        assert node is not None
        single[task] = node.scores.values["select"]
    decision = decide(measure(solved.base.scores.values["select"], single, draws=100, seed=0))
    assert solved.order == decision.order == tuple(reversed(reverse.order))


def test_sketches_are_kept_of_the_first_gradients(whole: tuple[Path, Path, Study]) -> None:
    for task in ("sort", "scramble"):
        node = whole[2].pair(0, task)
        assert node is not None and node.sketch is not None and node.sketch.shape == (256,)


def test_a_packed_study_reads_the_same(whole: tuple[Path, Path, Study], tmp_path: Path) -> None:
    _, folder, study = whole
    packed = records.read(records.pack(folder, tmp_path))
    assert packed.arms == study.arms and len(packed.cells) == len(study.cells)
    for a, b in zip(packed.cells, study.cells, strict=True):
        assert (
            a.final is not None
            and b.final is not None
            and (a.arm, a.order, a.cost.seconds) == (b.arm, b.order, b.cost.seconds)
        )
        np.testing.assert_array_equal(a.final.scores.values["test"]["sort"], b.final.scores.values["test"]["sort"])


def test_the_same_command_again_trains_nothing(whole: tuple[Path, Path, Study]) -> None:
    config, folder, _ = whole
    before = {path: path.stat().st_mtime_ns for path in folder.glob("seeds/*/nodes/*.json")}
    metrics = (folder / "seeds/0/metrics.jsonl").read_bytes()
    again, told = run(config, folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before and "node" not in told
    assert (folder / "seeds/0/metrics.jsonl").read_bytes() == metrics
    assert {cell.status for cell in again.cells} == {"finished"}
    with pytest.raises(UserError, match="another configuration .optimizer.learning_rate was"):
        run(config, folder, "optimizer.learning_rate=1e-5")


def test_a_study_that_is_stopped_and_killed_ends_as_one_left_alone(
    whole: tuple[Path, Path, Study], tmp_path: Path
) -> None:
    """Ctrl-C in the middle of an online stage, kill -9 in the middle of the imitation, then to the end."""
    config, _, study = whole
    folder = tmp_path / "run"
    code, output = stopped(config, folder, signal.SIGKILL, lambda: any(folder.glob("seeds/0/checkpoints/sft*/*")))
    assert code == -signal.SIGKILL
    first = {path: path.read_bytes() for path in folder.glob("seeds/0/nodes/*.json")}
    code, output = stopped(config, folder, signal.SIGINT, lambda: any(folder.glob("seeds/0/checkpoints/online.tac*/*")))
    assert code == 130 and "the same command resumes" in output, output
    resumed, _ = run(config, folder)
    assert first and all(path.read_bytes() == text for path, text in first.items())
    assert {cell.status for cell in resumed.cells} == {"finished"}
    for a, b in zip(resumed.cells, study.cells, strict=True):
        assert (a.arm, a.order, a.cost.samples_train) == (b.arm, b.order, b.cost.samples_train)
        assert [node.weights for node in a.stages] == [node.weights for node in b.stages], a.arm


def stopped(config: Path, folder: Path, number: signal.Signals, reached: Callable[[], bool]) -> tuple[int, str]:
    """Start or resume, and send the signal as soon as `reached` holds."""
    process = subprocess.Popen(
        [PROGRAM, "study", str(config), "--run", str(folder)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )  # fmt: skip
    give_up = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < give_up
        time.sleep(0.002)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def test_seeds_side_by_side_end_as_one_after_the_other(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    design = Design("small", *configs.load(str(written(tmp_path, model, ["base", "joint"])), ["study.seeds=2"]))
    alone, together = (
        driver.run(design, tmp_path / f"jobs-{jobs}", jobs, Console(file=io.StringIO(), width=200)) for jobs in (1, 2)
    )
    weights = [[cell.final.weights for cell in study.of("joint") if cell.final] for study in (alone, together)]
    assert weights[0] == weights[1] and len(set(weights[0])) == 2
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_an_arm_that_diverges_is_reported_and_the_others_go_on(model: Path, tmp_path: Path) -> None:
    study, told = run(written(tmp_path, model, FEW, rate=1e39), tmp_path / "run")
    assert [cell.arm for cell in study.cells if cell.status == "finished"] == ["base"]
    failed = {cell.arm: cell.reason for cell in study.cells if cell.status == "failed"}
    assert set(failed) == {arm.name for arm in study.arms} - {"base"} and "diverged" in failed["joint"]
    assert "joint failed, the others go on" in told


def test_a_task_that_nothing_scores_fails_what_needs_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.Sort, "metric", lambda self, items, completions: [None] * len(items))
    study, _ = run(written(tmp_path, model, FEW), tmp_path / "run")
    by_arm = {cell.arm: cell for cell in study.cells}
    assert by_arm["solved"].status == "failed" and "no item that every checkpoint scored" in by_arm["solved"].reason
    assert by_arm["joint"].status == by_arm["merge:linear"].status == "finished"
    assert by_arm["joint"].final is not None and np.isnan(by_arm["joint"].final.scores.mean("test", "sort"))


def test_what_scores_a_task_is_repaired_and_the_same_command_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, model, FEW)
    whole, _ = run(path, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(tiny.Sort, "metric", lambda self, items, completions: [None] * len(items))
        run(path, tmp_path / "run")
        again, told = run(path, tmp_path / "run")
    lost = {"solved", "merge:task_arithmetic", "merge:ties", "merge:dare"}
    assert {cell.arm for cell in again.cells if cell.status == "failed"} == lost
    assert "tried again, since they failed: " in told and "solved (seed 0)" in told
    repaired, _ = run(path, tmp_path / "run")
    assert told_alike(repaired, whole) and {cell.status for cell in repaired.cells} == {"finished"}


def told_alike(study: Study, other: Study) -> bool:
    """Whether arms, stages and scores are equal to the bit."""
    for a, b in zip(study.cells, other.cells, strict=True):
        assert (a.arm, a.status, a.order, a.cost.samples_train) == (b.arm, b.status, b.order, b.cost.samples_train)
        assert [node.weights for node in a.stages] == [node.weights for node in b.stages], a.arm
        for own, same in zip(a.stages, b.stages, strict=True):
            for split in ("select", "test"):
                np.testing.assert_equal(own.scores.values[split], same.scores.values[split], f"{a.arm} {split}")
    return True


def test_an_arm_that_diverged_starts_again_once_its_cause_is_gone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, model, ["base", "joint"])
    whole, _ = run(path, tmp_path / "whole")
    with monkeypatch.context() as patch:
        publish = Policy._publish

        def broken(self: Policy) -> None:
            publish(self)
            for slot in self.slots:
                slot.master.fill_(np.nan)

        patch.setattr(Policy, "_publish", broken)
        failed, _ = run(path, tmp_path / "run")
    reasons = {cell.arm: cell.reason for cell in failed.cells if cell.status == "failed"}
    assert list(reasons) == ["joint"] and not list((tmp_path / "run/seeds/0/checkpoints").glob("joint*"))
    repaired, told = run(path, tmp_path / "run")
    assert "tried again, since they failed: joint (seed 0)" in told and told_alike(repaired, whole)


def test_an_engine_lost_during_an_arm_costs_that_arm_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the fourth of six steps of joint training; the arms after it have an engine again."""
    path = written(tmp_path, model, ["base", "single", "joint", "user"])
    whole, _ = run(path, tmp_path / "whole")
    start, lost = LocalEngine.start, "no server answers: http://host:30000 (connection refused)"
    with monkeypatch.context() as patch:

        class Lost:
            def wait(self, progress: object = None) -> None:
                raise RunError(lost)

            def cancel(self) -> None: ...

        def broken(self: LocalEngine, prompts: Sequence[Prompt], n: int, sampling: Sampling, *rest: Any) -> object:
            return Lost() if sampling.seed == AT_STEP_4 else start(self, prompts, n, sampling, *rest)

        patch.setattr(LocalEngine, "start", broken)
        partial, told = run(path, tmp_path / "run")
    assert "joint failed, the others go on: no server answers" in told
    states = {cell.arm: cell.status for cell in partial.cells}
    assert states.pop("joint") == "failed" and set(states.values()) == {"finished"} and len(states) == 4
    write_report(tmp_path / "run")
    for text in ((tmp_path / "run" / name).read_text() for name in ("report.html", "summary.md")):
        assert "not finished" in text.lower() and "joint (seed 0)" in text and "no server answers" in text
    repaired, _ = run(path, tmp_path / "run")
    assert told_alike(repaired, whole)
    rows = (json.loads(line) for line in (tmp_path / "run/seeds/0/metrics.jsonl").read_text().splitlines())
    joint = [row["step"] for row in rows if row["event"] == "step" and row["stage"].startswith("joint")]
    assert joint == [1, 2, 3, 4, 5, 6], "from the third step on, which was saved when the engine was lost"


@pytest.mark.parametrize(
    ("values", "words"),
    [([7.0] * 12, "gave the value 7"), ([1.0], "gave 1 values for 12 items"), ([-0.5] * 12, "gave the value -0.5")],
)
def test_a_metric_that_is_no_score_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[float], words: str
) -> None:
    monkeypatch.setattr(tiny.Sort, "metric", lambda self, items, completions: values)
    study, told = run(written(tmp_path, model, ["base", "joint"]), tmp_path / "run")
    assert {cell.status for cell in study.cells} == {"failed"} and f"the metric of task 'sort' {words}" in told
    assert "it starts from the initial policy, which failed" in told


def test_a_seed_that_is_gone_is_pending(whole: tuple[Path, Path, Study], tmp_path: Path) -> None:
    part = shutil.copytree(whole[1], tmp_path / "part", ignore=shutil.ignore_patterns("weights", "seeds"))
    assert {cell.status for cell in records.read(part).cells} == {"pending"}
    write_report(part)
    assert "is not measured yet" in (part / "summary.md").read_text()


def test_a_constant_score_is_told(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.Sort, "metric", lambda self, items, completions: [1.0] * len(items))
    study, told = run(written(tmp_path, model, ["base", "single", "solved"]), tmp_path / "run")
    assert "sort: every policy has the same score (1.000)" in told
    assert {cell.status for cell in study.cells} == {"finished"}


def test_the_primary_contrast_stays_as_it_was_declared(whole: tuple[Path, Path, Study]) -> None:
    config, folder, _ = whole
    with pytest.raises(UserError, match=r"study.primary.0 was \"solved\" and is \"sft\""):
        run(config, folder, 'study.primary=["sft", "joint"]')


def test_a_damaged_file_is_named_and_made_again(whole: tuple[Path, Path, Study], tmp_path: Path) -> None:
    config, folder, study = whole
    for pattern in ("seeds/0/nodes/online*.json", "cells/joint-s0.json", "study.json"):
        part = shutil.copytree(folder, tmp_path / pattern[:5])
        path = next(part.glob(pattern))
        path.write_text("")
        with pytest.raises(
            UserError, match=f"{path.name} is damaged.*: remove it, and the same command makes it again"
        ):
            run(config, part)
        path.unlink()
        assert told_alike(run(config, part)[0], study)
    (part / "seeds/0/state.json").write_text("")
    with pytest.raises(UserError, match="state.json is damaged"):
        run(config, part)


def test_the_folder_of_a_training_run_is_no_study(model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "fingerprint.json").write_text("{}")
    with pytest.raises(UserError, match="is the folder of a training run"):
        run(written(tmp_path, model, ["base", "joint"]), tmp_path / "run")


def test_weights_that_were_half_removed_are_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = SeedRun(tmp_path, plain.load("quickstart-tiny"), empty_state())
    seed.keep_weights("joint", {"w": torch.zeros(2)})

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if folder.is_dir():
            (folder / "manifest.json").unlink()
            raise Interrupted("killed")

    with monkeypatch.context() as patch:
        patch.setattr(seed_run.shutil, "rmtree", killed)
        with pytest.raises(Interrupted):
            seed.drop_weights("joint")
    assert not seed.has_weights("joint")
    seed.keep_weights("joint", {"w": torch.ones(2)})
    seed.drop_weights("joint")
    assert not seed.has_weights("joint") and not list(tmp_path.glob(".dropped"))


def test_a_sampled_evaluation_that_fails_costs_its_arm_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Tree._sweep

    def broken(self: Tree, path: tuple[str, ...], missing: Any) -> None:
        if path == ("sort:3",):
            raise RunError("no judge answers")
        sweep(self, path, missing)

    monkeypatch.setattr(Tree, "_sweep", broken)
    study, _ = run(written(tmp_path, model, ["base", "single", "user"]), tmp_path / "run")
    assert [(cell.arm, cell.reason) for cell in study.cells if cell.status != "finished"] == [
        ("single:sort", "no judge answers")
    ]


def test_a_probe_that_fails_at_another_temperature_leaves_the_next_arms_theirs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, warm = written(tmp_path, model, ["base", "single", "joint"]), "study.temperatures=[2.0]"
    whole, _ = run(path, tmp_path / "whole", warm)
    with monkeypatch.context() as patch:
        measure = Policy.measure

        def broken(self: Policy, rows: Sequence[Any]) -> Any:
            if self.inv_temperature == 0.5:
                raise RunError("out of memory")
            return measure(self, rows)

        patch.setattr(Policy, "measure", broken)
        failed, _ = run(path, tmp_path / "run", warm)
    assert {cell.status for cell in failed.cells} == {"failed"}
    assert told_alike(run(path, tmp_path / "run", warm)[0], whole)


def test_names_of_tasks_in_any_script_and_a_seed_taken_out(model: Path, tmp_path: Path) -> None:
    path = written(tmp_path, model, ["base", "single"])
    path.write_text(path.read_text().replace('"sort"', '"排序"').replace('"scramble"', '"打乱"'))
    study, _ = run(path, tmp_path / "run", "study.seeds=2")
    assert (
        {cell.status for cell in study.cells} == {"finished"} and len(study.cells) == 6 and set(study.nodes) == {0, 1}
    )
    fewer, _ = run(path, tmp_path / "run")
    assert len(fewer.cells) == 3 and set(fewer.nodes) == {0}, "a seed taken out says nothing of transfer either"


def test_status_tells_what_is_missing(
    cli: Callable[..., subprocess.CompletedProcess[str]], whole: tuple[Path, Path, Study], tmp_path: Path
) -> None:
    done = cli("study", "status", str(whole[1]))
    assert done.returncode == 0 and "24 cells: 24 finished" in done.stdout, done.stdout + done.stderr
    part = shutil.copytree(whole[1], tmp_path / "part", ignore=shutil.ignore_patterns("weights"))
    (part / "cells" / "joint-s0.json").unlink()
    missing = cli("study", "status", str(part))
    assert "24 cells: 23 finished, 1 pending" in missing.stdout, missing.stdout + missing.stderr
    nothing = cli("study", "status", str(tmp_path))
    assert nothing.returncode == 2 and "holds no study" in nothing.stderr
