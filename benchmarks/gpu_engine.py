"""How fast do weights reach a real SGLang server, does it then sample from the policy, how fast, and how quickly does it sleep?

    python benchmarks/gpu_engine.py [--output FILE] [--budget-s 540]     on a GPU
    python benchmarks/gpu_engine.py --small                              a tiny model, on any machine: shows that it runs

Random weights in the shapes of a 0.6B and a 7B model; the policy and its server share the GPU. A server starts without
weights and gets them from the policy, so nothing is downloaded. Measured: the seconds of a weight sync by phase, each
transport in turn, medians over rounds; the mismatch of log-probs between server and policy (bf16 on both sides); tokens a
second; how long the server's memory is given back and taken again, and how much that is.
A part that fails is written down with its reason and costs no other part; the file is written after each; parts for which
no time is left are named. SGLang is taken from `omni-fast engine install`, or from OMNI_FAST_ENGINE_PYTHON.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import scoreboard  # noqa: E402
from benchmarks.train.random_model import SHAPES  # noqa: E402
from benchmarks.train.worker import message  # noqa: E402
from omni_fast import serving  # noqa: E402
from omni_fast.rollout.engine import Prompt, Sample, Sampling  # noqa: E402
from omni_fast.rollout.fleet import Fleet  # noqa: E402
from omni_fast.rollout.sglang import SGLangEngine  # noqa: E402
from omni_fast.sync import Transport, WeightSync  # noqa: E402

TARGETS = {"0.6B sync": 0.2, "7B sync": 1.0, "pause": 0.1}  # seconds on one H200
Numbers = dict[str, object]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """What is asked of each server."""

    rounds: int
    prompts: int
    n: int
    tokens: int


@dataclass
class Served:
    """A server, and the policy whose weights it gets."""

    url: str
    model: LlamaForCausalLM
    folder: Path
    started_s: float

    @contextmanager
    def engine(self, transport: Transport) -> Iterator[SGLangEngine]:
        fleet = Fleet([self.url], in_flight=256, say=print)
        weights = WeightSync(fleet, self.model, self.folder / "weights", transport=transport)
        try:
            yield SGLangEngine(fleet, weights, request_s=120, wait_s=10)
        finally:
            weights.close()
            fleet.close()


@contextmanager
def server(model: Path, dtype: str, *flags: str, memory: str = "0.4", timeout_s: float = 200) -> Iterator[str]:
    """The URL of a server of the model in a folder, without its weights. memory: its share of a GPU's.

    The end of its log is printed where it did not start or does not answer in the end.
    """
    device = DEVICE if DEVICE == "cuda" else serving.install.default_device()
    flags = ("--load-format", "dummy", "--skip-tokenizer-init", "--log-level", "warning", *flags)
    if device == "cuda":
        flags += ("--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none",
                  "--mem-fraction-static", memory)  # fmt: skip
    launch = serving.Launch("policy-0", str(model), device, dtype, flags)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            (started,) = serving.start([launch], folder, timeout_s=timeout_s, say=print)
            yield started.url
        except SystemExit:  # this program is told to end, and has seconds
            serving.kill(folder)
            raise
        finally:
            if [status.state for status in serving.status(folder)] != ["ready"]:
                for log in folder.glob("*.log"):
                    print(f"the end of {log.name}:\n{log.read_text(errors='replace')[-4000:]}", flush=True)
            serving.down(folder)


@contextmanager
def served(size: str, *flags: str) -> Iterator[Served]:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = LlamaConfig(
            **SHAPES[size], max_position_embeddings=4096, dtype=name, architectures=["LlamaForCausalLM"]
        )
        config.save_pretrained(folder)
        torch.manual_seed(0)
        with torch.device(DEVICE):
            # Not by `to`, which rounds the frequencies of RoPE too.
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        started = time.perf_counter()
        with server(folder, name, *flags) as url:
            yield Served(url, model, folder, time.perf_counter() - started)


def sync(place: Served, case: Case, transport: Transport) -> Numbers:
    """Seconds by phase; the first one, with what is made once, apart."""
    seen = scoreboard.Figures()
    with place.engine(transport) as engine:
        for version in range(1, case.rounds + 1):
            with torch.no_grad():
                for parameter in place.model.parameters():
                    parameter.mul_(1.001)
            for phase, seconds in engine.sync(version).items():
                seen.note(phase, seconds)
        if not engine.fleet.ready:
            raise RuntimeError(engine.fleet.reasons())
    size, spreads = sum(value.nbytes for value in place.model.parameters()), seen.spreads()
    rate = size / spreads["seconds/sync_total"]["median"]
    checked = "version and 2 tensors each time"
    return spreads | {"GB": round(size / 1e9, 2), "GB/s": round(rate / 1e9, 2), "checked": checked}


def asked(case: Case, vocabulary: int) -> list[Prompt]:
    draw = torch.Generator().manual_seed(1)
    return [
        Prompt(torch.randint(3, vocabulary, (64,), generator=draw).tolist(), place) for place in range(case.prompts)
    ]


@torch.no_grad()
def parity(place: Served, case: Case, by: Transport) -> Numbers:
    """The server's log-probs of its samples less the policy's own, in nats."""
    prompts = asked(case, place.model.config.vocab_size)[:8]
    gaps: list[torch.Tensor] = []
    with place.engine(by) as engine:
        groups = engine.generate(prompts, 2, Sampling(max_new_tokens=min(case.tokens, 64)))
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            gaps.append(torch.tensor(sample.logprobs) - own(place.model, prompt, sample))
    gap = torch.cat(gaps)
    k3 = (gap.neg().exp() - 1 + gap).mean()
    return {"tokens": float(len(gap)), "mean |gap|": float(gap.abs().mean()), "max |gap|": float(gap.abs().max()), "k3": float(k3)}  # fmt: skip


def own(model: LlamaForCausalLM, prompt: Prompt, sample: Sample) -> torch.Tensor:
    tokens = torch.tensor([[*prompt.tokens, *sample.tokens]], device=model.device)
    rows = model(input_ids=tokens).logits[0, len(prompt.tokens) - 1 : -1].float().log_softmax(-1)
    return rows.gather(1, tokens[0, len(prompt.tokens) :, None])[:, 0].cpu()


def speed(place: Served, case: Case, by: Transport) -> Numbers:
    prompts, sampling = asked(case, place.model.config.vocab_size), Sampling(max_new_tokens=case.tokens)
    seen = []
    with place.engine(by) as engine:
        for _ in range(3):  # the first one compiles
            started = time.perf_counter()
            groups = engine.generate(prompts, case.n, sampling)
            tokens = sum(len(sample.tokens) for group in groups for sample in group)
            seen.append(tokens / (time.perf_counter() - started))
    return {"tokens/s": round(max(seen)), "first round": round(seen[0]), "samples": float(case.prompts * case.n)}


def sleep(place: Served, case: Case, by: Transport) -> Numbers:
    """Seconds and memory; samples after it are of the policy again, or it fails."""
    seen = scoreboard.Figures()
    with place.engine(by) as engine:
        for version in range(1, case.rounds + 1):
            before = free_bytes()
            seen.note("sleep_s", scoreboard.timed(engine.sleep))
            seen.note("freed GB", (free_bytes() - before) / 1e9)
            seen.note("wake_and_sync_s", scoreboard.timed(partial(engine.sync, version)))
        if not engine.fleet.ready:
            raise RuntimeError(engine.fleet.reasons())
    return seen.spreads() | parity(place, case, by)


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else 0


class Record:
    """Parts by name, in the file after each."""

    def __init__(self, output: Path | None, budget_s: float) -> None:
        self.output, self.end = output, time.monotonic() + budget_s
        self.by: Transport = "tensor"  # how the other parts bring the weights: "disk" where memory cannot be shared
        known = scoreboard.versions("torch", "transformers")
        self.content: Numbers = {"machine": scoreboard.machine(), "versions": known, "targets": TARGETS}

    def part(self, name: str, work: Callable[[], Numbers], needs_s: float = 20.0) -> bool:
        """Whether it was measured."""
        found: Numbers
        if time.monotonic() + needs_s > self.end:
            found = {"left out": "no time"}
        else:
            try:
                found = work()
            except Exception as error:  # whatever it is, the other parts are still worth measuring
                found = {"error": message(error)}
        print(f"{name}: {json.dumps(found)}", flush=True)
        self.content[name] = found
        if self.output is not None:
            scoreboard.write(self.output, self.content)
        return not {"error", "left out"} & found.keys()


def measure(record: Record, size: str, case: Case, label: str, flags: tuple[str, ...], full: bool) -> None:
    """All parts that one server serves; a server that does not start is a part of its own."""
    with ExitStack() as stack:
        place: list[Served] = []

        def start() -> Numbers:
            place.append(stack.enter_context(served(size, *flags)))
            return {"seconds": round(place[0].started_s, 1)}

        if not record.part(f"{label} start", start, needs_s=90):
            return
        if "--enable-memory-saver" in flags:
            record.part(f"{label} sleep", lambda: sleep(place[0], case, record.by))
            return
        if full:
            alone = (
                DEVICE == "cuda" and torch.cuda.device_count() < 2
            )  # NCCL takes a GPU once: not for trainer and server
            transports: tuple[Transport, ...] = ("tensor", "disk") if alone else ("tensor", "disk", "distributed")
            for transport in transports:
                # By disk each round writes all weights, and waits until they are there.
                of = replace(case, rounds=2) if transport == "disk" else case
                worked = record.part(f"{label} sync {transport}", lambda by=transport, of=of: sync(place[0], of, by))  # type: ignore[misc]
                if transport == "tensor" and not worked:
                    record.by = "disk"
            record.part(f"{label} parity", lambda: parity(place[0], case, record.by))
            if DEVICE == "cpu":  # nothing to give back, and no server of its own for that
                record.part(f"{label} sleep", lambda: sleep(place[0], case, record.by))
        record.part(f"{label} speed", lambda: speed(place[0], case, record.by))


def main() -> None:
    parser = scoreboard.parser(__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if not options.small and DEVICE == "cpu":
        raise SystemExit("gpu_engine.py measures a GPU, and PyTorch sees none here: --small runs a tiny model anywhere")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left
    record = Record(options.output, options.budget_s)
    eager = ("--disable-cuda-graph",) if DEVICE == "cuda" else ()  # first what is least likely to fail
    if options.small:
        case = Case(rounds=2, prompts=4, n=2, tokens=16)
        measure(record, "tiny", case, "small", eager, full=True)
        if DEVICE == "cuda":
            measure(record, "tiny", case, "small, saver", (*eager, "--enable-memory-saver"), full=True)
        return
    case = Case(rounds=7, prompts=64, n=8, tokens=256)
    measure(record, "0.6B", case, "0.6B", eager, full=True)
    measure(record, "7B", case, "7B", eager, full=True)
    measure(record, "0.6B", case, "0.6B, saver", (*eager, "--enable-memory-saver"), full=True)
    measure(record, "0.6B", case, "0.6B, CUDA graphs", (), full=False)
    measure(record, "7B", case, "7B, CUDA graphs", (), full=False)


if __name__ == "__main__":
    main()
