"""From a config to a run folder, and what a run folder tells: quickstart, train, transfer, plan, eval, report."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from omni_fast import config as configs
from omni_fast.commands import AsJson, DryRun, Overrides, RunFolder, Source, console, run_folder, say, stderr
from omni_fast.errors import UserError

app = typer.Typer()
Begun = Annotated[Path, typer.Argument(help="A run folder, finished or not.")]


@app.command()
def quickstart(
    overrides: Overrides = None,
    tiny: Annotated[bool, typer.Option(help="A from-scratch model of < 1M parameters, under 3 minutes.")] = False,
    run: RunFolder = None,
    dry_run: DryRun = False,
) -> None:
    """Run the whole method on four real tasks with SmolLM2-135M-Instruct on this machine's CPU.

    Examples: `omni-fast quickstart`, `omni-fast quickstart --tiny`, `omni-fast quickstart curriculum.steps_per_stage=20`
    """
    train("quickstart-tiny" if tiny else "quickstart", overrides, run, dry_run)


@app.command()
def train(config: Source, overrides: Overrides = None, run: RunFolder = None, dry_run: DryRun = False) -> None:
    """Train as the config says: measured curriculum, a given order, reversed, random or joint.

    Examples: `omni-fast train my.toml`, `omni-fast train quickstart curriculum.mode=joint --run runs/joint`
    """
    resolved, folder = configs.load(config, overrides or ()), run_folder(run, config)
    if dry_run:
        from omni_fast.dry_run import describe

        say(describe(resolved, folder))
    elif _driven("train", resolved, folder):
        say(f"result: {folder / 'result.json'}", f"report: {folder / 'report.html'}")


@app.command()
def transfer(config: Source, overrides: Overrides = None, run: RunFolder = None) -> None:
    """Only measure: one short run per task, the transfer matrix, the best order and how sure it is.

    `train` on the same run folder goes on from there.
    Example: `omni-fast transfer quickstart --run runs/quickstart`
    """
    resolved, folder = configs.load(config, overrides or ()), run_folder(run, config)
    if not resolved.curriculum.measures_transfer:
        mode = resolved.curriculum.mode
        raise UserError(f"{config}: curriculum.mode '{mode}' measures no transfer; give curriculum.mode=curriculum")
    if _driven("measure", resolved, folder):
        plan(folder)


@app.command()
def plan(run: Begun, as_json: AsJson = False) -> None:
    """Solve the order from a run's measured transfer: the order, its forecast, how far ahead of the second best.

    Example: `omni-fast plan runs/quickstart`
    """
    from omni_fast import outcome
    from omni_fast.plan import solve
    from omni_fast.report.tables import plan_table
    from omni_fast.run import Run

    finished = Run.read(run)
    solved = solve(finished)
    if as_json:
        record, keys = outcome.result(finished), "order order_method order_probability statement transfer forecast"
        return print(json.dumps({key: record[key] for key in keys.split()}))
    console.print(plan_table(solved))
    say(solved.statement)


@app.command("eval")
def evaluate(
    config: Source,
    overrides: Overrides = None,
    model: Annotated[str, typer.Option(help="Model folder, id or name; default: the config's.")] = "",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Score a model on the test split of each of the config's tasks.

    Example: `omni-fast eval quickstart --model runs/quickstart/final`
    """
    from omni_fast.build import build
    from omni_fast.curriculum.scores import score
    from omni_fast.progress import Progress
    from omni_fast.run import Run

    given = [f"model.path={json.dumps(model)}"] if model else []
    resolved = configs.load(config, [*(overrides or ()), *given])
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(stderr) as progress,  # the scores alone go to stdout
        Run.open(Path(folder), resolved) as empty,
        build(resolved, empty, progress, trains=False) as parts,
    ):
        found = {task: parts.evaluate(task, items["test"], temperature) for task, items in parts.items.items()}
    scores = {task: score(result.values).as_dict() for task, result in found.items()}
    if as_json:
        return print(json.dumps(scores))
    for task, one in scores.items():
        value, low, high = (f"{one[key]:.3f}" if one[key] is not None else "–" for key in ("value", "low", "high"))
        say(f"{task:<12} {value}  [{low}, {high}]  n={one['n']}")


@app.command()
def report(run: Begun) -> None:
    """Write report.html again from what a run folder holds.

    Example: `omni-fast report runs/quickstart`
    """
    from omni_fast import outcome
    from omni_fast.run import Run

    say(f"report: {outcome.finish(Run.read(run))}")


def _driven(how: Literal["train", "measure"], config: configs.Config, folder: Path) -> bool:
    """Under torchrun every rank but the first only helps with the optimiser steps, and has nothing to tell."""
    if os.environ.get("RANK", "0") != "0":
        from omni_fast.build import follow
        from omni_fast.run import read_json

        state = folder / "state.json"
        if how == "measure" or not state.is_file() or not read_json(state)["finished"]:
            follow(config)  # rank 0 of a finished run would never call
        return False
    from omni_fast import train as driver
    from omni_fast.progress import Progress

    with Progress(console) as progress:
        getattr(driver, how)(config, folder, progress)
    return True
