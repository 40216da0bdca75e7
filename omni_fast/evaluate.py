"""The tokens of an item, and the text of an answer. An evaluation (`Parts.evaluate`) is greedy, with twice the new tokens that
training allows, for the first and the last policy alike, so that a gain is never a truncation effect.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from omni_fast.errors import UserError
from omni_fast.policy.model import chat_tokens
from omni_fast.rollout.engine import Sample
from omni_fast.tasks.base import Item, Task

EVAL_TOKENS_FACTOR = 2
SHOWN_COMPLETIONS = 4  # that are kept per task and split, for the report


def tokenise(tokenizer: PreTrainedTokenizerBase, task: Task, item: Item, max_tokens: int) -> list[int]:
    """The chat-templated prompt; raises UserError naming the item if it is longer than `max_tokens`."""
    tokens = chat_tokens(tokenizer, task.system, item.prompt, item.prefix)
    if len(tokens) > max_tokens:
        told = f"task '{task.name}': the prompt of item {item.id!r} has {len(tokens)} tokens, the limit is {max_tokens}"
        raise UserError(f"{told}; raise rollout.max_prompt_tokens or shorten it")
    return tokens


def decode(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], samples: Sequence[Sample]) -> list[str]:
    """Answers as the verifiers see them: the item's prefix, then what the policy wrote."""
    texts = tokenizer.batch_decode([sample.tokens for sample in samples], skip_special_tokens=True)
    return [item.prefix + text for item, text in zip(items, texts, strict=True)]
