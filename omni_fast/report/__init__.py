"""The result of a run, checked (`result`) and as one self-contained page (`write_report`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from omni_fast.report.page import render

__all__ = ["render", "write_report"]


def write_report(
    result: Mapping[str, JsonValue],
    metrics: Sequence[Mapping[str, JsonValue]],
    samples: Sequence[Mapping[str, JsonValue]],
    path: Path,
) -> None:
    """Write report.html in one rename.

    result: what result.json holds, complete or not.   metrics: the rows of metrics.jsonl.
    samples: rows {"task", "prompt", "before", "after", "score_before", "score_after"}, "reference" optional.
    Raises OSError when the folder cannot be written; an older report then stays as it was.
    """
    page = render(result, metrics, samples).encode("utf-8", "replace")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(page)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
