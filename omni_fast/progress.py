"""What a person sees while a run goes on: a live panel on a terminal, plain lines anywhere else.

It always tells the stage, the step, reward and entropy per task, tokens/s, what is being waited for, and the time left.
A wait longer than `STALL_S` without news prints a line of its own, so a silent run never looks like a hung one.
"""

from __future__ import annotations

import threading
import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

from omni_fast.records import EvalRow, StepRow, TaskRow

STALL_S = 20.0  # a wait longer than this is reported
FEW_MIXED = 0.2  # share of mixed groups in a stage's first step under which there is hardly anything to learn from
SIGNS = {"drift": "length", "repeated": "repeats", "identical": "same", "stuffed": "stuffed", "disagreement": "judge?"}
STEP_S_GUESS, ITEM_S_GUESS = 4.0, 0.1  # for the time left, until the first ones are measured


class Progress:
    """Context manager; `say` and `warn` may be called from any thread, the others from the training thread only."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._rows: dict[str, dict[str, str]] = {}
        self._told: set[tuple[str, str, str]] = set()  # stage, task, sign: each is told in words once
        self._stage, self._step, self._waiting = "", "", "starting"
        self._since = self._started = time.monotonic()
        self._reported = False
        self._left = {"step": 0, "item": 0}
        self._spent = {"step": (0.0, 0), "item": (0.0, 0)}
        self._live = Live(get_renderable=self._panel, console=self.console, refresh_per_second=4, transient=True)
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._report_stalls, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live.start()
        self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._watch.join()
        if self.console.is_terminal:
            self._live.stop()

    def plan(self, *, steps: int, items: int) -> None:
        """The work that is left: optimiser steps and evaluation items."""
        self._left = {"step": steps, "item": items}

    def skip(self, *, steps: int = 0, items: int = 0) -> None:
        """Work that turned out to be done already."""
        self._left["step"] -= steps
        self._left["item"] -= items

    def resumed(self, step: int) -> None:
        """A stage goes on after this step."""
        self.skip(steps=step)
        self.say(f"  resumed after step {step}")

    def stage(self, name: str) -> None:
        self._stage, self._step = name, ""
        self.say(name, style="bold")

    def wait(self, what: str) -> None:
        """Name what the run is waiting for from now on."""
        self._waiting, self._since, self._reported = what, time.monotonic(), False

    def generating(self, tokens: int, running: int) -> None:
        """`rollout.engine.Progress` callback."""
        self.wait(f"generate: {tokens} tokens, {running} samples running")

    def step(self, row: StepRow, steps: int) -> None:
        """A finished step: a row of metrics.jsonl with per-task columns under `tasks`."""
        seconds = row["seconds"]["total"]
        self._done("step", seconds, 1)
        if bad := row["update"].get("bad_steps"):
            self.warn(
                f"step {row['step']}: the gradient was not finite, it is skipped ({bad:.0f} since the last good one)"
            )
        for name, values in row["tasks"].items():
            if row["step"] == 1 and values["mixed_groups"] < FEW_MIXED:
                self.warn(_few_mixed(name, values))
            for sign, sentence in values["signs"].items():
                if (row["stage"], name, sign) not in self._told:
                    self._told.add((row["stage"], name, sign))
                    self.warn(f"{name}: {sentence}")
            entropy = values["entropy"]
            self._rows.setdefault(name, {}).update(
                reward=f"{values['reward']:.3f}",
                entropy="–" if entropy is None else f"{entropy:.2f}",
                mixed=f"{values['mixed_groups']:.0%}",
                signs=" ".join(SIGNS[sign] for sign in values["signs"]),
            )
        step, took = f"step {row['step']}/{steps}", f"{seconds:.1f} s ({row['waited_for']})  {_overlapped(row)}"
        pace = f"{row['tokens_per_s']:.0f} tokens/s  {took}"
        self._step = f"{step}  {pace}"
        if not self.console.is_terminal:
            cells = "; ".join(self._cells(task) for task in row["tasks"])
            self.say(f"  {step}  {cells}  {pace}left {self.time_left()}")

    def evaluated(self, row: EvalRow) -> None:
        """A finished evaluation: a row of metrics.jsonl."""
        found = {task: score["value"] for task, score in row["scores"].items()}
        shown = {task: "–" if value is None else f"{value:.3f}" for task, value in found.items()}
        for task, value in shown.items():
            self._rows.setdefault(task, {})[row["split"]] = value
        self._done("item", row["seconds"], sum(score["n"] for score in row["scores"].values()))
        values = "  ".join(f"{task} {value}" for task, value in shown.items())
        self.say(f"  {row['split']} after {row['stage']}:  {values}  ({row['seconds']:.1f} s, left {self.time_left()})")

    def say(self, text: str, style: str = "") -> None:
        """Text as it is: what comes from prompts and data may look like markup ("[/INST]")."""
        self.console.print(Text(text, style), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(Text.assemble(("warning:", "yellow"), " ", text), soft_wrap=True)

    def time_left(self) -> str:
        seconds = 0.0
        for kind, guess in (("step", STEP_S_GUESS), ("item", ITEM_S_GUESS)):
            spent, count = self._spent[kind]
            seconds += max(self._left[kind], 0) * (spent / count if count else guess)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"

    def _done(self, kind: str, seconds: float, count: int) -> None:
        spent, total = self._spent[kind]
        self._spent[kind] = (spent + seconds, total + count)
        self._left[kind] -= count

    def _cells(self, task: str, *scores: str) -> str:
        """What is known of a task, with the scores of these splits."""
        row, shown = self._rows[task], ("reward", "entropy", "mixed", "signs", *scores)
        return f"{task}: " + " ".join(f"{name} {row[name]}" for name in shown if row.get(name))

    def _panel(self) -> Text:
        now = time.monotonic()
        line = f"{self._stage}  {self._step}elapsed {(now - self._started) / 60:.1f} min  left {self.time_left()}  "
        line += f"waiting for {self._waiting} ({now - self._since:.0f} s)"
        return Text("\n".join([line, *(self._cells(task, "select", "test") for task in self._rows)]))

    def _report_stalls(self) -> None:
        while not self._stop.wait(1.0):
            waited = time.monotonic() - self._since
            if waited > STALL_S and not self._reported and not self.console.is_terminal:
                self._reported = True
                self.say(f"  still waiting for {self._waiting} ({waited:.0f} s)")


def _overlapped(row: StepRow) -> str:
    """Where rollouts run ahead: what the step waited for, part by part, and how many versions behind its samples were."""
    if not row["max_staleness"]:
        return ""
    waits = " ".join(f"{part} {row['seconds'][part]:.1f}" for part in ("generate", "reward", "update", "sync"))
    return f"{waits}  behind {row['update']['staleness_mean']:.1f} of {row['max_staleness']}  "


def _few_mixed(task: str, row: TaskRow) -> str:
    """What to change where nearly all groups have equal rewards: such a group has no advantage and trains nothing."""
    if row["invalid"]:
        remedy = f"{row['invalid']} samples could not be scored ({', '.join(row['invalid_reasons'])}): look there first"
    elif row["truncated"] > 0.5:
        remedy = f"{row['truncated']:.0%} of the samples met the token limit: raise tasks.{task}.max_new_tokens"
    else:
        how = "too easy" if row["reward"] > 0.5 else "too hard"
        remedy = (
            f"the prompts may be {how} for this model (mean reward {row['reward']:.2f}): give others, or raise "
            "rollout.samples_per_prompt or rollout.temperature"
        )
    return f"{task}: only {row['mixed_groups']:.0%} of its groups have unequal rewards to learn from; {remedy}"
