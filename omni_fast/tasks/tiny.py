"""Demonstrations that a from-scratch model is warmed up on before it meets the tasks of level "tiny"."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from omni_fast.config import TaskConfig
from omni_fast.errors import UserError

KINDS = ("math", "code", "qa", "writing")


def tiny_corpus(blocks: Sequence[TaskConfig], seed: int) -> list[tuple[str, str, str]]:
    """(prompt, reply, wrong reply) over the train items of every block, with the blocks' seed.

    The wrong replies are there to be mixed in: a warm-up on right ones alone would leave nothing to learn.
    Raises UserError for a block that has no level "tiny".
    """
    rows: list[tuple[str, str, str]] = []
    for block in blocks:
        if block.kind not in KINDS or block.level != "tiny":
            raise UserError(
                f"task '{block.name}' cannot be learned by the from-scratch model; give a kind of {', '.join(KINDS)} "
                'with level = "tiny", or another model'
            )
        rows += importlib.import_module(f"omni_fast.tasks.{block.kind}").tiny_corpus(seed)
    return rows
