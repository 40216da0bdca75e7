"""Demonstrations that a from-scratch model is warmed up on before it meets the tasks of level "tiny"."""

from __future__ import annotations

import random
from collections.abc import Sequence

from omni_fast.config import TaskConfig
from omni_fast.errors import UserError
from omni_fast.tasks import BUILT_IN


def tiny_corpus(blocks: Sequence[TaskConfig], seed: int) -> list[tuple[str, str, str]]:
    """(prompt, reply, wrong reply) over the train items of every block, with the blocks' seed.

    The wrong replies are there to be mixed in: a warm-up on right ones alone would leave nothing to learn.
    Raises UserError for a block that has no level "tiny".
    """
    rows: list[tuple[str, str, str]] = []
    for block in blocks:
        if block.kind not in BUILT_IN or block.level != "tiny":
            raise UserError(
                f"task '{block.name}' cannot be learned by the from-scratch model; give a kind of {', '.join(BUILT_IN)} "
                'with level = "tiny", or another model'
            )
        domain, rng = BUILT_IN[block.kind], random.Random(f"{block.kind}:tiny:corpus:{seed}")
        items = domain.levels["tiny"].pools(seed)["train"]
        rows += [(item.prompt, *domain.demonstrate(item, items, rng)) for item in items]
    return rows
