"""A scoreboard: contenders answer one question on one case, interleaved, and each gets a row of JSON.

A peer is plugged in by a `Contender`: a name, a role and `build(case)`, which makes its inputs and returns a `Run`. Contenders
take turns in every round, so a slow minute of the machine hits all of them alike; the row holds the median, the spread, the peak
memory of one call, and two ratios of medians: to the best peer (how many times faster, > 1 is better) and to the limit (which
share of the limit's speed, 1 is the limit). The limit is a contender too, measured in the same rounds.

Results go to benchmarks/results/<machine>.json, one row for each (question, case, dtype, contender); a new run replaces the rows
of its own cases and leaves the others. What is no row, such as rates of several kinds in one run, is noted in `Figures`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch

RESULTS = Path(__file__).parent / "results"
CaseT = TypeVar("CaseT")


class Unavailable(Exception):
    """A contender that cannot run here: the message says why."""


@dataclass(frozen=True)
class Run:
    """One contender on one case. `call` is timed; `reset` restores its inputs before each call and is not."""

    call: Callable[[], object]
    reset: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Contender(Generic[CaseT]):
    """name: of the row. role: "ours", "peer" (counts for ratio_to_best_peer), "context" (another task: listed, not compared) or
    "limit". build: makes the inputs; raises Unavailable."""

    name: str
    role: Literal["ours", "peer", "context", "limit"]
    build: Callable[[CaseT], Run]


@dataclass(frozen=True)
class Row:
    question: str
    case: str
    dtype: str
    contender: str
    role: str
    seconds: float  # median
    seconds_low: float
    seconds_high: float
    rounds: int
    peak_bytes: int | None  # above what was resident before the call; None where the system does not tell
    ratio_to_best_peer: float | None
    ratio_to_limit: float | None
    versions: dict[str, str]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of a benchmark, whose docstring is its help."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def options(doc: str | None, rounds: int) -> argparse.Namespace:
    """rounds, output: what the benchmarks that fill `Figures` are told."""
    known = parser(doc)
    known.add_argument("--rounds", type=int, default=rounds)
    known.add_argument("--output", type=Path)
    return known.parse_args()


def processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def machine() -> str:
    """A name for the results file: processor, cores it has here."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions(*packages: str) -> dict[str, str]:
    """Of Python, and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


class Figures:
    """Numbers by name, one for each round, and the load of the machine before the first."""

    def __init__(self) -> None:
        self.load = os.getloadavg()[0]
        self.seen: dict[str, list[float]] = defaultdict(list)

    def note(self, name: str, value: float) -> None:
        self.seen[name].append(value)

    def rate(self, name: str, count: float, work: Callable[..., object], *given: object) -> None:
        """How many of `count` a second, when `work(*given)` does them."""
        started = time.perf_counter()
        work(*given)
        self.note(name, count / (time.perf_counter() - started))

    def spreads(self) -> dict[str, dict[str, float]]:
        return {name: spread(values) for name, values in self.seen.items()}

    def show(self, remarks: Mapping[str, str]) -> None:
        for name, of in self.spreads().items():
            print(f"{name:52} {of['median']:12,.3f}   ({of['low']:,.3f} .. {of['high']:,.3f})  {remarks.get(name, '')}")

    def save(self, path: Path | None, packages: Sequence[str] = (), **more: object) -> None:
        """Nothing without a path."""
        if path is None:
            return
        cpu = {"cpu": processor(), "cores": len(os.sched_getaffinity(0)), "load": self.load}
        known = versions(*packages) | {"kernel": platform.release()}
        rounds = max(map(len, self.seen.values()))
        write(path, {"machine": cpu, "versions": known, "rounds": rounds, "results": self.spreads()} | more)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def median_seconds(call: Callable[[], object], repeats: int = 9) -> float:
    """After one call that warms up."""
    call()
    return statistics.median(timed(call) for _ in range(repeats))


def peak_bytes(run: Run) -> int | None:
    """Resident memory that one call adds at its peak (Linux: the high-water mark, reset before)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.call()
        return torch.cuda.max_memory_allocated() - before
    marks = Path("/proc/self/clear_refs")
    if not marks.exists():
        return None
    before = resident()
    marks.write_text("5")
    run.call()
    return max(0, status("VmHWM") - before)


