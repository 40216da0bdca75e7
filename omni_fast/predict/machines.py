"""What a prediction starts from: shapes of models, data sheets of machines, and how much of a sheet a trainer gets.

Model shapes are the public config.json of each model; a folder with one works too. Machine figures are the vendor's, dense bf16,
without sparsity. Efficiencies of the CPU are fitted to our own measured steps (benchmarks/predict_fit.py); those of GPUs to published steps of
another trainer: none of them was measured by us.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from omni_fast.errors import UserError


@dataclass(frozen=True)
class Shape:
    """A decoder. experts, active_experts, dense_layers, shared_experts and expert_width are of a mixture of experts, else 0.

    latent: width of the compressed key and value of multi-head latent attention (DeepSeek), else 0.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    width: int
    vocabulary: int
    tied: bool = False
    experts: int = 0
    active_experts: int = 0
    shared_experts: int = 0
    dense_layers: int = 0
    expert_width: int = 0
    latent: int = 0

    @property
    def head(self) -> int:
        """Weights of the output head, the largest matrix; an embedding of its own has as many."""
        return self.vocabulary * self.hidden

    @property
    def _attention(self) -> int:  # weights of a layer
        if self.latent:  # DeepSeek-V3: queries through 1,536; heads of 128 + 64 rotary, values of 128
            shared = self.hidden * (1536 + self.latent + 64)
            return shared + self.heads * (1536 * 192 + self.latent * 256 + 128 * self.hidden)
        return self.head_size * self.hidden * 2 * (self.heads + self.kv_heads)

    @property
    def expert_weights(self) -> int:
        """Of all experts that a router chooses among."""
        return (self.layers - self.dense_layers) * self.experts * 3 * self.hidden * self.expert_width

    @property
    def body(self) -> int:
        """Weights of the layers without the chosen experts."""
        dense = self.dense_layers if self.experts else self.layers
        mixed = (self.layers - dense) * self.hidden * (self.experts + 3 * self.shared_experts * self.expert_width)
        return self.layers * self._attention + dense * 3 * self.hidden * self.width + mixed

    @property
    def parameters(self) -> int:
        return self.body + self.expert_weights + self.head * (1 if self.tied else 2)

    @property
    def active_body(self) -> float:
        """Weights of the layers that one token is multiplied with."""
        return self.body + (self.expert_weights * self.active_experts / self.experts if self.experts else 0)

    def read_weights(self, rows: float) -> float:
        """Weights that a decoding step of `rows` reads: an expert only if a row chose it."""
        touched = 1 - (1 - self.active_experts / self.experts) ** rows if self.experts else 0.0
        return self.body + self.head + self.expert_weights * touched

    @property
    def kv_numbers(self) -> int:
        """Cached numbers per token."""
        return self.layers * (self.latent + 64 if self.latent else 2 * self.kv_heads * self.head_size)

    @property
    def attention_flops(self) -> int:
        """Of one token for each token it attends to, forward."""
        return 4 * self.layers * self.heads * (160 if self.latent else self.head_size)


_QWEN3_MOE = Shape(2048, 48, 32, 4, 128, 6144, 151936, experts=128, active_experts=8, expert_width=768)
SHAPES = {
    "smollm2-135m": Shape(576, 30, 9, 3, 64, 1536, 49152, tied=True),
    "qwen2.5-0.5b": Shape(896, 24, 14, 2, 64, 4864, 151936, tied=True),
    "qwen2.5-7b": Shape(3584, 28, 28, 4, 128, 18944, 152064),
    "qwen3-30b-a3b": _QWEN3_MOE,
    "qwen3-235b-a22b": replace(_QWEN3_MOE, hidden=4096, layers=94, heads=64, expert_width=1536),
    "deepseek-v3": Shape(7168, 61, 128, 128, 128, 18432, 129280, experts=256, active_experts=8, shared_experts=1,
                         dense_layers=3, expert_width=2048, latent=512),
    "kimi-k2": Shape(7168, 61, 64, 64, 128, 18432, 163840, experts=384, active_experts=8, shared_experts=1,
                     dense_layers=1, expert_width=2048, latent=512),
}  # fmt: skip


