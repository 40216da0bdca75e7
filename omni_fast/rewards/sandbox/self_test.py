"""Attack a sandbox and report: every attack, stopped or not, the layers that are active, jobs per second.

`omni-fast sandbox self-test [--json]` prints it. A normal job must succeed in every jail after each attack.
"""

from __future__ import annotations

import statistics
import time

from omni_fast.rewards.sandbox import PLAIN, Job, Limits, Sandbox
from omni_fast.rewards.sandbox.attacks import ATTACKS, stopped

FAST = Limits(cpu_s=1, wall_s=3.0)  # so that the attacks on time take a second or two each
NORMAL = Job(
    "import os\ndef double(x):\n    return [2 * x, *os.listdir('/tmp')]\n", "double", [(21,)]
)  # nothing is left


def self_test(sandbox: Sandbox | None = None, jobs: int = 200) -> dict[str, object]:
    """Run every attack on a sandbox (a started one, or one of its own) and measure its speed; plain data for JSON.

    Keys: passed, stopped, total, jobs_per_s, median_ms, attacks [{name, goal, stopped, outcome, detail}], and those of
    `Sandbox.describe`. `passed` is true when the backend isolates, every attack was stopped and
    every normal job in between succeeded. Takes about 20 s. Raises UserError where no backend works.
    """
    if sandbox is None:
        with Sandbox(limits=FAST) as own:
            return self_test(own, jobs)
    normal = NORMAL if sandbox.backend == "bwrap" else PLAIN
    limit_s = sandbox.limits.wall_s + 10.0  # on a busy machine; what stalls, stalls for ever
    rows: list[dict[str, object]] = []
    for attack in ATTACKS:
        started = time.monotonic()
        ((call,),) = sandbox.run([attack.job])
        in_time = time.monotonic() - started < limit_s
        healthy = all(reply[0].value == [42] for reply in sandbox.run([normal] * sandbox.workers))
        rows.append(
            {
                "name": attack.name,
                "goal": attack.goal,
                "stopped": stopped(attack, call) and healthy and in_time,
                "outcome": call.outcome,
                "detail": ascii(call.detail or str(call.value))[1:-1][:100],  # hostile text, shown on a terminal
            }
        )
    count, about = sum(bool(row["stopped"]) for row in rows), sandbox.describe()
    passed = count == len(rows) and about["isolated"]
    counts = {"passed": passed, "stopped": count, "total": len(rows)}
    return {**counts, **about, **speed(sandbox, jobs), "attacks": rows}


def speed(sandbox: Sandbox, jobs: int) -> dict[str, float]:
    """Jobs per second over all jails, and the median in ms of one job at a time; 10 inputs a job."""
    source = "def total(n):\n    result = 0\n    for i in range(n):\n        result += i\n    return result\n"
    job = Job(source, "total", [(n,) for n in range(10)])
    sandbox.run([job] * 10)
    started = time.perf_counter()
    sandbox.run([job] * jobs)
    together = time.perf_counter() - started
    alone = []
    for _ in range(jobs):
        started = time.perf_counter()
        sandbox.run([job])
        alone.append((time.perf_counter() - started) * 1e3)
    return {"jobs_per_s": round(jobs / together, 1), "median_ms": round(statistics.median(alone), 2)}
