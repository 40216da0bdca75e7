"""`omni-fast study`: every arm with every seed, resumable at any moment, side by side in processes where asked.

A seed is one run folder and one process at a time. Seeds share the initial policy and the items, which come from the
configuration's own seed; a training seed draws the order of the prompts and the samples. Finished policies are found by
name, so nothing finished is done again, and arms or seeds may be added to a study later. An arm that fails is written
down with its reason and the others go on; the same command tries it again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from rich.console import Console

from omni_fast import outcome
from omni_fast.build import build
from omni_fast.checkpoint import run_lock, write_json
from omni_fast.config import Config
from omni_fast.curriculum import scores
from omni_fast.curriculum.decide import decide
from omni_fast.curriculum.stages import fell_furthest
from omni_fast.curriculum.transfer import measure
from omni_fast.errors import RunError, UserError
from omni_fast.run import FINGERPRINT, Interrupted, Run, added_tasks
from omni_fast.study import records, tiny
from omni_fast.study.arms import SOLVED, Design
from omni_fast.study.arms import Path as Stages
from omni_fast.study.progress import StudyProgress
from omni_fast.study.records import Arm
from omni_fast.study.seed_run import SeedRun
from omni_fast.study.tree import EVALUATION_WORK, Tree

SINGLE = ("base", "single", "repeat", "probe")  # kinds of arms that depend on one task alone
AGAIN = "the same command goes on where it was"


def run(design: Design, folder: Path, jobs: int, console: Console) -> records.Study:
    """Run what is not finished and return the study as it then stands.

    Raises RunError when a process of seeds was lost, Interrupted when the user asked to stop; all that is finished is kept.
    """
    with run_lock(folder):
        if (folder / FINGERPRINT).is_file():
            raise UserError(f"{folder} is the folder of a training run: give the study another one with --run")
        if (folder / "study.json").is_file():
            _check(design, folder, console)
        _describe(design, folder)
        seeds = design.seeds()
        # dealt out, since the first seeds have more arms
        shares = [seeds[k::jobs] for k in range(min(jobs, len(seeds)))]
        try:
            if len(shares) == 1:
                work(design, folder, shares[0], 0, console)
            else:
                _side_by_side(design, folder, shares, console)
        finally:
            _describe(design, folder)
    return records.read(folder)


def work(design: Design, folder: Path, seeds: Sequence[int], threads: int, console: Console) -> None:
    """Run some seeds one after the other in this process. threads: 0 leaves it to the configuration."""
    config = resolved(design.config)
    if threads:
        sandbox = config.sandbox.model_copy(update={"workers": config.sandbox.workers or threads})
        config = config.model_copy(update={"threads": threads, "sandbox": sandbox})
    progress = StudyProgress(console)
    nodes = [design.nodes(seed) for seed in seeds]
    progress.left = sum(sum(own.values()) + EVALUATION_WORK * (len(own) + 1) for own in nodes)
    with progress:
        for seed in seeds:
            with SeedRun.open(folder / "seeds" / str(seed), design.run_config(seed)) as run:
                assert isinstance(run, SeedRun)
                with build(config, run, progress) as parts:
                    _Seed(folder, Tree(design, seed, run, parts, progress)).run()


def resolved(config: Config) -> Config:
    """With the study's own from-scratch model in its place."""
    if config.model.path != tiny.NAME:
        return config
    tiny.check_tasks([task.cls for task in config.tasks])
    model = config.model.model_copy(update={"path": str(tiny.model_folder(config.seed))})
    return config.model_copy(update={"model": model})