def read_shape(name: str) -> Shape:
    """A name of `SHAPES`, or a folder with the config.json of a Llama-like, Qwen MoE or DeepSeek-like model."""
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name) / "config.json"
    if not path.is_file():
        raise UserError(f"no model shape '{name}': give a folder with a config.json, or one of {', '.join(SHAPES)}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
        experts = raw.get("num_experts") or raw.get("n_routed_experts") or raw.get("num_local_experts") or 0
        return Shape(
            hidden, raw["num_hidden_layers"], heads, raw.get("num_key_value_heads") or heads,
            raw.get("head_dim") or hidden // heads, raw["intermediate_size"], raw["vocab_size"],
            bool(raw.get("tie_word_embeddings", False)), experts, raw["num_experts_per_tok"] if experts else 0,
            raw.get("n_shared_experts") or 0, raw.get("first_k_dense_replace", 0) if experts else 0,
            raw.get("moe_intermediate_size", raw["intermediate_size"]) if experts else 0, raw.get("kv_lora_rank") or 0,
        )  # fmt: skip
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no config of a decoder ({error}); known by name: {', '.join(SHAPES)}") from None


@dataclass(frozen=True)
class Machine:
    """One GPU, or the CPU as a whole. flops: dense bf16 per second. link, network: bytes/s of one GPU inside its node and beyond."""

    flops: float
    memory_bytes_s: float
    memory: float
    link: float
    network: float
    source: str


# Eight GPUs a node, one 400 Gb/s adapter each. NVLink figures are of one direction.
MACHINES = {
    "h100": Machine(989e12, 3.35e12, 80e9, 450e9, 50e9, "NVIDIA H100 data sheet, SXM"),
    "h200": Machine(989e12, 4.8e12, 141e9, 450e9, 50e9, "NVIDIA H200 data sheet, SXM"),
    "b200": Machine(2250e12, 8.0e12, 180e9, 900e9, 50e9, "NVIDIA DGX B200 data sheet, an eighth"),
    # Rates of a large product and of a copy, rounded: they only set the unit of the shares fitted below.
    "cpu": Machine(0.7e12, 25e9, 16e9, 25e9, 25e9, "AMD EPYC, Zen 5, 2 cores, measured by us"),
}


@dataclass(frozen=True)
class Efficiency:
    """How time follows from work: work / (rate of the sheet x share), parts added up.

    decode_bytes, decode_flops: shares of memory bandwidth and arithmetic while generating; call_s: a decoding step besides them.
    update: share of the arithmetic in forward and backward; optimiser: of the memory bandwidth in AdamW.
    """

    decode_bytes: float
    decode_flops: float
    call_s: float
    update: float
    optimiser: float
    source: str


# GPUs. Decoding, and the update of a mixture of experts: what fits three published steps of NeMo RL v0.6 (Qwen3-30B-A3B on 32 and
# 192 H100, `PUBLISHED` of benchmarks/predict_fit.py). The update of a dense model: assumed, between prime-rl's published 11 and 22 % of an H100
# (benchmarks/baselines) and the 40 % that pretraining reaches. call_s, optimiser: assumed.
DENSE = Efficiency(0.55, 0.55, 0.006, 0.3, 0.7, "shares from steps of NeMo RL and prime-rl; nothing measured by us")
EXPERTS = replace(DENSE, update=0.1)
SYNC_BYTES_S = 8.25e9  # of a broadcast over NCCL to 30 receivers: verl, checkpoint_engine/README.md
# Two CPU cores: `python benchmarks/predict_fit.py`.
CPU = Efficiency(0.81, 1.1, 0.0, 0.92, 0.58, "shares fitted to our own steps on this machine")
CPU_SYNC_BYTES_S = 6.0e9  # the local engine packs the weights again
