"""Seconds and bytes of the parts of one optimiser step, from arithmetic and memory traffic (a roofline with fitted shares).

Sources: 2 FLOPs a weight and token forward, 4 backward (Kaplan et al., arXiv 2001.08361); decoding reads all weights and the
cache of every row once a token. Left out: pipeline bubbles, expert load imbalance, host work that overlaps. Not to be confused
with `curriculum.predict`, which forecasts scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from omni_fast.predict.machines import Efficiency, Machine, Shape

WEIGHT = 2  # bytes of a working weight
STATE = 18  # bytes a trained weight: fp32 master, gradient sum, two moments, bf16 copy (docs/training.md)
OPTIMISER_TRAFFIC = 30  # bytes a trained weight: AdamW reads four fp32 numbers and writes three, and the bf16 copy
ACTIVATION = 52  # bytes a row, layer and hidden unit (docs/training.md: 30 KB for SmolLM2-135M)
# Rows of a micro-batch of one GPU, and whether its activations are computed again instead of kept: the first that fits.
MICROBATCHES = ((16384, False), (8192, False), (16384, True), (4096, True), (1024, True))
USABLE = 0.88  # of a GPU's memory
GPUS_PER_NODE = 8
NETWORK_SHARE = 0.7  # of a link's sheet that collectives reach
ALL_REDUCE_S = (15e-6, 60e-6)  # of a small one inside a node and beyond (assumed); tensor parallelism has two a layer
RUNNING = 256  # samples that a server decodes at a time, at most


@dataclass(frozen=True)
class Work:
    """One step's samples. Lengths in tokens: new_tokens is the mean, max_new_tokens the cut; spread: standard deviation / mean
    of the uncut lengths. shared: a group's prompt is computed once. forwards: passes besides the update's own. mixed: share of
    the groups whose rewards differ; the others cost no update."""

    prompts: int
    samples: int
    prompt_tokens: float
    new_tokens: float
    max_new_tokens: int
    spread: float = 0.7
    shared: bool = True
    forwards: int = 0
    mixed: float = 1.0

    @property
    def batch(self) -> int:
        return self.prompts * self.samples

    @property
    def tokens(self) -> float:
        return self.batch * self.new_tokens

    @property
    def rows(self) -> float:
        """Tokens the update computes."""
        return self.mixed * (self.tokens + self.prompt_tokens * (self.prompts if self.shared else self.batch))


@dataclass(frozen=True)
class _GPUs:
    shape: Shape
    machine: Machine
    share: Efficiency
    gpus: int


@dataclass(frozen=True)
class Server(_GPUs):
    """One engine replica on `gpus` GPUs."""

    def decode_s(self, rows: float, context: float) -> float:
        """One decoding step of `rows` samples whose caches hold `context` tokens together."""
        shape = self.shape
        read = WEIGHT * (shape.read_weights(rows) + shape.kv_numbers * context)
        flops = 2 * (shape.active_body + shape.head) * rows + shape.attention_flops * context
        inside = self.gpus <= GPUS_PER_NODE
        rate, latency = (self.machine.link, ALL_REDUCE_S[0]) if inside else (self.machine.network, ALL_REDUCE_S[1])
        exchange = 2 * shape.layers * (2 * rows * shape.hidden * WEIGHT / rate + latency) if self.gpus > 1 else 0.0
        read_s = read / (self.gpus * self.machine.memory_bytes_s * self.share.decode_bytes)
        flops_s = flops / (self.gpus * self.machine.flops * self.share.decode_flops)
        return read_s + flops_s + exchange + self.share.call_s

    def prefill_s(self, tokens: float, each: float) -> float:
        """`tokens` prompt tokens in prompts of `each`."""
        flops = (2 * self.shape.active_body + self.shape.attention_flops * each / 2) * tokens
        return flops / (self.gpus * self.machine.flops * self.share.decode_flops)

    @property
    def cache_tokens(self) -> float:
        """Tokens that fit in the memory the weights leave; negative when the weights do not fit."""
        room = USABLE * self.gpus * self.machine.memory - WEIGHT * self.shape.parameters
        return room / (WEIGHT * self.shape.kv_numbers)

    def slots(self, work: Work) -> int:
        """Samples that run at a time."""
        each = work.new_tokens + work.prompt_tokens / (work.samples if work.shared else 1)
        return min(RUNNING, int(self.cache_tokens / each))


@dataclass(frozen=True)
class Trainer(_GPUs):
    """`gpus` GPUs with weights, gradients and moments sharded over all of them (FSDP2); 1: one process.

    experts_stay: tokens travel to the GPU that has their expert, as in Megatron, instead of experts to the tokens.
    """

    experts_stay: bool = False

    def update_s(self, work: Work) -> dict[str, float]:
        """compute, gather (what communication is not hidden behind it), optimiser."""
        shape, machine = self.shape, self.machine
        micro_rows, again = self.microbatch
        passes = 6 + 2 * work.forwards + 2 * again
        context = work.prompt_tokens + work.new_tokens / 2  # that a completion token sees, on average
        row = shape.active_body + shape.attention_flops / 2 * context
        flops = passes * (row * work.rows + shape.head * work.tokens)
        compute = flops / (self.gpus * machine.flops * self.share.update)
        rate = NETWORK_SHARE * (machine.link if self.gpus <= GPUS_PER_NODE else machine.network)
        micro_batches = max(1.0, work.rows / self.gpus / micro_rows)
        # Weights twice a micro-batch, gradients once.
        moved = (1 - 1 / self.gpus) * self._gathered_weights * (2 * WEIGHT * micro_batches + 4)
        optimiser = OPTIMISER_TRAFFIC * shape.parameters / self.gpus / (machine.memory_bytes_s * self.share.optimiser)
        return {"compute": compute, "gather": max(0.0, moved / rate - compute), "optimiser": optimiser}

    @property
    def _gathered_weights(self) -> int:
        return self.shape.parameters - (self.shape.expert_weights if self.experts_stay else 0)

    @property
    def microbatch(self) -> tuple[int, bool]:
        """The first of `MICROBATCHES` that fits; the smallest where none does. A GPU alone gathers nothing: small ones do."""
        room = USABLE * self.machine.memory
        choices = ((2048, False), *MICROBATCHES) if self.gpus == 1 else MICROBATCHES
        return next((choice for choice in choices if self._bytes(*choice) <= room), MICROBATCHES[-1])

    @property
    def memory(self) -> float:
        """Bytes a GPU: state, a micro-batch's activations, one layer's gathered weights and gradients."""
        return self._bytes(*self.microbatch)

    def _bytes(self, rows: int, again: bool) -> float:
        shape = self.shape
        layer = self._gathered_weights / shape.layers if self.gpus > 1 else 0.0
        kept = WEIGHT * shape.layers + ACTIVATION if again else ACTIVATION * shape.layers
        return STATE * shape.parameters / self.gpus + rows * shape.hidden * kept + 3 * WEIGHT * layer
