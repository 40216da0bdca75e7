"""One optimiser step on a batch of samples: pack, forward, loss and gradient, clip, AdamW, copy back.

The model the caller gave keeps working weights (bf16 where the processor multiplies it fast); the fp32 master weights
live here. Each micro-batch adds its gradient to fp32 sums as soon as a parameter has it, so a working-precision
gradient of the whole model never exists. The loss is divided once by counts of the whole step: how the step is split
never changes it. After the step the working weights are overwritten in place, so an engine that shares the model
reads the new ones.

Limits: decoders whose attention is plain causal softmax (see tree_attention.py) and whose logits are a linear head
with at most a final soft cap; one device. Losses with quantile masks are refused, since those depend on the split.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from omni_fast.checkpoint import TENSORS, Json
from omni_fast.errors import RunError, UserError
from omni_fast.policy import shards, tree_attention
from omni_fast.policy.adapter import add_adapter, without_adapter
from omni_fast.policy.layer import slim
from omni_fast.policy.model import working_dtype
from omni_fast.policy.pack import MicroBatch, Share, Trajectory, pack
from omni_fast.policy.slots import Clock, Slot
from omni_kernels import (
    METRICS,
    LossSpec,
    Tokens,
    finalise,
    linear_logprob,
    linear_policy_loss,
    normaliser_count,
)

ADAM_EPS = 1e-8
Part = TypeVar("Part")


class Decoder(nn.Module):
    """A model and what is computed from its head, as one module: over ranks its hooks gather embedding, norm and head."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, micro: MicroBatch, use: Callable[[Tensor, nn.Linear], Any], inputs: Tensor | None = None) -> Any:
        """What `use` makes of the hidden states [T, H] after the final norm, and of the head. inputs: the embedded rows."""
        if inputs is None:
            inputs = self.model.get_input_embeddings()(micro.input_ids)
        output = self.model.base_model(
            inputs_embeds=inputs, position_ids=micro.positions, use_cache=False, tree=micro.layout
        )
        return use(output.last_hidden_state[0], self.model.get_output_embeddings())


