"""What a run stands on, looked at before it: the machine, the data, the sandbox, the judge."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from omni_fast import config as configs
from omni_fast.commands import AsJson, Overrides, console, say, stderr
from omni_fast.errors import RunError

app = typer.Typer()
data_app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)
sandbox_app = typer.Typer(help="The jail that model-written code runs in.", no_args_is_help=True)
judge_app = typer.Typer(help="The judge that scores open-ended answers.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(sandbox_app, name="sandbox")
app.add_typer(judge_app, name="judge")


@app.command()
def doctor() -> None:
    """Check this machine: Python, torch, the native module, bubblewrap, cores, memory, and what each lack costs.

    Example: `omni-fast doctor`
    """
    from omni_fast.doctor import examine

    for what, ok, detail in examine():
        mark = "[green]ok[/green]  " if ok else "[yellow]lack[/yellow]"
        console.print(f"{mark} {what}: {detail}")


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
        say(*check_data(source, tuple(overrides or ()), Path(folder)))


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
        say(f"backend {found['backend']}, layers: {', '.join(found['layers'])}")
        counts = f"{found['stopped']} of {found['total']} attacks stopped"
        say(f"{counts}; {found['jobs_per_s']:.0f} jobs/s, {found['median_ms']:.1f} ms median")
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
    resolved = configs.load(config, [*(overrides or ()), *extra])
    with tempfile.TemporaryDirectory() as folder:
        found = audit_judge(resolved, Path(folder), lambda line: say(line, to=stderr))
    print(json.dumps(found.record()) if as_json else found.table())
    if not found.passed:
        raise RunError("the judge failed its audit; do not train on it")