class _Seed:
    """All arms of one seed."""

    def __init__(self, folder: Path, tree: Tree) -> None:
        self.folder, self.tree = folder, tree
        self.design, self.seed, self.progress = tree.design, tree.seed, tree.progress
        self.order: tuple[str, ...] | None = None  # once solved
        self.singles = self.design.singles

    def run(self) -> None:
        arms = [arm for arm in self.design.arms() if self.seed in arm.seeds]
        for number, arm in enumerate(arms):
            self.tree.run.raise_if_stopping()
            self.tree.arm, self.tree.policies = arm.name, len(self.design.nodes(self.seed, self.order)) + 1
            try:
                path = self._path(arm)
                self.tree.reach(path, self.design.study.temperatures)
                self._write(arm, path, "finished", "")
            except Interrupted:
                raise
            except Exception as error:  # whatever ends one arm must not end the others; its trace is kept
                self._fail(arm, error)
            if not self.design.study.keep_weights:
                later = [self.design.path(other.name, self.seed, self.order) for other in arms[number + 1 :]]
                self.tree.prune([*(path for path in later if path), *self.singles.values()])

    def _path(self, arm: Arm) -> Stages:
        if arm.kind == "merge" or (arm.name in SOLVED and self.order is None):
            for single in self.singles.values():
                self.tree.reach(single)
        if arm.name in SOLVED and self.order is None:
            self._solve()
        path = self.design.path(arm.name, self.seed, self.order)
        assert path is not None
        return self._refreshed(path) if arm.kind == "refresh" else path

    def _solve(self) -> None:
        """The order from this seed's own single-task runs, on `select`."""
        base = self.tree.scores((), "select")
        single_scores = {task: self.tree.scores(path, "select") for task, path in self.singles.items()}
        for task in self.design.tasks:
            columns = [base[task], *(row[task] for row in single_scores.values())]
            if all(np.array_equal(column, columns[0]) for column in columns):
                self.progress.warn(
                    f"{task}: every policy has the same score ({scores.score(columns[0]).value:.3f}), so nothing is known of"
                    " what other tasks do to it; look at its prompts and its verifier"
                )
        draws = self.design.config.evaluation.bootstrap_draws
        decision = decide(measure(base, single_scores, draws=draws, seed=self.design.config.seed))
        self.order = decision.order
        self.progress.say(f"seed {self.seed}  {decision.statement}")

    def _refreshed(self, path: Stages) -> Stages:
        """The path with a last short stage on the task that fell furthest since its own stage, on `select`."""
        self.tree.reach(path)
        tasks, final = [stage.partition(":")[0] for stage in path], self.tree.scores(path, "select")
        own = {task: self.tree.scores(path[: place + 1], "select")[task] for place, task in enumerate(tasks)}
        after, now = ({task: scores.score(found[task]) for task in tasks} for found in (own, final))
        task = fell_furthest(after, now) or tasks[0]  # nothing fell: the oldest, for an equal budget
        return (*path, f"{task}:{self.design.config.curriculum.refresh_steps}")

    def _write(self, arm: Arm, path: Stages, status: str, reason: str) -> None:
        solved = arm.name in SOLVED

        def reached(paths: Iterable[Stages]) -> list[dict[str, Any]]:
            return [node for one in paths if (node := self.tree.run.node(self.tree.name(one))) is not None]

        parts = [path[: length + 1] for length in range(len(path))]
        nodes, others = reached(parts), reached(one for one in self.singles.values() if one not in parts)
        trained = nodes + (others if arm.kind == "merge" else [])
        items = sum(len(found["select"]) for found in self.tree.parts.items.values())
        records.write_cell(
            self.folder,
            {
                "arm": arm.name,
                "seed": self.seed,
                "status": status,
                "reason": reason,
                "order": list(self.design.order(arm.name, self.seed, self.order) or ()),
                "stages": [node["id"] for node in nodes],
                "samples_train": sum(node["samples"] for node in trained),
                "samples_transfer": sum(node["samples"] for node in others) if solved else 0,
                "completions_transfer": items * (1 + len(self.singles)) if solved else 0,
                "seconds": sum(node["seconds"] for node in trained),
            },
        )

    def _fail(self, arm: Arm, error: Exception) -> None:
        reason = str(error) or type(error).__name__
        if not isinstance(error, RunError | UserError):
            reason = f"{type(error).__name__}: {reason}"
            with (self.tree.run.folder / "failures.log").open("a", encoding="utf-8") as log:
                log.write(f"{arm.name}\n{''.join(traceback.format_exception(error))}\n")
        self.progress.warn(f"seed {self.seed}  {arm.name} failed, the others go on: {reason}")
        path = self.design.path(arm.name, self.seed, self.order) or ()
        self._write(arm, path, "failed", reason)


