"""`omni-fast launch` and `omni-fast predict`: the same run on many machines, and what it would take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from omni_fast.commands import AsJson, Overrides, Source
from omni_fast.errors import UserError
from omni_fast.launch import Kind, Place, render
from omni_fast.predict.machines import MACHINES, read_shape
from omni_fast.predict.plan import Fleet, Plan, draw, plan, splits, study_steps
from omni_fast.predict.step import Work

app = typer.Typer()


@app.command()
def launch(
    config: Source,
    overrides: Overrides = None,
    kind: Annotated[Kind, typer.Option("--print", help="What to render.")] = "local",
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0)] = 8,
    trainer_gpus: Annotated[int, typer.Option(min=1, help="Of the first node; more than one by torchrun.")] = 1,
    run: Annotated[str, typer.Option(help="Run folder, which all nodes see under this path.")] = "",
    line: Annotated[list[str], typer.Option(help="Slurm: one more option, for example --account=NAME")] = [],  # noqa: B006
    image: Annotated[str, typer.Option(help="Kubernetes: of the trainer, with omni_fast.")] = "",
    server_image: Annotated[str, typer.Option(help="Kubernetes: with SGLang.")] = "",
    claim: Annotated[str, typer.Option(help="Kubernetes: a ReadWriteMany volume claim, mounted at /data.")] = "",
) -> None:
    """Print what starts the run on this host, on Slurm or on Kubernetes: some GPUs train, servers on all others generate.

    Examples: `omni-fast launch my.toml --print slurm --nodes 4 --line --account=lab > run.sh`,
    `omni-fast launch my.toml --print k8s --image trainer:1 --server-image sglang:1 --claim data > run.yaml`
    """
    place = Place(nodes, gpus_per_node, trainer_gpus, run, tuple(line), image, server_image, claim)
    typer.echo(render(kind, config, overrides or (), place), nl=False)


@app.command()
def predict(
    model_shape: Annotated[str, typer.Option(help="A folder with config.json, or a name.")] = "qwen2.5-7b",
    gpus: Annotated[int, typer.Option(min=1, max=4096)] = 8,
    machine: Annotated[Literal["h100", "h200", "b200", "cpu"], typer.Option(help="cpu: what was fitted.")] = "h100",
    trainer_gpus: Annotated[int, typer.Option(min=0, help="0: find the best split; all: in turns.")] = 0,
    server_gpus: Annotated[int, typer.Option(min=0, help="Of one replica; 0: the fewest that do.")] = 0,
    prompts: Annotated[int, typer.Option(min=1)] = 128,
    samples: Annotated[int, typer.Option(min=2)] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Mean.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Mean.")] = 1500,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where a completion is cut.")] = 8192,
    spread: Annotated[float, typer.Option(min=0.0, max=10.0, help="Standard deviation / mean of the lengths.")] = 0.7,
    mixed: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the groups whose rewards differ.")] = 1.0,
    staleness: Annotated[int, typer.Option(min=0)] = 0,
    sync_gb_s: Annotated[float, typer.Option(min=0.0, help="Of the weights to all servers; 0: as published.")] = 0.0,
    sync_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the weights that travels.")] = 1.0,
    hours_between_failures: Annotated[float, typer.Option(min=0.0, help="Of one server; 0: none fails.")] = 0.0,
    experts_stay: Annotated[bool, typer.Option(help="A trainer with expert parallelism; omni_fast has none.")] = False,
    price: Annotated[float, typer.Option(min=0.0, help="Dollars a GPU and hour.")] = 0.0,
    study: Annotated[int, typer.Option(min=0, help="Steps a stage of a study: four tasks, three seeds.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write the splits as PNG, for this staleness and for 0.")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict a step before buying it: seconds by part, memory, what limits it, and the best split of the GPUs.

    A roofline and a simulation. On GPUs nothing of it was measured by us: see docs/scale.md for what the figures rest on.
    Examples: `omni-fast predict --gpus 64 --staleness 1`, `omni-fast predict --gpus 8 --study 100 --price 2.5`
    """
    if new_tokens > max_new_tokens:
        raise UserError(f"--new-tokens {new_tokens}, the mean, is above --max-new-tokens {max_new_tokens}, the cut")
    shape, sync = read_shape(model_shape), sync_gb_s * 1e9
    fleet = Fleet(shape, machine, gpus, server_gpus, staleness, sync, sync_share, hours_between_failures, experts_stay)
    work = Work(prompts, samples, prompt_tokens, new_tokens, max_new_tokens, spread, mixed=mixed)
    if plot and (trainer_gpus or gpus == 1):
        raise UserError("--plot shows all splits: leave out --trainer-gpus, and give two GPUs or more")
    found = [plan(fleet, work, trainer_gpus)] if trainer_gpus else splits(fleet, work)
    best = min(found, key=lambda one: one.timing.step)
    if as_json:
        typer.echo(json.dumps({"best": asdict(best), "splits": [asdict(one) for one in found]}))
    else:
        typer.echo(_table(found, best, work, fleet, price, study))
    if plot:
        series = {f"staleness {staleness}": found}
        if staleness:
            series["staleness 0"] = splits(replace(fleet, staleness=0), work)
        draw(series, f"{model_shape} on {gpus} x {machine}, {prompts} x {samples} samples of {new_tokens} tokens", plot)


def _table(found: Sequence[Plan], best: Plan, work: Work, fleet: Fleet, price: float, study: int) -> str:
    rows = ["|train|servers|step s|wait|update|sync|tail|idle|stale|GB|tok/s/GPU|limit".split("|")]
    for one in found:
        part, took = str(one.trainer_gpus) if one.trainer_gpus < fleet.gpus else "turns", one.timing
        seconds = [f"{value:.1f}" for value in (took.step, took.waiting, took.update, took.sync, took.tail)]
        rate, memory = work.tokens / took.step / fleet.gpus, one.trainer_memory / 1e9
        rest = [f"{took.idle:.0%}", f"{took.staleness:.1f}", f"{memory:.0f}", f"{rate:.0f}", one.limit]
        rows.append(["*" * (one is best), part, f"{one.servers} x {one.server_gpus}", *seconds, *rest])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if best.timing.lost_tokens:
        lines.append(f"failures lose {best.timing.lost_tokens:,.0f} tokens a step")
    lines.append(f"predicted; {MACHINES[fleet.machine].source}; {fleet.share.source}")
    if fleet.machine != "cpu" and best.trainer_gpus > 1:
        lines.append("a trainer on several GPUs: see docs/scale.md for what of it exists")
    if study:
        steps = study_steps(4, study, 3)
        hours = steps * best.timing.step / 3600
        cost = f", {hours * fleet.gpus * price:,.0f} dollars" if price else ""
        spent = f"{hours:,.0f} h, {hours * fleet.gpus:,.0f} GPU hours{cost}"
        lines.append(f"study: {steps:,} steps, {spent}, evaluation not counted")
    return "\n".join(lines)
