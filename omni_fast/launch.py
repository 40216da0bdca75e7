"""What starts a run on one host, a Slurm cluster or Kubernetes: a script or a manifest, rendered from the run's config.

The first GPUs of the first node train, one process each under torchrun; every other GPU holds SGLang servers, each a replica of
its own. A server that dies is started again; a run that stops goes on when the same thing is submitted again. Nothing else is
promised: a trainer on several nodes is not rendered. All nodes must see the run folder under the same path.

The template engine itself quotes every value that a template prints, so that no name, path or override can become a command.
Keys are never rendered: they come from the environment, on Kubernetes from a Secret.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import urlsplit

import jinja2
import yaml

from omni_fast import config as configs
from omni_fast.config import Config
from omni_fast.errors import UserError
from omni_fast.serving.launch import KEY_VARIABLE, Launch, command, gpus_of, launches

Kind = Literal["slurm", "k8s", "local"]
PORT = 30000  # of a node's first server
JUDGE_KEY_VARIABLE = "OMNI_FAST_JUDGE_KEY"
UNPACKED_HERE = ("tiny", "smollm2-135m-instruct")  # model names that become a folder of this host's cache
MOUNT = "/data"  # of the claim, in every pod


@dataclass(frozen=True)
class Place:
    """Where to run.

    trainer_gpus: of the first node. run: the run folder; "": runs/NAME of the config, on Kubernetes below /data. lines: Slurm options such as --account=NAME.
    Kubernetes only: image, with omni_fast; server_image, with SGLang; claim, a PersistentVolumeClaim that many pods can write.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    trainer_gpus: int = 1
    run: str = ""
    lines: tuple[str, ...] = ()
    image: str = ""
    server_image: str = ""
    claim: str = ""


def render(kind: Kind, source: str, overrides: Sequence[str], place: Place) -> str:
    """The script (slurm, local) or manifest (k8s) of the config `source`, a file or a recipe. UserError if it could not run."""
    config, name, gpus = configs.load(source, tuple(overrides)), _name(source), place.gpus_per_node
    width = _server_gpus(config, place)
    # The first node's first GPUs train.
    servers = (gpus - place.trainer_gpus) // width + gpus // width * (place.nodes - 1) if width else 0
    run = os.path.expanduser(place.run) or f"{MOUNT}/runs/{name}" * (kind == "k8s") or f"runs/{name}"
    _refuse(kind, config, replace(place, run=run), width, servers)
    # torchrun starts a killed rank again and ends a stopped one after 30 s.
    ranks = f"torchrun --standalone --nproc-per-node={place.trainer_gpus} --max-restarts=3 -m -- omni_fast".split()
    trainer = ranks if place.trainer_gpus > 1 else ["omni-fast"]
    # The list of flags stays open: the script adds host and port of each server.
    flags = "engine.flags=[" + "".join(f"{json.dumps(flag)}, " for flag in config.engine.flags)
    values: dict[str, object] = asdict(place) | {
        "name": name, "source": source, "overrides": list(overrides), "run": run, "gpus": gpus, "trainer": trainer,
        "devices": ",".join(map(str, range(place.trainer_gpus))), "width": width, "servers": servers, "port": PORT,
        "key": KEY_VARIABLE, "judge_key": JUDGE_KEY_VARIABLE, "flags": flags, "mount": MOUNT,
    }  # fmt: skip
    if kind != "k8s":
        return _fill(f"{kind}.sh", _shell, values)
    # Pods share nothing but the claim.
    text = Path(source).read_text(encoding="utf-8") if Path(source).is_file() else ""
    urls = [f"http://{name}-policy-{number}.{name}-policy:{PORT}" for number in range(servers)]
    more = [f"engine.urls={json.dumps(urls)}"] if urls else []
    what = [f"/etc/omni-fast/{name}.toml" if text else source, *overrides, *more]
    launch = Launch("policy", config.model.path, "cuda", config.engine.dtype, tuple(config.engine.flags), "0.0.0.0")
    serve = _words(*command(launch, Path("python3"), PORT, None))
    train = _words(*trainer, "train", "--run", str(PurePosixPath(run)), "--", *what)
    return _fill("k8s.yaml", _yaml, values | {"config": text, "train": train, "serve": serve})


