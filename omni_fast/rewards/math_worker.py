"""The worker of `math_pool`: compares two answers with math-verify, in a process that may be killed at any moment.

Run as a script by path, so it needs math-verify and nothing of this project. The outer process imports once (a second
of work) and forks; the inner one answers requests on the inherited pipes. When it is killed, the outer one forks the
next: 10 ms. Lines out: `ready PID` from every new inner process, then one of ok, wrong, memory per request. Lines in:
JSON [gold, answer].

math-verify evaluates with sympy's parser only texts of digits and operators; LaTeX goes through a grammar, not through
eval.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache

ORPHAN_S = 60  # a request whose host has died ends itself after this; a living host kills far earlier


def serve() -> None:
    """Answer requests until the input ends."""
    from math_verify import parse, verify

    @lru_cache(maxsize=4096)
    def parse_gold(text: str) -> list[object]:
        return parse(f"${text}$", parsing_timeout=None)

    def verdict(gold: str, answer: str) -> str:
        try:
            right = verify(parse_gold(gold), parse(f"${answer}$", parsing_timeout=None), timeout_seconds=None)
        except MemoryError:
            return "memory"
        except Exception:  # noqa: BLE001 -- a parser fed by an adversary raises anything; none of it is a right answer
            return "wrong"
        return "ok" if right else "wrong"

    sys.stdout.write(f"ready {os.getpid()}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        gold, answer = json.loads(line)
        signal.alarm(ORPHAN_S)  # unhandled, so it ends the process even inside one long C call
        sys.stdout.write(verdict(gold, answer) + "\n")
        sys.stdout.flush()
        signal.alarm(0)


def main() -> None:
    memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    sys.set_int_max_str_digits(4300)
    from math_verify import parse, verify

    verify(parse("$\\frac{x}{2}$", parsing_timeout=None), parse("$0.5x$", parsing_timeout=None), timeout_seconds=None)
    gc.freeze()
    while True:
        pid = os.fork()
        if pid == 0:
            serve()
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return  # the input ended: the trainer is gone or has closed us


if __name__ == "__main__":
    main()
