"""`omni-fast launch` and `omni-fast predict`: the same run on many machines, and what it would take."""

from __future__ import annotations

from typing import Annotated

import typer

from omni_fast.launch import Kind, Place, render

scale_app = typer.Typer()

Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, for example engine.kind=sglang")]


@scale_app.command()
def launch(
    config: Annotated[str, typer.Argument(help="TOML file or the name of a recipe.")],
    overrides: Overrides = None,
    kind: Annotated[Kind, typer.Option("--print", help="What to render.")] = "local",
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0)] = 8,
    run: Annotated[str, typer.Option(help="Run folder, which all nodes see under this path.")] = "",
    line: Annotated[
        list[str] | None, typer.Option(help="Slurm: one more #SBATCH option, for example --account=NAME")
    ] = None,
    image: Annotated[str, typer.Option(help="Kubernetes: of the trainer, with omni_fast.")] = "",
    server_image: Annotated[str, typer.Option(help="Kubernetes: with SGLang.")] = "",
    claim: Annotated[str, typer.Option(help="Kubernetes: a ReadWriteMany volume claim, mounted at /data.")] = "",
) -> None:
    """Print what starts the run on this host, on Slurm or on Kubernetes: one GPU trains, servers on all others generate.

    Examples: `omni-fast launch my.toml --print slurm --nodes 4 --line --account=lab > run.sh`,
    `omni-fast launch my.toml --print k8s --image trainer:1 --server-image sglang:1 --claim data > run.yaml`
    """
    place = Place(nodes, gpus_per_node, run, tuple(line or ()), image, server_image, claim)
    typer.echo(render(kind, config, overrides or (), place), nl=False)
