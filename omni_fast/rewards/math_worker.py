"""The worker of `math_pool`: compares two answers with math-verify, in a process that may be killed at any moment.

Run as a script by path, so it needs math-verify and nothing of this project: `math_worker.py FD MEMORY_BYTES CPU_SECONDS`.
The outer process imports once (a second of work) and forks; the inner one answers requests on the inherited pipe, under
a timer of processor time that ends it even inside one long C call. The outer one then forks the next: 10 ms.
Messages in: JSON [gold, answer]. Messages out: ready, once; then ok, wrong or memory for each request, or timeout or died
from the outer process.

math-verify evaluates with sympy's parser only digits and operators; LaTeX goes through a grammar, not through eval.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache
from multiprocessing.connection import Connection


def serve(pipe: Connection, cpu_s: float) -> None:
    """Answer requests until there are no more, each within `cpu_s` seconds of processor time."""
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

    while True:
        try:
            gold, answer = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):  # the trainer is gone or has closed us
            return
        # SIGPROF is not handled, so the kernel ends the process. Processor time, because a busy machine is not the
        # answer's doing; and an orphan of a dead trainer ends by it too.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        reply = verdict(gold, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send_bytes(reply.encode("ascii"))


def quicken() -> None:
    """Let the LaTeX grammar try its fast prediction (SLL) first, full prediction (LL) where that does not read all.

    Same results, because a decision that leads to the end of the input is the one that full prediction takes too; three
    to ten times faster on short answers, where full prediction starts from nothing each time.
    Source: Parr, Harwell, Fisher, "Adaptive LL(*) Parsing", OOPSLA 2014, section 3.
    """
    from antlr4 import PredictionMode, Token
    from latex2sympy2_extended import latex2sympy2

    converter = latex2sympy2._Latex2Sympy
    create_parser, parse = converter.create_parser, converter.parse

    def create(self, text):
        self.parser = create_parser(self, text)
        self.parser._interp.predictionMode = self.mode
        return self.parser

    def two_stages(self, text):
        self.mode = PredictionMode.SLL
        with contextlib.suppress(Exception):  # whatever it is, full prediction has the last word
            result = parse(self, text)
            if self.parser.getCurrentToken().type == Token.EOF:
                return result
        self.mode = PredictionMode.LL
        return parse(self, text)

    converter.create_parser, converter.parse = create, two_stages


def main() -> None:
    pipe, memory_bytes, cpu_s = Connection(int(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    sys.set_int_max_str_digits(4300)
    from math_verify import parse, verify

    quicken()
    verify(parse("$\\frac{x}{2}$", parsing_timeout=None), parse("$0.5x$", parsing_timeout=None), timeout_seconds=None)
    gc.freeze()
    pipe.send_bytes(b"ready")
    while True:
        pid = os.fork()
        if pid == 0:
            serve(pipe, cpu_s)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
        pipe.send_bytes(b"timeout" if late else b"died")


if __name__ == "__main__":
    main()
