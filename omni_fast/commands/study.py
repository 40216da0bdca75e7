"""`omni-fast study`: all arms of a comparison by one resumable command."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from omni_fast.commands import DryRun, Overrides, RunFolder, console, run_folder, say
from omni_fast.errors import RunError, UserError

app = typer.Typer()


@app.command()
def study(
    config: Annotated[str, typer.Argument(help="TOML file or recipe with a section [study]; or: status.")],
    rest: Overrides = None,
    run: RunFolder = None,
    jobs: Annotated[int, typer.Option(min=1, help="Seeds that run side by side.")] = 1,
    dry_run: DryRun = False,
) -> None:
    """Train all arms with all seeds, score them, and compare: base, single tasks, merges, joint, orders, online.

    `omni-fast study status FOLDER` says where a study stands.
    Examples: `omni-fast study study-tiny --jobs 2`, `omni-fast study my.toml --run runs/my study.seeds=3`
    """
    if config == "status":
        return status(rest or [])
    from omni_fast.study import config as configs
    from omni_fast.study.arms import Design
    from omni_fast.study.plan import describe

    resolved, own = configs.load(config, rest or [])
    design = Design(Path(config).name.removesuffix(".toml"), resolved, own)
    folder = run_folder(run, config)
    if dry_run:
        return say(*describe(design, folder, jobs))
    from omni_fast.study import driver
    from omni_fast.study.report import write_report

    finished = driver.run(design, folder, jobs, console)
    counts = Counter[str](cell.status for cell in finished.cells)
    say(f"study: {folder}, {_counted(counts)}", f"report: {write_report(folder)}")
    if counts["failed"]:
        failed, why = f"{counts['failed']} of {len(finished.cells)} cells failed", f"`omni-fast study status {folder}`"
        raise RunError(f"{failed}; {why} says why, the same command tries them again")


def status(arguments: list[str]) -> None:
    """Every arm: how many of its seeds are finished, failed or pending, and why they failed."""
    if len(arguments) != 1:
        raise UserError("give the folder of one study: omni-fast study status FOLDER")
    from omni_fast.study import records

    found = records.read(Path(arguments[0]))
    counts: dict[str, Counter[str]] = {}
    for arm in found.arms:
        own = counts.setdefault("every order" if arm.every else arm.name, Counter())
        own.update(cell.status for cell in found.cells if cell.arm == arm.name)
    for name, own in counts.items():
        say(f"{name:<22} {_counted(own)}")
    say(f"{len(found.cells)} cells: {_counted(Counter[str](cell.status for cell in found.cells))}")
    reasons = Counter((cell.arm, cell.reason) for cell in found.cells if cell.status == "failed")
    for (name, reason), times in reasons.items():
        say(f"failed: {name} ({times} seeds): {reason}")


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[kind]} {kind}" for kind in ("finished", "failed", "pending") if counts[kind])
