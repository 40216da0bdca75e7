"""A Hugging Face model that returns log-probs and entropies instead of logits, in a hand-written GRPO step.

    python examples/embed_hf.py                            a toy Qwen3, on a CPU in seconds
    python examples/embed_hf.py --model Qwen/Qwen3-0.6B    a model of yours

Samples groups of continuations of one prompt, rewards even token numbers, and takes on-policy steps.
Needs transformers (tried with 5.23.0).
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from omni_kernels import LossSpec, Tokens, finalise, policy_loss
from omni_kernels.adapters.hf import patch_lm_head

GROUP, LENGTH, RATE = 32, 12, 1e-2


def toy_model() -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def sample(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    with torch.no_grad():  # no labels: the model is its old self
        return model.generate(
            prompt.expand(GROUP, -1), attention_mask=torch.ones_like(prompt).expand(GROUP, -1), do_sample=True,
            max_new_tokens=LENGTH, min_new_tokens=LENGTH, top_k=0, pad_token_id=0,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model on the hub or on disk instead of the toy")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = toy_model() if options.model is None else AutoModelForCausalLM.from_pretrained(options.model)
    prompt, spec = torch.tensor([[1, 2, 3]]), LossSpec.preset("dapo", entropy_coef=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    first = last = 0.0
    with patch_lm_head(model):
        for step in range(options.steps):
            tokens = sample(model, prompt)
            labels = tokens.clone()
            labels[:, : prompt.shape[1]] = -100
            reward = (tokens[:, prompt.shape[1] :] % 2 == 0).float().mean(1)
            advantages = ((reward - reward.mean()) / (reward.std() + 1e-6))[:, None].expand_as(tokens)
            out = model(tokens, labels=labels)
            batch = Tokens(labels.flatten(), advantages.flatten())
            result = policy_loss(out.logp.flatten(), out.entropy.flatten(), batch, spec)
            result.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            last = reward.mean().item()
            first = last if step == 0 else first
            print(f"step {step}: reward {last:.2f}, entropy {finalise(result.metrics)['entropy']:.2f} nats")
    print(f"mean reward {first:.2f} in the first step, {last:.2f} in the last")


if __name__ == "__main__":
    main()
