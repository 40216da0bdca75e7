"""Checkpoints that survive a kill at any moment, and the run folder they live in.

A checkpoint is a folder `step-00000012` with named safetensors files, `state.json`, and `manifest.json` holding the
size and SHA-256 of each. It is written under a temporary name, brought to disk (fsync of files, folder and parent)
and renamed: under its own name it is complete. Older ones go only after that. Reading checks every byte against the
manifest; a checkpoint that fails is reported and the one before is taken. Nothing is ever pickled.

One process owns a run folder at a time (`run_lock`, an advisory lock that the kernel drops with the process), and a
folder belongs to one configuration (`check_config`). Limits: local or POSIX-like file systems; the lock needs
`flock`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_fast.errors import RunError, UserError

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that has passed its checksums. state: what `save` was given, numbers bit for bit."""

    step: int
    path: Path
    state: dict[str, Json]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under `name`, on the CPU. KeyError if there are none of that name."""
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            raise KeyError(name)
        return load_file(path)


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints of one run, newest last."""

    def __init__(self, folder: Path, *, keep_last: int) -> None:
        """folder: made when missing. keep_last: how many stay after a save, at least 1."""
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; give at least 1")
        self.folder = folder
        self.keep_last = keep_last

    def steps(self) -> list[int]:
        """Steps of the folders that look complete, ascending."""
        return sorted(int(path.parent.name.removeprefix("step-")) for path in self.folder.glob(f"step-*/{MANIFEST}"))

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Json]) -> Path:
        """Writes the checkpoint of `step`: one safetensors file per entry of `tensors`, and `state` as JSON.

        RunError, with everything older untouched, if the disk is full or the folder cannot be written.
        """
        target = self._path(step)
        work = self.folder / f".writing-{target.name}"
        try:
            self._sweep()
            work.mkdir(parents=True)
            for name, group in tensors.items():
                save_file(
                    {key: value.detach().contiguous() for key, value in group.items()}, work / f"{name}.safetensors"
                )
            (work / STATE).write_text(json.dumps(state), encoding="utf-8")
            files = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in work.iterdir()}
            manifest = {"format": FORMAT, "step": step, "files": files}
            (work / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in (*work.iterdir(), work):
                _to_disk(path)
            if target.exists():  # the same step again, after a fall-back to an older one
                target.rename(self.folder / f".old-{target.name}")
            work.rename(target)
            _to_disk(self.folder)
            for old in self.steps()[: -self.keep_last]:
                self._drop(self._path(old))
            self._sweep()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(work, ignore_errors=True)
            raise RunError(self._explain(step, error)) from error
        return target

    def latest(self, warn: Callable[[str], None] = _warn) -> Checkpoint | None:
        """The newest checkpoint whose bytes are right; None if there is none at all.

        Each newer one that is damaged is named through `warn`. UserError if there are checkpoints and all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            problem = _problem(self._path(step))
            if problem is None:
                state = json.loads((self._path(step) / STATE).read_text(encoding="utf-8"))
                return Checkpoint(step, self._path(step), state)
            earlier = [other for other in steps if other < step]
            remedy = f"trying the one before, of step {earlier[-1]}" if earlier else "there is none before it"
            warn(f"The checkpoint {self._path(step)} is damaged ({problem}): {remedy}.")
        if steps:
            raise UserError(
                f"All {len(steps)} checkpoints in {self.folder} are damaged: restore one from a copy, or remove that folder "
                "to start over."
            )
        return None

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _drop(self, path: Path) -> None:
        """Removes a checkpoint so that a kill half-way leaves nothing that looks complete."""
        away = self.folder / f".old-{path.name}"
        path.rename(away)
        shutil.rmtree(away)

    def _sweep(self) -> None:
        """What a killed process left."""
        for pattern in (".writing-*", ".old-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)

    def _explain(self, step: int, error: Exception) -> str:
        kept = [other for other in self.steps() if other != step]
        safe = f"the checkpoint of step {kept[-1]} is intact" if kept else "there is no earlier one"
        free = shutil.disk_usage(self.folder).free / 2**30 if self.folder.is_dir() else 0.0
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return (
            f"The checkpoint of step {step} could not be written to {self.folder} ({reason}; {free:.2f} GiB free); {safe}. "
            "Make room or permission there, and run the same command again."
        )


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _problem(path: Path) -> str | None:
    """What is wrong with the checkpoint, in a few words; None if every byte is as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version reads {FORMAT}"
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is unreadable"
    if STATE not in files:
        return f"{STATE} is missing from {MANIFEST}"
    for name, (size, digest) in files.items():
        file = path / name
        try:
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
            if _digest(file) != digest:
                return f"the checksum of {name} is wrong"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


# The run folder


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Owns the run folder while inside; makes it when missing.

    UserError if it cannot be written, or if another living process owns it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"The run folder {folder} cannot be written ({error.strerror}): give another one, or change its permissions."
        ) from error
    with handle:
        _take(handle, folder)
        yield


def _take(handle: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        raise UserError(
            f"Another process (pid {owner}) is working in the run folder {folder}: wait for it, stop it, or give another folder."
        ) from None
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()


def write_json(path: Path, value: Json | Mapping[str, Json]) -> None:
    """Replaces the file at once: a reader sees the old or the new one. RunError if the disk is full or read-only."""
    work = path.with_name(f".{path.name}.writing")
    try:
        work.write_text(json.dumps(value, indent=1), encoding="utf-8")
        _to_disk(work)
        work.replace(path)
        _to_disk(path.parent)
    except OSError as error:
        with suppress(OSError):
            work.unlink()
        raise RunError(
            f"{path} could not be written ({error.strerror}): make room or permission there, and run the same command again."
        ) from error


def check_config(folder: Path, settings: Mapping[str, Json]) -> None:
    """Binds a run folder to its settings: stores them in a new folder, compares them in an old one.

    `settings`: nested mapping of all that the result depends on. UserError that lists the differences.
    """
    path = folder / "config.json"
    if not path.is_file():
        write_json(path, dict(settings))
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(
            f"{path} is not valid JSON: give another run folder, or remove this one to start over."
        ) from None
    before, now = _flatten(stored), _flatten(json.loads(json.dumps(settings)))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        shown = "; ".join(
            f"{key} was {before.get(key, 'absent')} and is {now.get(key, 'absent')}" for key in changed[:5]
        )
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"The run folder {folder} belongs to another configuration ({shown}{more}): give another folder, or the old settings."
        )


def _flatten(value: Json, prefix: str = "") -> dict[str, str]:
    """Leaves of nested mappings and lists by dotted path, as JSON text."""
    if isinstance(value, dict) and value:
        parts: list[tuple[str, Json]] = list(value.items())
    elif isinstance(value, list) and value:
        parts = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {prefix: json.dumps(value)}
    flat: dict[str, str] = {}
    for key, item in parts:
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat
