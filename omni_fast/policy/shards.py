"""Tensors in a folder, written by several ranks at once or by one, read by any number of ranks.

torch.distributed.checkpoint (DCP) with safetensors files: each rank writes the parts that it holds, and reads the parts
that it needs from whichever files have them. Nothing is pickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from omni_fast.checkpoint import writing

QUIET = partial(warnings.catch_warnings, action="ignore")  # DCP warns of one process, which is no mistake here


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """One file of this rank's parts (of DTensors) in a folder that all ranks see; all ranks call it.

    RunError on all of them where the disk of one is full or read-only.
    """
    with QUIET(), writing(folder):
        try:
            dcp.save(dict(tensors), storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
        except CheckpointException as error:
            raise next(failure for failure, _ in error.failures.values()) from None


def shapes(folder: Path) -> dict[str, torch.Size]:
    """The whole tensors that the folder's files make up."""
    with QUIET():
        found = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in found.items() if isinstance(entry, dcp.metadata.TensorStorageMetadata)}


def read(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fills the tensors; all ranks call it with their parts (DTensors), or one process alone with whole tensors."""
    alone = not any(isinstance(tensor, DTensor) for tensor in into.values())
    with QUIET():
        dcp.load(dict(into), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone)
