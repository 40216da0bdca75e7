"""Checkpoints that survive a kill at any moment, and the run folder they live in.

A checkpoint is a folder `000012-NAME` (numbered in the order of writing) with `tensors.safetensors` (of several ranks,
a file each), `state.json` and `manifest.json`, which holds size and SHA-256 of the others. It is written under a temporary
name, brought to disk (fsync of files, folder and parent) and renamed: under its own name it is complete. Older ones go only
after that.
Reading checks every byte against the manifest; a checkpoint that fails is reported and the one before is taken.
Nothing is ever pickled.

One process owns a run folder at a time (`run_lock`, an advisory lock that the kernel drops with the process), and a
folder belongs to one configuration (`differences`). Limits: POSIX file systems with `flock`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_fast.errors import RunError, UserError

TENSORS = "tensors.safetensors"
MANIFEST = "manifest.json"
STATE = "state.json"

Contents = Mapping[str, Tensor] | Callable[[Path], None]
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that has passed its checksums. state: the JSON that `save` was given, floats bit for bit."""

    path: Path
    state: dict[str, Any]


def save(folder: Path, name: str, tensors: Contents, state: Mapping[str, Json], *, keep_last: int) -> Path:
    """Writes a new checkpoint into `folder` (made when missing), then removes all but the newest `keep_last`.

    tensors: by name, or a function that writes safetensors files into the folder it is given. `name` is for people; order
    is that of writing. RunError, with everything older untouched, if the disk is full or the folder cannot be written.
    """
    for left in (*folder.glob(".writing-*"), *folder.glob(".old-*")):  # by a killed process
        shutil.rmtree(left)
    numbers = [int(path.name.split("-")[0]) for path in _numbered(folder)]
    target = folder / f"{max(numbers, default=0) + 1:06d}-{name}"
    with published(target) as work:
        _write(work, tensors, state)
    for old in _numbered(folder)[:-keep_last]:
        _drop(old)
    return target


def latest(folder: Path, warn: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint whose bytes are right; None if there is none at all.

    Each newer one that is damaged is named through `warn`. UserError if there are checkpoints and all are damaged.
    """
    paths = _numbered(folder)[::-1]
    for path, before in zip(paths, [*paths[1:], None], strict=False):
        if not (problem := _problem(path)):
            return Checkpoint(path, json.loads((path / STATE).read_text(encoding="utf-8")))
        remedy = f"trying the one before, {before.name}" if before else "there is none before it"
        warn(f"The checkpoint {path} is damaged ({problem}): {remedy}.")
    if paths:
        raise UserError(f"All {len(paths)} checkpoints in {folder} are damaged: restore one from a copy, or remove it.")
    return None


def save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Makes `folder` hold these tensors, with checksums, all at once. RunError if the disk is full or read-only."""
    with published(folder) as work:
        _write(work, tensors, {})


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """What `save_tensors` or `save` wrote, onto the CPU. UserError if it is missing or damaged."""
    if problem := _problem(folder):
        raise UserError(f"The weights in {folder} are damaged ({problem}): restore them from a copy, or start over.")
    return load_file(folder / TENSORS)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """RunError if the disk is full or read-only."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        place = target.parent
        free = f"{shutil.disk_usage(place).free / 2**30:.2f} GiB free" if place.is_dir() else "no such folder"
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(
            f"{target} could not be written ({reason}; {free}); what was saved before is intact. "
            "Make room or permission there, and run the same command again."
        ) from error


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """A folder to write into, which gets the name `target` when it is whole and on disk, in the place of what had it before.

    RunError if the disk is full or read-only; what was there before is then as it was.
    """
    work = target.with_name(f".writing-{target.name}")
    try:
        with writing(target):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            yield work
            for path in (*work.iterdir(), work):
                _to_disk(path)
            if target.exists():
                _drop(target)
            work.rename(target)
            _to_disk(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(work: Path, tensors: Contents, state: Mapping[str, Json]) -> None:
    """Everything of a checkpoint, its manifest last."""
    if isinstance(tensors, Mapping):
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, work / TENSORS)
    else:
        tensors(work)
    (work / STATE).write_text(json.dumps(state), encoding="utf-8")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in work.iterdir()}
    (work / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def _numbered(folder: Path) -> list[Path]:
    """The folders that look complete, oldest first."""
    return sorted(path.parent for path in folder.glob(f"[0-9]*-*/{MANIFEST}"))


def _drop(path: Path) -> None:
    """Removes a folder so that a kill half-way leaves nothing that looks complete."""
    away = path.with_name(f".old-{path.name}")
    shutil.rmtree(away, ignore_errors=True)  # of a kill in here
    path.rename(away)
    shutil.rmtree(away)


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
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, told in files.items():
            size = (path / name).stat().st_size
            if size != told["bytes"]:
                return f"{name} has {size} bytes instead of {told['bytes']}"
            if _digest(path / name) != told["sha256"]:
                return f"the checksum of {name} is wrong"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is unreadable"
    return None if STATE in files and len(files) > 1 else f"{MANIFEST} lists {sorted(files)}"


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
        raise UserError(f"The run folder {folder} cannot be written ({error.strerror}): give another one.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            owner = f"Another process (pid {handle.read().strip() or 'unknown'})"
            raise UserError(f"{owner} is working in {folder}: wait for it, stop it, or give another folder.") from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def write_json(path: Path, value: Json | Mapping[str, Json]) -> None:
    """Replaces the file at once: a reader sees the old or the new one. RunError if the disk is full or read-only."""
    work = path.with_name(f".{path.name}.writing")
    with writing(path):
        work.write_text(json.dumps(value, indent=1), encoding="utf-8")
        _to_disk(work)
        work.replace(path)
        _to_disk(path.parent)


def differences(before: Json, now: Json) -> list[str]:
    """What was changed between two nested values, as "optimizer.learning_rate was 2e-05 and is 0.5"."""
    old, new = _flatten(before), _flatten(now)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [f"{key} was {old.get(key, 'absent')} and is {new.get(key, 'absent')}" for key in changed]


def _flatten(value: Json, prefix: str = "") -> dict[str, str]:
    """Leaves of nested mappings and lists by dotted path, as JSON text."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inside = (_flatten(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in parts)
    return {key: text for flat in inside for key, text in flat.items()} or {prefix: json.dumps(value)}
