"""`omni-fast`: the command line.

Exit codes: 0 done, 2 a mistake in what was given, 1 a failure, 130 stopped by the user. The first two print one message and no
traceback; a traceback is a bug of ours.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from omni_fast import config as configs
from omni_fast.cli_engine import engine_app
from omni_fast.cli_scale import scale_app
from omni_fast.cli_study import study
from omni_fast.errors import RunError, UserError

app = typer.Typer(
    help="Multi-task GRPO: hybrid rewards, tasks in the order that measured backward transfer says forgets least.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)
sandbox_app = typer.Typer(help="The jail that model-written code runs in.", no_args_is_help=True)
judge_app = typer.Typer(help="The judge that scores open-ended answers.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(sandbox_app, name="sandbox")
app.add_typer(judge_app, name="judge")
app.add_typer(engine_app, name="engine")
app.command()(study)
app.add_typer(scale_app)

console = Console(highlight=False)

Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, for example rollout.prompts_per_step=4")]
RunFolder = Annotated[Path | None, typer.Option("--run", help="Run folder; the same folder resumes.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and the plan, start nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
    name = "quickstart-tiny" if tiny else "quickstart"
    _train(name, overrides, run or Path("runs") / name, dry_run)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="TOML file or the name of a recipe.")],
    overrides: Overrides = None,
    run: RunFolder = None,
    dry_run: DryRun = False,
) -> None:
    """Train as the config says: measured curriculum, a given order, reversed, random or joint.

    Examples: `omni-fast train my.toml`, `omni-fast train quickstart curriculum.mode=joint --run runs/joint`
    """
    _train(config, overrides, run or Path("runs") / Path(config).stem, dry_run)


@app.command()
def transfer(
    config: Annotated[str, typer.Argument(help="TOML file or the name of a recipe.")],
    overrides: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Only measure: one short run per task, the transfer matrix, the best order and how sure it is.

    `train` on the same run folder goes on from there.
    Example: `omni-fast transfer quickstart --run runs/quickstart`
    """
    from omni_fast import train as driver
    from omni_fast.progress import Progress

    resolved = configs.load(config, tuple(overrides or ()))
    folder = run or Path("runs") / Path(config).stem
    if _followed(resolved):
        return
    with Progress(console) as progress:
        driver.measure(resolved, folder, progress)
    plan(folder)


@app.command()
def plan(
    run: Annotated[Path, typer.Argument(help="A run folder in which transfer is measured.")], as_json: AsJson = False
) -> None:
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
        record = outcome.result(finished)
        keys = ("order", "order_method", "order_probability", "statement", "transfer", "forecast")
        print(json.dumps({key: record[key] for key in keys}))
        return
    console.print(plan_table(solved))
    console.print(solved.statement, soft_wrap=True)


@app.command("eval")
def evaluate(
    config: Annotated[str, typer.Argument(help="TOML file or the name of a recipe: its tasks and splits are used.")],
    overrides: Overrides = None,
    model: Annotated[str, typer.Option(help="Model folder, id or name; default: the config's.")] = "",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Score a model on every task's test split.

    Example: `omni-fast eval quickstart --model runs/quickstart/final`
    """
    from omni_fast.build import build
    from omni_fast.curriculum.scores import score
    from omni_fast.progress import Progress
    from omni_fast.run import Run

    extra = (*(overrides or ()), *((f"model.path={json.dumps(model)}",) if model else ()))
    resolved = configs.load(config, extra)
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(Console(stderr=True, highlight=False)) as progress,  # the scores alone go to stdout
        Run.open(Path(folder), resolved) as empty,
        build(resolved, empty, progress) as parts,
    ):
        found = {task: parts.evaluate(task, items["test"], temperature) for task, items in parts.items.items()}
    scores = {task: score(result.values).as_dict() for task, result in found.items()}
    if as_json:
        print(json.dumps(scores))
        return
    for task, estimate in scores.items():
        console.print(
            f"{task:<12} {estimate['value']:.3f}  [{estimate['low']:.3f}, {estimate['high']:.3f}]  n={estimate['n']}"
        )


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder, finished or not.")]) -> None:
    """Write report.html again from what a run folder holds.

    Example: `omni-fast report runs/quickstart`
    """
    from omni_fast import outcome
    from omni_fast.run import Run

    console.print(f"report: {outcome.finish(Run.read(run))}", soft_wrap=True)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: Python, torch, the native module, bubblewrap, cores, memory, and what each lack costs.

    Example: `omni-fast doctor`
    """
    from omni_fast.doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings]))
        return
    for finding in findings:
        mark = "[green]ok[/green]  " if finding.ok else "[yellow]lack[/yellow]"
        console.print(f"{mark} {finding.what}: {finding.detail}")


@data_app.command("check")
def data_check(
    source: Annotated[str, typer.Argument(help="A JSON lines or parquet file, or a TOML config with jsonl tasks.")],
    overrides: Overrides = None,
) -> None:
    """Run every gold answer through its own verifier and report what would be dropped, before any training.

    Examples: `omni-fast data check questions.jsonl`, `omni-fast data check my.toml`
    """
    from omni_fast.grading import check_data

    with tempfile.TemporaryDirectory() as folder:
        for line in check_data(source, tuple(overrides or ()), Path(folder)):
            console.print(line, markup=False, soft_wrap=True)


@sandbox_app.command("self-test")
def sandbox_self_test(as_json: AsJson = False) -> None:
    """Attack the sandbox and list every attack, whether it was stopped, the active layers, and jobs/s.

    Example: `omni-fast sandbox self-test --json`
    """
    from omni_fast.rewards.sandbox.self_test import self_test

    found = json.loads(json.dumps(self_test()))
    if as_json:
        print(json.dumps(found))
    else:
        for attack in found["attacks"]:
            mark = "[green]stopped[/green]    " if attack["stopped"] else "[red]NOT STOPPED[/red]"
            console.print(f"{mark} {attack['name']}: {attack['goal']} ({attack['outcome']})")
        console.print(f"backend {found['backend']}, layers: {', '.join(found['layers'])}")
        console.print(
            f"{found['stopped']} of {found['total']} attacks stopped; {found['jobs_per_s']:.0f} jobs/s,"
            f" {found['median_ms']:.1f} ms median"
        )
    if not found["passed"]:
        raise RunError("some attacks were not stopped; do not run model-written code on this machine")


@judge_app.command("audit")
def judge_audit(
    config: Annotated[str, typer.Argument(help="TOML file or recipe: its judge and model are used.")] = "quickstart",
    overrides: Overrides = None,
    judge: Annotated[str, typer.Option(help="embedded, rubric, openai or sglang instead of the config's.")] = "",
    url: Annotated[str, typer.Option(help="Of the judge's server, for example http://127.0.0.1:30000/v1")] = "",
    model: Annotated[str, typer.Option(help="Of the judge, as its server knows it.")] = "",
    as_json: AsJson = False,
) -> None:
    """Measure the judge on good, corrupted and hack replies: position bias, ties, length bias, agreement, hacks, cost.

    Examples: `omni-fast judge audit --json`, `omni-fast judge audit --judge openai --url http://host:8000/v1 --model NAME`
    """
    from omni_fast.grading import audit_judge

    given = {"backend": judge, "url": url, "model": model}
    extra = [f"judge.{key}={json.dumps(value)}" for key, value in given.items() if value]
    stderr = Console(stderr=True, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        found = audit_judge(configs.load(config, (*(overrides or ()), *extra)), Path(folder), stderr.print)
    print(json.dumps(found.record()) if as_json else found.table())
    if not found.passed:
        raise RunError("the judge failed its audit; do not train on it")


def _train(config: str, overrides: list[str] | None, folder: Path, dry_run: bool) -> None:
    resolved = configs.load(config, tuple(overrides or ()))
    if dry_run:
        from omni_fast.dry_run import describe

        console.print(describe(resolved, folder), markup=False, soft_wrap=True)
        return
    if _followed(resolved):
        return
    from omni_fast import train as driver
    from omni_fast.progress import Progress

    with Progress(console) as progress:
        report_path = driver.train(resolved, folder, progress)
    console.print(f"result: {folder / 'result.json'}\nreport: {report_path}", soft_wrap=True)


def _followed(config: configs.Config) -> bool:
    """Under torchrun every rank but the first only helps with the optimiser steps; whether this was one."""
    if os.environ.get("RANK", "0") == "0":
        return False
    from omni_fast.build import follow

    follow(config)
    return True


def main() -> None:
    """Entry point: one message and an exit code for what is not a bug."""
    try:
        app()
    except (UserError, RunError) as error:
        _fail(f"{'error: ' if error.exit_code != 130 else ''}{error}", error.exit_code)
    except OSError as error:  # what no caller could say more about: a full or broken disk
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"error: {error.strerror or error}{where}; nothing saved is lost, the same command resumes", 1)


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True, highlight=False).print(message, markup=False, soft_wrap=True)
    sys.exit(code)