def _side_by_side(design: Design, folder: Path, shares: Sequence[Sequence[int]], console: Console) -> None:
    resolved(design.config)  # what all of them load is made once
    threads = max(1, (design.config.threads or len(os.sched_getaffinity(0))) // len(shares))
    spawn = multiprocessing.get_context("spawn")
    workers: list[BaseProcess] = [
        spawn.Process(target=_process, args=(design, folder, list(seeds), threads, os.getpid()), name=f"seeds {seeds}")
        for seeds in shares
    ]
    stopping = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping += 1
        for worker in workers:
            if worker.is_alive():
                worker.terminate()

    given = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when the processes start
    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for worker in workers:
            if not stopping:
                worker.start()
        while alive := [worker for worker in workers if worker.is_alive()]:
            alive[0].join(0.5)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        del os.environ["OMP_NUM_THREADS"]
        os.environ |= given
    if stopping:
        raise Interrupted(f"stopped; {AGAIN}")
    if UserError.exit_code in {worker.exitcode for worker in workers}:
        raise UserError("the study could not start, for the reason told above")
    if lost := [worker for worker in workers if worker.exitcode]:
        told = "; ".join(f"the process of {worker.name} ended with code {worker.exitcode}" for worker in lost)
        raise RunError(f"{told} (its reason is told above, if it had time for one); {AGAIN}")


def _process(design: Design, folder: Path, seeds: list[int], threads: int, parent: int) -> None:
    """A process of seeds: stops by itself, saving, when the one that started it is gone."""
    os.setpgrp()  # Ctrl-C reaches the parent alone, which tells each process once

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    try:
        work(design, folder, seeds, threads, Console(highlight=False, force_terminal=False, width=200))
    except (UserError, RunError) as error:
        if not isinstance(error, Interrupted):
            print(f"error: seeds {seeds}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _check(design: Design, folder: Path, console: Console) -> None:
    """UserError when the folder holds another study; tells what is tried again, and what is done with tasks added."""
    runs = _runs(folder)
    if not runs:
        return  # nothing is finished yet
    found = records.read(folder)
    before = Config.model_validate({k: v for k, v in found.config.items() if k != "study"}).fingerprint()
    before["tasks"] = max((run.config.fingerprint()["tasks"] for run in runs), key=len)
    now = design.config.fingerprint()
    for either, primary in ((before, found.primary), (now, design.study.primary)):  # which was declared beforehand
        either |= {"threads": 0, "study": {"primary": list(primary)}}
        if len(now["tasks"]) > len(before["tasks"]):  # these two have to fit the number of tasks
            del either["curriculum"]["order"], either["curriculum"]["refresh_steps"]
    added = added_tasks(folder, before, now)
    if failed := [f"{cell.arm} (seed {cell.seed})" for cell in found.cells if cell.status == "failed"]:
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        console.print(f"tried again, since they failed: {', '.join(failed[:5])}{more}", soft_wrap=True)
    if added:
        _keep(folder, found, f"before-{'-'.join(added)}", console)


def _keep(folder: Path, found: records.Study, name: str, console: Console) -> None:
    """Pack the study as it was; take out what depends on its list of tasks, which is another policy with a longer one."""
    if not (folder / name / records.PACKED).is_file():
        records.pack(folder, folder / name)
    again = [cell for cell in found.cells if cell.kind not in SINGLE and cell.status != "pending"]
    for cell in again:
        records.cell_file(folder, cell.arm, cell.seed).unlink(missing_ok=True)
    anew = f"; these train anew, on all tasks: {', '.join(sorted({cell.arm for cell in again}))}" if again else ""
    console.print(
        f"tasks were added: what is measured is scored on them too{anew} (as it was: {folder / name})", soft_wrap=True
    )


def _runs(folder: Path) -> list[Run]:
    """Of the seeds in which something is finished."""
    return [Run.read(path.parent) for path in sorted(folder.glob("seeds/*/state.json"))]


def _describe(design: Design, folder: Path) -> None:
    """study.json."""
    facts: dict[str, Any] = {"seconds": 0.0}
    for state in (run.state for run in _runs(folder)):
        facts |= state["facts"] | {"seconds": facts["seconds"] + state["totals"]["seconds"].get("total", 0.0)}
    whole: dict[str, Any] = {
        "name": design.name,
        "config": design.config.model_dump(mode="json") | {"study": design.study.model_dump(mode="json")},
        "tasks": design.tasks,
        "primary": list(design.study.primary),
        "temperatures": list(design.study.temperatures),
        "arms": [arm._asdict() for arm in design.arms()],
        "facts": facts | outcome.setting(),
    }
    write_json(folder / "study.json", whole)