def resident() -> int:
    """Bytes, without what was freed and not yet given back: it would hide what the next call takes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def status(field: str) -> int:
    """Bytes, of /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def compete(
    question: str,
    case: CaseT,
    case_name: str,
    dtype: str,
    contenders: Sequence[Contender[CaseT]],
    rounds: int,
    versions: dict[str, str],
) -> tuple[list[Row], list[str]]:
    """Runs every contender that can run, `rounds` times each in turn, after one warm-up that also measures memory.

    Returns their rows, and the names of those that failed.
    """
    torch.compiler.reset()  # here and not between contenders, who would lose what they compiled
    runs: dict[str, tuple[Contender[CaseT], Run]] = {}
    peaks: dict[str, int | None] = {}
    failed: list[str] = []
    for contender in contenders:
        try:
            run = contender.build(case)
            run.reset()
            run.call()  # compiles what compiles
            run.reset()
            peaks[contender.name] = peak_bytes(run)
            runs[contender.name] = (contender, run)
        except Unavailable as reason:
            print(f"  {contender.name}: not here ({reason})")
        except Exception as error:  # whatever it is, the other contenders are still worth measuring
            print(f"  {contender.name}: {type(error).__name__}: {error}"[:600])
            failed.append(contender.name)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (_, run) in runs.items():
            run.reset()
            seconds[name].append(timed(run.call))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    of_role = {role: [medians[name] for name, (c, _) in runs.items() if c.role == role] for role in ("peer", "limit")}
    best_peer, limit = (min(values, default=None) for values in of_role.values())
    rows = []
    for name, (contender, _) in runs.items():
        of, low, high = spread(seconds[name]).values()
        ratios = best_peer / of if best_peer else None, limit / of if limit else None
        rows.append(
            Row(question, case_name, dtype, name, contender.role, of, low, high, rounds, peaks[name], *ratios, versions)
        )
    return rows, failed


_HEAD_START = 2_000_000  # cycles, about a millisecond


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call; on a GPU between two events on its stream, which begins a little late: launches are ahead of it."""
    if torch.cuda.is_available():
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def show(rows: Sequence[Row]) -> None:
    if not rows:
        return
    print(f"{rows[0].question}  {rows[0].case}  {rows[0].dtype}")
    for row in sorted(rows, key=lambda row: row.seconds):
        peer = f"{row.ratio_to_best_peer:6.2f}x best peer" if row.ratio_to_best_peer else " " * 17
        limit = f"{row.ratio_to_limit:6.2f} of the limit" if row.ratio_to_limit else ""
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:8.0f} MiB"
        spread = f"{row.seconds_low * 1e3:.1f}..{row.seconds_high * 1e3:.1f}"
        print(f"  {row.contender:44} {row.seconds * 1e3:9.1f} ms  ({spread:>15}) {memory}  {peer}  {limit}")


def save(rows: Sequence[Row] | Sequence[dict[str, object]], path: Path | None = None) -> Path:
    """Merges rows into the machine's results file."""
    path = path or RESULTS / f"{machine()}.json"
    new = [asdict(row) if isinstance(row, Row) else row for row in rows]
    asked = {_key(row) for row in new}
    old = json.loads(path.read_text()) if path.exists() else []
    kept = [row for row in old if _key(row) not in asked] + new
    write(path, sorted(kept, key=lambda row: (*_key(row), str(row["contender"]))))
    return path


def _key(row: dict[str, object]) -> tuple[str, ...]:
    return tuple(str(row.get(field)) for field in ("question", "case", "dtype"))
