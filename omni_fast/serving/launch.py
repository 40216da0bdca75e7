"""What a server is started with: SGLang's command line and its environment.

Flags of the user come last and untouched, so they win over ours. Bound to 127.0.0.1 unless they say otherwise.
The API key comes from `OMNI_FAST_ENGINE_KEY` and reaches the server through a file that only this user can read: never
on a command line, which other users of the machine see.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omni_fast.errors import UserError
from omni_fast.serving.install import Device

KEY_VARIABLE = "OMNI_FAST_ENGINE_KEY"
SHIM = Path(__file__).with_name("cpu_shim")
TENSOR_PARALLEL = ("--tp", "--tp-size", "--tensor-parallel-size")
# What torchrun tells the trainer's ranks: with it a server's own process group would look for its store at torchrun's.
OF_RANKS = re.compile(r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+)")
# Attention and sampling in plain torch. The last flag bounds the key-value cache; the fraction of memory is only what SGLang
# must find free, which on a machine with other work needs room.
CPU_FLAGS = """--device cpu --attention-backend torch_native --sampling-backend pytorch --grammar-backend none
--disable-overlap-schedule --skip-server-warmup --mem-fraction-static 0.5 --max-running-requests 16
--max-total-tokens 8192""".split()


TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()  # every linear layer but the head


@dataclass(frozen=True, slots=True)
class Launch:
    """One server. Equal launches are interchangeable.

    name: in messages and of its log, for example "policy-0". model: a folder as transformers saves it, or a Hub id.
    dtype: SGLang's --dtype. flags: SGLang's own. port 0: a free one.
    """

    name: str
    model: str
    device: Device = "cpu"
    dtype: str = "auto"
    flags: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0


def launches(role: str, model: str, device: Device, dtype: str, flags: Sequence[str], servers: int) -> list[Launch]:
    """`servers` launches that differ in name, port and GPUs, counted up from `--port` and `--base-gpu-id` of the flags."""
    rest = list(flags)
    if any(flag.split("=")[0] == "--api-key" for flag in rest):
        raise UserError(f"engine.flags holds --api-key, and flags are stored: give the key as {KEY_VARIABLE} instead.")
    host, port = _take(rest, "--host") or "127.0.0.1", _take(rest, "--port") or "0"
    if not port.isdecimal() or int(port) + servers > 65536:
        raise UserError(f"engine.flags: --port {port} is no port for {servers} server(s); give 1 to {65536 - servers}.")
    spread = device == "cuda" and servers > 1
    first, gpus = ((_take(rest, "--base-gpu-id") or "0"), gpus_of(rest)) if spread else ("0", 1)
    if not first.isdecimal():
        raise UserError(f"engine.flags: --base-gpu-id {first} is no number of a GPU.")
    made = []
    for i in range(servers):
        own = ("--base-gpu-id", str(int(first) + i * gpus)) if spread else ()
        made.append(Launch(f"{role}-{i}", model, device, dtype, (*rest, *own), host, int(port) and int(port) + i))
    return made


def gpus_of(flags: Sequence[str]) -> int:
    """How many GPUs a server takes, as its flags say."""
    size = next((size for name in TENSOR_PARALLEL if (size := _take([*flags], name))), "1")
    if not re.fullmatch("[1-9][0-9]{0,3}", size):
        raise UserError(f"engine.flags: {' or '.join(TENSOR_PARALLEL)} '{size}' is no number of GPUs")
    return int(size)


def adapter_flags(rank: int, device: Device) -> list[str]:
    """What makes a server take LoRA adapters of that rank at any time; none for rank 0."""
    if not rank:
        return []
    backend = ["--lora-backend", "torch_native"] if device == "cpu" else []
    return ["--enable-lora", "--max-lora-rank", str(rank), "--lora-target-modules", *TARGETS, *backend]


def command(launch: Launch, python: Path, port: int, key_file: Path | None) -> list[str]:
    """The argument list that starts the server on `port`."""
    module = [str(python), "-m", "sglang.launch_server", "--model-path", launch.model]
    place = ["--host", launch.host, "--port", str(port)]
    key = ["--config", str(key_file)] if key_file else []
    ours = CPU_FLAGS if launch.device == "cpu" else []
    return [*module, *place, *key, "--dtype", launch.dtype, *ours, *launch.flags]


def environment(launch: Launch, inherited: Mapping[str, str]) -> dict[str, str]:
    """Of the server process: the inherited one without our key and torchrun's words; on a CPU with the import shim for
    Python's only path."""
    kept = {key: value for key, value in inherited.items() if key != KEY_VARIABLE and not OF_RANKS.fullmatch(key)}
    if Path(launch.model).is_dir():
        kept |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if launch.device == "cuda":
        return kept
    threads = inherited.get("OMP_NUM_THREADS", "1")
    return kept | {"PYTHONPATH": str(SHIM), "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": threads}


def write_key(folder: Path, launch: Launch) -> Path | None:
    """The file with the API key (mode 0600), None without a key."""
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        return None
    if "--config" in launch.flags:
        raise UserError(f"SGLang takes one --config: put api-key into it and unset {KEY_VARIABLE}, or drop the flag.")
    path = folder / f".{launch.name}-key.yaml"
    path.unlink(missing_ok=True)
    quoted = key.replace("'", "''")
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as handle:
        handle.write(f"api-key: '{quoted}'\n")
    return path


def _take(flags: list[str], name: str) -> str | None:
    """Take `name VALUE` or `name=VALUE` out of the flags."""
    for place, flag in enumerate(flags):
        key, given, value = flag.partition("=")
        if key == name:
            if not given and place + 1 == len(flags):
                raise UserError(f"engine.flags: {name} has no value.")
            value = value if given else flags.pop(place + 1)
            del flags[place]
            return value
    return None
