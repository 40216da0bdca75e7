"""A model of random weights in the shape of a known one, with a tokenizer of whole words: nothing is downloaded.

The words of the prompts are in the vocabulary; of the others half have three letters and half four, so that about half of what
such a model says is rewarded. The signs of the last norm's weights are drawn: with a tied head and weights that were never
trained the likeliest next token would else be the last one again, and all samples of a prompt the same.
"""

from __future__ import annotations

import itertools
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.train.case import ASK, BEFORE, FILLER, NOUNS

SHAPES: dict[str, dict[str, int | bool]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 128, "vocab_size": 512, "tie_word_embeddings": True},
    "0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
             "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True},  # Qwen2.5's, whose biases Llama lacks
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
             "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
           "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
PAD, END = "<|pad|>", "<|end|>"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write(shape: str, folder: Path, device: str) -> str:
    """The folder as transformers reads it, weights in bf16; drawn on `device`."""
    tokenizer = _tokenizer(SHAPES[shape]["vocab_size"])
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=4096, dtype="bfloat16",
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        signs = torch.randint(0, 2, (config.hidden_size,)) * 2 - 1
    model.model.norm.weight.data = signs.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    asked = sorted({word for text in (ASK, BEFORE) for word in text.replace(".", " . ").replace(":", " : ").split()})
    words = dict.fromkeys((PAD, END, *asked, *NOUNS, *FILLER))
    symbols = string.ascii_letters + string.digits
    for number, letters in enumerate(itertools.product(symbols, repeat=3)):
        if len(words) == size:
            break
        word = "".join(letters)
        words.setdefault(word if number % 2 else f"{word}s")
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = TEMPLATE
    return tokenizer
