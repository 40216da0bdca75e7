"""TRL's GRPOTrainer on omni_kernels. Runs on a CPU in seconds, without a hub: a toy model learns to write vowels.

    python examples/embed_trl.py             TRL's loss, log-probs and entropies from linear_logprob
    python examples/embed_trl.py --fused     the loss too, from linear_policy_loss (3 GEMMs instead of 4)
    python examples/embed_trl.py --model Qwen/Qwen3-0.6B      a model of yours

Needs trl (tried with 1.16.0). The only line that differs from plain TRL is the name of the trainer class.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

from omni_kernels.adapters.trl import LinearLogprobGRPOTrainer, LinearLossGRPOTrainer

PROMPTS = ["the cat", "a dog ran", "on the mat", "sat"]


def toy_model(folder: Path) -> None:
    """A random two-layer Llama and a byte-level tokenizer, saved in `folder`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(PROMPTS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.3, bos_token_id=1, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def vowels(completions: list[str], **_: object) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fused", action="store_true", help="make the loss in the kernel as well")
    parser.add_argument("--model", help="a model on the hub or on disk instead of the toy")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    trainer_class = LinearLossGRPOTrainer if options.fused else LinearLogprobGRPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            toy_model(Path(folder))
        config = GRPOConfig(
            output_dir=f"{folder}/out", max_steps=options.steps, per_device_train_batch_size=16, num_generations=8,
            max_completion_length=12, learning_rate=1e-2, loss_type="dapo", epsilon_high=0.28, beta=0.0,
            use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available(), gradient_checkpointing=False,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = trainer_class(
            model=options.model or folder,
            reward_funcs=vowels,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS * 16}),
        )
        trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    print(f"mean reward {rewards[0]:.2f} in the first step, {max(rewards):.2f} in the best of {len(rewards)}")


if __name__ == "__main__":
    main()
