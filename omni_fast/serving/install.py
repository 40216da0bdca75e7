"""The engine's own environment: SGLang and its torch in a virtual environment of the cache folder, apart from the trainer's.

    engine-0.5.17-cpu/    complete once stamp.json is there and names the pins and the Python of this installation

An installation that was killed has no stamp and is done again from empty. CPU: every package is pinned and none is
resolved, see engine-cpu.txt. CUDA: what `sglang[all]` asks for, with engine-cuda.txt as constraints; written after the
package's metadata, not tried on a GPU. `OMNI_FAST_ENGINE_PYTHON` names another Python that has SGLang, and is taken as it is.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from omni_fast.errors import RunError, UserError
from omni_fast.policy.cache import alone, cache_home

Device = Literal["cpu", "cuda"]
Say = Callable[[str], None]

VERSION = "0.5.17"
PYTHON_VARIABLE = "OMNI_FAST_ENGINE_PYTHON"
INSTALL_TIMEOUT_S = {"cpu": 1200.0, "cuda": 3600.0}
LOCK_TIMEOUT_S = 3600.0
STAMP = "stamp.json"
PR_SET_PDEATHSIG = 1  # of Linux


class Installed(NamedTuple):
    """A complete environment. `seconds` and `bytes` are of its installation."""

    folder: Path
    seconds: float
    bytes: int


def default_device() -> Device:
    """ "cuda" where the NVIDIA driver is loaded; asks no library."""
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"


def python(device: Device) -> Path:
    """The Python that runs the servers. UserError when there is none yet."""
    if given := os.environ.get(PYTHON_VARIABLE):
        if shutil.which(given) is None:
            raise UserError(f"{PYTHON_VARIABLE}={given} cannot be run: name a Python that has sglang, or unset it.")
        return Path(given)
    if found := installed(device):
        return found.folder / "bin" / "python"
    cost = "2 minutes, 1.3 GB" if device == "cpu" else "10 minutes, 10 GB"
    wanted = f"run `omni-fast engine install --{device}` (about {cost}), give engine.urls, or use the local engine"
    raise UserError(f"SGLang's environment for {device} is not installed here: {wanted}.")


def installed(device: Device) -> Installed | None:
    """The complete environment of these pins, if it is there."""
    folder = _folder(device)
    try:
        found = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # the latter: cut off by a kill or a full disk
        return None
    return Installed(folder, found["seconds"], found["bytes"]) if found["pins"] == _pins_hash(device) else None


def install(device: Device, say: Say) -> Installed:
    """Build the environment, or find it. RunError with pip's last words when it cannot be built."""
    folder, pins, started = _folder(device), _pins(device), time.monotonic()
    with alone(folder.with_name(f".{folder.name}.lock"), f"installing {folder.name}", LOCK_TIMEOUT_S, say):
        if found := installed(device):  # also by the one we waited for
            return found
        deadline = time.monotonic() + INSTALL_TIMEOUT_S[device]
        shutil.rmtree(folder, ignore_errors=True)  # of other pins, or left by a killed installation
        say(f"installing SGLang {VERSION} for {device} into {folder}")
        _run([sys.executable, "-m", "venv", str(folder)], deadline, "creating a virtual environment")
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if device == "cpu":
            _check_cpu_torch(pip, pins, deadline)
            _run([*pip, "--no-deps", "--no-compile", "-r", str(pins)], deadline, f"installing {pins.name}")
        else:
            _run([*pip, "-c", str(pins), f"sglang[all]=={VERSION}"], deadline, f"installing sglang[all]=={VERSION}")
        size, seconds = sum(path.lstat().st_size for path in folder.rglob("*")), round(time.monotonic() - started, 1)
        stamp = {"pins": _pins_hash(device), "seconds": seconds, "bytes": size}
        (folder / STAMP).write_text(json.dumps(stamp), encoding="utf-8")
        return Installed(folder, seconds, size)


def _check_cpu_torch(pip: list[str], pins: Path, deadline: float) -> None:
    """Asks pip which torch it would take, before gigabytes of CUDA come along."""
    wanted = next(line for line in pins.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    asked = [*pip, "--dry-run", "--no-deps", "--ignore-installed", "--report", "-", wanted]
    report = json.loads(_run(asked, deadline, f"looking for {wanted}"))
    wheel = report["install"][0]["download_info"]["url"].rpartition("/")[2]
    if platform.machine() == "x86_64" and "cpu" not in wheel:
        remedy = "show pip PyTorch's index of CPU builds, for example in PIP_EXTRA_INDEX_URL, and try again"
        raise UserError(f"pip would take a CUDA build of {wanted} ({wheel}) for a CPU server: {remedy}.")


def _run(command: list[str], deadline: float, what: str) -> str:
    limit = max(1.0, deadline - time.monotonic())
    # In the child before it runs: the pip of an installation that is killed must not write on into the next one's folder.
    # The function is looked up here: between fork and exec another thread's lock of the loader would never be given back.
    end_with_us = partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, stdin=subprocess.DEVNULL, preexec_fn=end_with_us
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{what} took more than its {limit:.0f} s: look at the package index, try again.") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("WARNING")]
        raise RunError(f"{what} failed: " + ("\n".join(lines[-6:]) or f"exit code {done.returncode}"))
    return done.stdout


def _folder(device: Device) -> Path:
    return cache_home() / f"engine-{VERSION}-{device}"


def _pins(device: Device) -> Path:
    return Path(__file__).with_name(f"engine-{device}.txt")


def _pins_hash(device: Device) -> str:
    text = f"{platform.python_version()} {_pins(device).read_text(encoding='utf-8')}"
    return hashlib.sha256(text.encode()).hexdigest()