def _refuse(kind: Kind, config: Config, place: Place, width: int, servers: int) -> None:
    """UserError for what could not run there, or would print a key. width: GPUs of a server, 0: none is started."""
    launches("policy", config.model.path, "cuda", config.engine.dtype, config.engine.flags, 1)  # says no to --api-key
    urls = {url: ("engine.urls", KEY_VARIABLE) for url in config.engine.urls}
    for url, (where, variable) in (urls | {config.judge.url: ("judge.url", JUDGE_KEY_VARIABLE)}).items():
        _unless("@" not in urlsplit(url).netloc, f"{where} holds a key, which would be stored: set {variable} instead")
    pods = {"--image": place.image, "--server-image": place.server_image, "--claim": place.claim}
    wrong = ", ".join(option for option, value in pods.items() if bool(value) != (kind == "k8s"))
    run, gpus, pod, several = PurePosixPath(place.run), place.gpus_per_node, kind == "k8s", place.nodes > 1
    plain = all(re.fullmatch(r"--?[\x21-\x7e]+", line) for line in place.lines)
    _unless(plain, "a --line is one Slurm option such as --account=NAME: ASCII, no space, no line break")
    _unless(kind == "slurm" or not place.lines, "--line adds a Slurm option, so it goes with --print slurm alone")
    _unless(not wrong, f"{wrong}: --print k8s needs --image, --server-image and --claim, the others take none")
    _unless(place.trainer_gpus <= max(1, gpus), f"--trainer-gpus are of the first node, which has {gpus}")
    _unless(not several or kind != "local", "--print local is for one host, not for --nodes: use slurm or k8s")
    _unless(width or not several, "--nodes needs engine.kind=sglang without engine.urls, and --gpus-per-node")
    _unless(servers > 0 or not width, f"--gpus-per-node: no room for servers of {width} beside those that train")
    far = servers and (several or pod)
    _unless(not far or config.engine.sync != "tensor", "engine.sync 'tensor' is for one host: give engine.sync=disk")
    below = run.parts[:2] == ("/", MOUNT[1:]) and ".." not in run.parts and len(run.parts) > 2
    _unless(below or not pod, f"--run {run}: on Kubernetes the run folder is below {MOUNT}, where the claim is mounted")
    hidden = pod and servers and config.model.path in UNPACKED_HERE
    remedy = f"give a folder below {MOUNT} or a Hugging Face id"
    _unless(not hidden, f"model.path '{config.model.path}' is unpacked where other pods do not see it: {remedy}")


def _unless(fine: object, problem: str) -> None:
    if not fine:
        raise UserError(problem)


def _server_gpus(config: Config, place: Place) -> int:
    """GPUs of one server; 0 where none is to be started here: the run generates itself, has URLs, or there is no GPU."""
    if config.engine.kind == "local" or config.engine.urls or place.gpus_per_node == 0:
        return 0
    own = {flag.split("=")[0] for flag in config.engine.flags} & {"--host", "--port", "--base-gpu-id"}
    _unless(not own, f"engine.flags: {', '.join(sorted(own))} differs between servers: leave it to the script")
    return gpus_of(config.engine.flags)


def _words(*words: str) -> list[str]:
    """Of a container's command: Kubernetes would replace $(NAME), keys too, and takes $$ for a plain $."""
    return [word.replace("$", "$$") for word in words]


def _name(source: str) -> str:
    """A name that Slurm, DNS and a file system take: lower case letters, digits and dashes, at most 40."""
    return re.sub("[^a-z0-9]+", "-", Path(source).stem.lower())[:40].strip("-") or "run"


def _fill(template: str, quoted: Callable[[object], object], values: Mapping[str, object]) -> str:
    text = resources.files("omni_fast.templates").joinpath(template).read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.finalize, environment.undefined = quoted, jinja2.StrictUndefined
    return environment.from_string(text).render(values)


def _shell(value: object) -> object:
    return value if isinstance(value, int) else shlex.quote(str(value))


def _yaml(value: object) -> object:
    """A number, or a double-quoted scalar (a flow list of them) on one line."""
    if isinstance(value, list):
        return f"[{', '.join(str(_yaml(item)) for item in value)}]"
    return value if isinstance(value, int) else yaml.safe_dump(str(value), default_style='"', width=2**31).rstrip("\n")