class Policy:
    """The trained model, its optimiser and, where the loss wants one, its frozen reference."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        loss: LossSpec,
        learning_rate: float,
        temperature: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        max_grad_norm: float = 1.0,
        tokens_per_microbatch: int = 4096,
        share: Share = "tree",
        dtype: torch.dtype | None = None,
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
        gradient_checkpointing: bool = False,
        max_bad_steps: int = 3,
    ) -> None:
        """Takes `model` over: its parameters become the working weights, in `dtype` (None: `working_dtype`), in place.

        temperature: the sampler's; the loss is of the distribution that was sampled from. warmup_steps: linear, counted
        from the last `reset_optimizer`. lora_rank: 0 trains all weights. gradient_checkpointing: keep only each layer's
        input, compute the rest again. max_bad_steps: how many steps in a row may have a non-finite gradient (they are
        skipped) before the run stops.
        """
        if loss.top_entropy < 1 or loss.drop_covariance > 0:
            raise UserError(
                "Masks by quantile (top_entropy, drop_covariance) depend on the micro-batch split: turn them off."
            )
        _check_model(model)
        slim(model)
        embedding = model.get_input_embeddings()
        if isinstance(embedding, nn.Embedding):
            embedding.padding_idx = None  # no row is padding; a token that pads elsewhere learns like any other
        self.model, self.loss, self.inv_temperature = model, loss, 1.0 / temperature
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps
        self.betas, self.weight_decay = betas, weight_decay
        self.max_grad_norm, self.max_bad_steps = max_grad_norm, max_bad_steps
        self.tokens_per_microbatch, self.share = tokens_per_microbatch, share
        self.steps = 0  # optimiser steps since the last reset
        self.bad_steps = 0  # skipped steps in a row
        self.lora = lora_rank > 0
        if self.lora:
            add_adapter(model, lora_rank, lora_alpha)
        if gradient_checkpointing:
            newer = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.17 has the older name
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
            model.train()
        else:
            model.eval()  # dropout has no place in a policy gradient
        self.slots = self._take_over(dtype or working_dtype(model.device))
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.reference: PreTrainedModel | None = None
        if loss.beta > 0 and not self.lora:
            self.reference = copy.deepcopy(model).requires_grad_(False).eval()
        whole: dict[Tensor, Slot] = {slot.working: slot for slot in self.slots if not isinstance(slot.working, DTensor)}
        self._embedding = whole.get(embedding.weight) if type(embedding) is nn.Embedding else None
        self._head = whole.get(model.get_output_embeddings().weight)
        for slot in self.slots:
            slot.working.register_post_accumulate_grad_hook(slot.drain)
        for parameter, slot in whole.items():
            parameter.slot = slot  # type: ignore[attr-defined]  # for those who make gradients in fp32 (products.py)

    # -- one step ----------------------------------------------------------------------------------------------------

    def update(self, batch: Sequence[Trajectory]) -> dict[str, float]:
        """One optimiser step on all of `batch`; returns metrics.

        loss, grad_norm (before clipping), entropy and kl in nats, ratios, clip fractions, tokens (trained completion
        tokens), rows (rows the model computed), sample_tokens (what they stand for, prompts included), skipped (1: no
        step was made, because no sample had an advantage, every token was masked, or the gradient was not finite),
        bad_steps (skipped for a gradient that is not finite, in a row), entropy/TASK, seconds/PART. What is not finite
        is left out.
        Raises UserError where a sample exceeds the token budget, RunError after `max_bad_steps` non-finite gradients.
        """
        clock = Clock()
        try:
            denominator, deferred = float(normaliser_count(self._flat(batch), self.loss)), False
        except ValueError:  # which tokens count is known only after the forward passes
            denominator, deferred = 1.0, True
        passive = self.loss.beta == self.loss.entropy_coef == self.loss.z_loss == 0 and not deferred
        active = [sample for sample in batch if sample.advantage != 0] if passive else list(batch)
        micro_batches = self._pack(active)
        clock.lap("pack")
        for slot in self.slots:
            slot.filled = False
        totals: Tensor | None = None
        own: dict[str, float] = defaultdict(float)
        for micro in micro_batches:
            sums, entropy = self._loss_backward(micro, denominator, clock)
            totals = sums if totals is None else totals + sums
            tasks = [active[index].task for index in micro.samples]
            for task in set(tasks):
                among = torch.tensor([name == task for name in tasks], device=entropy.device)[micro.sequences]
                own[f"entropy/{task}"] += entropy[among].sum(dtype=torch.float64).item()
                own[f"tokens/{task}"] += int(among.sum())
            own["rows"] += micro.input_ids.numel()
            own["microbatches"] += 1
        counts: dict[str, float] = defaultdict(float)
        for part in self._gathered(own):
            for name, count in part.items():
                counts[name] += count
        metrics = {} if totals is None else finalise(totals := self._sum(totals))
        if "reference_kl_k3" in metrics:
            metrics["kl"] = metrics["reference_kl_k3"]
        for name, total in counts.items():
            kind, _, task = name.partition("/")
            if kind == "entropy":
                metrics[name] = total / counts[f"tokens/{task}"]
        metrics["rows"], metrics["microbatches"] = int(counts["rows"]), int(counts["microbatches"])
        metrics["sample_tokens"] = sum(len(sample.prompt) + len(sample.completion) for sample in active)
        scale = 1.0
        if deferred and totals is not None:
            scale = totals[METRICS.index("kept")].item()
            metrics["loss"] /= scale or 1.0
        metrics |= self._step(scale, bool(micro_batches) and scale > 0, clock)
        metrics |= clock.seconds()
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def measure(self, batch: Sequence[Trajectory]) -> list[tuple[list[float], list[float]]]:
        """Log-prob and entropy (nats, at the sampling temperature) of each completion token, for each sample in order."""
        results: dict[int, tuple[list[float], list[float]]] = {}
        with torch.no_grad():
            for micro in self._pack(batch):
                logp, entropy = self._logprobs(self._decoder, micro, want_entropy=True)
                assert entropy is not None
                for number, index in enumerate(micro.samples):
                    own = micro.sequences == number
                    results[index] = (logp[own].tolist(), entropy[own].tolist())
        merged = {index: found for part in self._gathered(results) for index, found in part.items()}
        return [merged[index] for index in range(len(batch))]

    def _pack(self, batch: Sequence[Trajectory]) -> list[MicroBatch]:
        return pack(
            batch, tokens_per_microbatch=self.tokens_per_microbatch, share=self.share, device=self.model.device,
            ranks=self.ranks, rank=self.rank,
        )  # fmt: skip

    def _flat(self, batch: Sequence[Trajectory]) -> Tokens:
        """All completion tokens of the step, for counting; on the CPU."""
        lengths = torch.tensor([len(sample.completion) for sample in batch])
        rollout = torch.tensor([value for sample in batch for value in sample.logprobs])
        return Tokens(
            targets=torch.tensor([token for sample in batch for token in sample.completion]),
            advantages=torch.tensor([sample.advantage for sample in batch]).repeat_interleave(lengths),
            sequences=torch.arange(len(batch)).repeat_interleave(lengths),
            rollout=rollout,
            reference=torch.zeros_like(rollout) if self.loss.beta > 0 else None,
        )

    def _loss_backward(self, micro: MicroBatch, denominator: float, clock: Clock) -> tuple[Tensor, Tensor]:
        """Adds one micro-batch to the gradient sums; its metric sums and the entropies of its tokens."""
        reference = self._reference_logprobs(micro)
        clock.lap("reference")
        tokens = Tokens(
            micro.targets, micro.advantages, sequences=micro.sequences, reference=reference, rollout=micro.rollout,
            denominator=denominator,
        )  # fmt: skip

        def loss(hidden: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor, Tensor | None]:
            clock.lap("forward")
            main_grad = self._head.sum() if self._head else None
            output = linear_policy_loss(
                hidden.index_select(0, micro.predicts), head.weight, tokens, self.loss, bias=head.bias,
                inv_temperature=self.inv_temperature, softcap=self.softcap, return_tokens=True, main_grad=main_grad,
                grad_scale=None if main_grad is None else 1.0,
            )  # fmt: skip
            clock.lap("head")
            return output.loss, output.metrics, output.entropy

        inputs = None
        with self._attention(self._decoder.model):
            if self._embedding is not None:
                inputs = self.model.get_input_embeddings()(micro.input_ids).detach().requires_grad_()
            value, metrics, entropy = self._decoder(micro, loss, inputs)
            value.backward()
        if self._embedding is not None:
            # The rows' gradients are summed in fp32 here: autograd would sum them in the working dtype.
            assert inputs is not None and inputs.grad is not None
            self._embedding.sum().index_add_(0, micro.input_ids[0], inputs.grad[0].float())
        clock.lap("backward")
        return metrics, entropy

    def _step(self, scale: float, any_rows: bool, clock: Clock) -> dict[str, float]:
        """Clips and applies the gradient sums, divided by `scale`; metrics of it."""
        if not any_rows:
            return {"skipped": 1.0, "grad_norm": 0.0, "learning_rate": 0.0}
        norms = torch.stack(torch._foreach_norm([slot.sum() for slot in self.slots]))
        norm = self._sum(norms.double().square().sum()).sqrt().item() / scale
        if not math.isfinite(norm):
            self.bad_steps += 1
            if self.bad_steps > self.max_bad_steps:
                raise RunError(
                    f"The gradient was not finite in {self.bad_steps} steps in a row; the weights are those of the last good "
                    "step. Lower the learning rate, or look at the last rewards for values that are not finite."
                )
            return {"skipped": 1.0, "grad_norm": norm, "bad_steps": float(self.bad_steps), "learning_rate": 0.0}
        self.bad_steps = 0
        clock.lap("clip")
        self.steps += 1
        rate = self.learning_rate * min(1.0, self.steps / (self.warmup_steps + 1))
        self._adamw(rate, scale * max(1.0, norm / self.max_grad_norm))
        clock.lap("optimizer")
        self._publish()
        clock.lap("copy")
        return {"skipped": 0.0, "grad_norm": norm, "learning_rate": rate}

    @torch.no_grad()
    def _adamw(self, rate: float, divisor: float) -> None:
        for slot in self.slots:
            if slot.mean is None or slot.square is None:
                slot.mean, slot.square = torch.zeros_like(slot.master), torch.zeros_like(slot.master)
        device = self.slots[0].master.device
        torch._fused_adamw_(
            [slot.master for slot in self.slots],
            [slot.grad for slot in self.slots],
            [slot.mean for slot in self.slots if slot.mean is not None],
            [slot.square for slot in self.slots if slot.square is not None],
            [],
            [torch.tensor(float(self.steps), device=device) for _ in self.slots],
            lr=rate, beta1=self.betas[0], beta2=self.betas[1], weight_decay=self.weight_decay, eps=ADAM_EPS,
            amsgrad=False, maximize=False, grad_scale=torch.tensor(divisor, device=device),
        )  # fmt: skip

    @torch.no_grad()
    def _publish(self) -> None:
        """Master weights into the working weights, in place."""
        for slot in self.slots:
            if slot.working.data_ptr() != slot.master.data_ptr():
                slot.working.copy_(slot.master)

    # -- what several processes that share a step do otherwise (sharded.py) -------------------------------------------

    ranks, rank = 1, 0

    def _take_over(self, dtype: torch.dtype) -> list[Slot]:
        """Masters for the trained parameters; all parameters of the model become `dtype`, one at a time."""
        self._decoder = Decoder(self.model)
        slots = []
        for name, parameter in self.model.named_parameters():
            master = parameter.data.float().contiguous()  # as products and gradients have it
            parameter.data = master.to(dtype)  # the same tensor where dtype is fp32
            if parameter.requires_grad:
                slots.append(Slot(name, parameter, master))
        return slots

    def _gathered(self, own: Part) -> list[Part]:
        """What each process found."""
        return [own]

    def _sum(self, part: Tensor) -> Tensor:
        """Of all processes' sums."""
        return part

    def _spread(self, slot: Slot, part: Tensor) -> Tensor:
        """All processes' parts of a parameter or a moment as one tensor."""
        return part

    def _whole(self, slot: Slot, part: Tensor) -> Tensor:
        """All of a parameter."""
        return part

    def _part(self, slot: Slot, whole: Tensor) -> Tensor:
        """The inverse of `_whole`."""
        return whole

    # -- forward passes ----------------------------------------------------------------------------------------------

    @contextmanager
    def _attention(self, model: PreTrainedModel) -> Iterator[None]:
        """Tree attention for the model while inside; others that share the model keep their own."""
        before = model.config._attn_implementation
        model.config._attn_implementation = tree_attention.NAME
        try:
            yield
        finally:
            model.config._attn_implementation = before

    def _logprobs(self, decoder: Decoder, micro: MicroBatch, want_entropy: bool) -> tuple[Tensor, Tensor | None]:
        def logprobs(hidden: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor | None]:
            return linear_logprob(
                hidden.index_select(0, micro.predicts), head.weight, micro.targets, bias=head.bias,
                inv_temperature=self.inv_temperature, softcap=self.softcap, want_entropy=want_entropy,
            )  # fmt: skip

        with self._attention(decoder.model):
            return decoder(micro, logprobs)

    def _reference_logprobs(self, micro: MicroBatch) -> Tensor | None:
        """Log-probs of the frozen reference; under LoRA that is the model without its adapter."""
        if self.loss.beta == 0:
            return None
        decoder = Decoder(self.reference) if self.reference else self._decoder
        with torch.no_grad(), without_adapter(decoder.model):
            return self._logprobs(decoder, micro, want_entropy=False)[0]

    # -- state -------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """The fp32 master weights by parameter name (under LoRA the adapter's alone); not copies."""
        return {slot.name: self._whole(slot, slot.master) for slot in self.slots}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrites masters and working weights. Raises UserError where names or shapes are not those of this model."""
        self._check_shapes({name: weight.shape for name, weight in weights.items()})
        for slot in self.slots:
            slot.master.copy_(self._part(slot, weights[slot.name]))
        self._publish()

    def _check_shapes(self, given: Mapping[str, torch.Size]) -> None:
        shapes = {slot.name: slot.shape for slot in self.slots}
        if odd := sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name)):
            raise UserError(
                f"The stored weights are not of this model ({len(odd)} differ, for example {odd[0]}): "
                "use the model, and the lora_rank, that they were trained with."
            )

    def reset_optimizer(self) -> None:
        """Forgets AdamW's moments and skipped steps, and starts the warm-up again."""
        self.steps = self.bad_steps = 0
        for slot in self.slots:
            slot.mean = slot.square = None

    def numbers(self) -> dict[str, Json]:
        """What a resume needs besides tensors."""
        return {"steps": self.steps, "bad_steps": self.bad_steps}

    def tensors(self) -> dict[str, Tensor]:
        """Everything else that a resume needs, under flat names; not copies."""
        found = {
            f"{kind}.{slot.name}": self._spread(slot, part)
            for slot in self.slots
            for kind, part in (("master", slot.master), ("mean", slot.mean), ("square", slot.square))
            if part is not None
        }
        if self.reference is not None:
            found |= {f"reference.{name}": value.detach() for name, value in self.reference.named_parameters()}
        return found

    def save(self, folder: Path) -> None:
        """`tensors` as safetensors in an existing folder."""
        if self.ranks > 1:
            shards.write(folder, self.tensors())
        else:
            save_file({name: value.contiguous() for name, value in self.tensors().items()}, folder / TENSORS)

    @torch.no_grad()
    def load(self, folder: Path, numbers: Mapping[str, Json]) -> None:
        """Restores what `save` wrote on any number of ranks, `numbers` as they were then; the next update is then bit for
        bit the one an uninterrupted run makes. Raises UserError where it is of another model."""
        kept = shards.shapes(folder)
        self._check_shapes({name[7:]: shape for name, shape in kept.items() if name.startswith("master.")})
        for slot in self.slots:
            slot.mean = slot.square = None
            if f"mean.{slot.name}" in kept:
                slot.mean, slot.square = torch.empty_like(slot.master), torch.empty_like(slot.master)
        shards.read(folder, self.tensors())
        self._publish()
        steps, bad_steps = numbers["steps"], numbers["bad_steps"]
        assert isinstance(steps, int) and isinstance(bad_steps, int)
        self.steps, self.bad_steps = steps, bad_steps


def _check_model(model: PreTrainedModel) -> None:
    config = model.config
    name = type(model).__name__
    for key in ("logit_scale", "logits_scaling"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise UserError(f"{name} scales its logits ({key}), which training does not know: choose another model.")
    window = getattr(config, "sliding_window", None)  # of all layers, where their kinds are not named
    layers = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if layers != {"full_attention"}:
        raise UserError(
            f"{name} has layers that are not plain full attention ({sorted(layers)}): choose another model."
        )
