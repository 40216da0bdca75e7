"""HumanEval against a sandbox: its checks run here, the function under test in the jail. Standard library only; no tests."""

import gzip
import json
import random
from pathlib import Path

from omni_fast.rewards.sandbox import Job, Sandbox

STUBS = ("None", "0", "True", "[]", "''", "(*args, None)[0]")


def passes(box: Sandbox, source: str, row: dict[str, str]) -> bool:
    """Whether the checks of a problem hold for a function that runs in the jail. A jail that fails ends it all."""

    def candidate(*args):
        ((call,),) = box.run([Job(source, row["entry_point"], [args])])
        if call.outcome == "infrastructure":
            raise SystemExit(f"the jail failed: {call.detail}")
        assert call.outcome == "ok", call
        return call.value

    names = {}
    random.seed(0)  # some checks draw their inputs
    exec(row["prompt"], names)
    names[row["entry_point"]] = candidate
    exec(row["test"], names)
    try:
        names["check"](candidate)
    except Exception:  # whatever comparing a wrong value raises
        return False
    return True


def mistakes(box: Sandbox, file: Path) -> list[str]:
    """The problems of a HumanEval file whose reference fails or for which a stub passes."""
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    assert len(rows) == 164
    wrong = [row["task_id"] for row in rows if not passes(box, row["prompt"] + row["canonical_solution"], row)]
    return wrong + [
        f"{row['task_id']}: {value}"
        for value in STUBS
        for row in rows
        if passes(box, f"def {row['entry_point']}(*args):\n    return {value}", row)
    ]
