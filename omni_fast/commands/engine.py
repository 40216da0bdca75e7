"""`omni-fast engine`: SGLang's environment and servers, for runs that shall not start their own."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from omni_fast import config as configs
from omni_fast.commands import AsJson, Overrides, Source, say, stderr
from omni_fast.errors import RunError

app = typer.Typer(help="SGLang servers for policy and judge.", no_args_is_help=True)
news = partial(say, to=stderr)

Folder = Annotated[Path, typer.Option(help="Where logs and the list of running servers are.")]
DEFAULT = Path("runs/engine")


@app.command()
def install(
    cpu: Annotated[bool | None, typer.Option("--cpu/--cuda", help="No GPU, or NVIDIA's with CUDA 13.")] = None,
) -> None:
    """Build SGLang's own environment in the cache folder; neither option: for what this machine has.

    Example: `omni-fast engine install --cpu`
    """
    from omni_fast.serving import install as environments

    device = environments.default_device() if cpu is None else "cpu" if cpu else "cuda"
    done = environments.install(device, news)
    took = f"{done.bytes / 1e9:.1f} GB, installed in {done.seconds:.0f} s"
    say(f"SGLang {environments.VERSION} for {device}: {done.folder}, {took}")


@app.command()
def up(
    config: Source,
    overrides: Overrides = None,
    folder: Folder = DEFAULT,
    judge: Annotated[str, typer.Option(help="Serve this model too, as the judge: a folder or a name.")] = "",
) -> None:
    """Start the servers of the config's model and [engine], wait until they answer, print what makes a run use them.

    A key in the environment as OMNI_FAST_ENGINE_KEY is asked of every request.
    Examples: `omni-fast engine up my.toml`, `omni-fast engine up quickstart --judge smollm2-135m-instruct`
    """
    from omni_fast import serving

    resolved = configs.load(config, overrides or ())
    model = _model_folder(resolved.model.path, resolved)
    urls = serving.up(resolved.engine, model, folder, adapter_rank=resolved.adapter_rank, say=news)
    say(f"engine.urls={json.dumps(urls)}")
    if judge:
        one = resolved.engine.model_copy(update={"servers": 1})
        (url,) = serving.up(one, _model_folder(judge, resolved), folder, role="judge", say=news)
        say(f"judge.url={json.dumps(url + '/v1')}")


@app.command()
def status(folder: Folder = DEFAULT, as_json: AsJson = False) -> None:
    """Say of each server whether it is ready, starting, silent or dead, and which weights it has.

    Example: `omni-fast engine status --folder runs/engine`
    """
    from omni_fast import serving

    found = serving.status(folder)
    if as_json:
        print(json.dumps([asdict(one) for one in found]))
    elif not found:
        say(f"no servers were started in {folder}")
    for server, state, version in ((one.server, one.state, one.weight_version) for one in found if not as_json):
        weights = f", weight version {version}" if version else ""
        told = f"{server.launch.model}, SGLang {server.version or '?'}{weights}, pid {server.pid}, log {server.log}"
        say(f"{server.launch.name} {server.url} {state}: {told}")
    if any(one.state in ("dead", "silent") for one in found):
        raise RunError("not all servers answer; `omni-fast engine up` starts what is missing")


@app.command()
def down(folder: Folder = DEFAULT) -> None:
    """Stop the servers, by SIGTERM and after a while by SIGKILL.

    Example: `omni-fast engine down --folder runs/engine`
    """
    from omni_fast import serving

    say(f"{serving.down(folder, say=news)} servers stopped")


def _model_folder(name: str, config: configs.Config) -> str:
    """What SGLang loads for a model of the config: its folder, or its Hub id."""
    from omni_fast.policy import smollm2

    if name == smollm2.NAME:
        return str(smollm2.folder())
    if name == "tiny":  # made for the config's tasks at the first call
        from omni_fast.build import load_model

        return str(load_model(config)[0].name_or_path)
    return str(Path(name).expanduser())
