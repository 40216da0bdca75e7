"""The policy over several processes (torchrun): parameters, gradients and moments in parts by FSDP2, one step together.

Rank 0 drives: it samples, scores, logs and saves as a run of one process does, and sends every call of its policy to the
other ranks, which do nothing else than `follow`. All ranks get the whole batch, cut it into the same micro-batches, as
many for each rank and of even size, and sum gradients (never average: the loss is normalised by counts of the whole
step). So the result is that of one process up to the order of sums. Logits are never gathered; the head's weight is,
while a micro-batch is under way, as any layer's.

The model that rank 0 was given stays whole, in the working dtype: engine and sync read it, and each step gathers the new
weights into it, one parameter at a time. A checkpoint is a file a rank, which any number of ranks can read (shards.py).

Limits: rank 0's host needs room for that copy, and for fp32 weights at the end of a stage; the run folder is on a file
system that all hosts share; a reference policy (beta > 0) needs LoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from omni_fast.checkpoint import Json
from omni_fast.errors import RunError, UserError
from omni_fast.policy.pack import Trajectory
from omni_fast.policy.slots import Slot
from omni_fast.policy.update import Decoder, Part, Policy
from omni_fast.ranks import STEP_S

IDLE_S = 24 * 3600.0  # how long a rank waits for rank 0's next call, which samples, scores and saves meanwhile


class ShardedPolicy(Policy):
    """`Policy` of all ranks of the default process group; the same arguments and methods. Only rank 0 calls the methods."""

    def __init__(self, model: PreTrainedModel, **settings: Any) -> None:
        if settings["loss"].beta > 0 and not settings.get("lora_rank"):
            raise UserError(
                "loss.beta > 0 over several ranks needs model.lora_rank > 0: its reference is then the base"
            )
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self._calls = dist.new_group(backend="gloo", timeout=timedelta(seconds=IDLE_S))
        self._failed = False
        super().__init__(model, **settings)

    # -- rank 0 calls, the others follow -------------------------------------------------------------------------------

    def update(self, batch: Sequence[Trajectory]) -> dict[str, float]:
        return self._together("update", list(batch))

    def measure(self, batch: Sequence[Trajectory]) -> list[tuple[list[float], list[float]]]:
        return self._together("measure", list(batch))

    def weights(self) -> dict[str, Tensor]:
        return self._together("weights")

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        return self._together("load_weights", weights)

    def reset_optimizer(self) -> None:
        return self._together("reset_optimizer")

    def save(self, folder: Path) -> None:
        self._together("save", folder)
        if len(list(folder.iterdir())) < self.ranks:
            raise RunError(
                f"{folder} has not the files of all {self.ranks} ranks: the run folder has to be on a file system that all "
                "hosts share"
            )

    def load(self, folder: Path, numbers: Mapping[str, Json]) -> None:
        return self._together("load", folder, numbers)

    def close(self) -> None:
        """Let the other ranks go; after a failure in the middle of something torchrun has to end them."""
        if not self._failed:
            with suppress(RuntimeError):  # one of them is gone, and torchrun ends the others
                self._send("close", ())

    def _together(self, name: str, *given: Any) -> Any:
        """Do `Policy.name` on all ranks at once."""
        self._failed = True  # until all are through
        try:
            self._send(name, given)
            found = getattr(Policy, name)(self, *given)
        except (UserError, RunError):
            self._failed = False  # the others have the same
            raise
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise RunError(
                f"The ranks lost each other in {name} ({str(error).splitlines()[0]}): one of them was killed, or took more "
                f"than {STEP_S:.0f} s. The same command resumes from the last checkpoint."
            ) from error
        self._failed = False
        return found

    def _send(self, name: str, given: tuple[Any, ...]) -> None:
        """Tensors travel later, part by part; here only their shapes."""
        shapes = tree_map_only(Tensor, partial(Tensor.to, device="meta"), given)
        dist.broadcast_object_list([name, shapes], src=0, group=self._calls)

    def follow(self) -> None:
        """What a rank other than 0 does until rank 0 closes."""
        while True:
            call: list[Any] = [None, None]
            dist.broadcast_object_list(call, src=0, group=self._calls)
            name, given = call
            if name == "close":
                return
            try:
                getattr(Policy, name)(self, *given)
            except (UserError, RunError):
                continue  # rank 0 has the same, and says it

    # -- what is done in parts -----------------------------------------------------------------------------------------

    def _take_over(self, dtype: torch.dtype) -> list[Slot]:
        self._dtype = dtype
        self._published = {name: value for name, value in self.model.named_parameters() if self.rank == 0}
        trained = (copy.deepcopy(self.model) if self.rank == 0 else self.model).float()
        for value in self._published.values():
            value.data = value.data.to(dtype)
        self._decoder = Decoder(trained)
        _shard(self._decoder, dtype)
        return [
            Slot(name, parameter, parameter.to_local().detach())
            for name, parameter in trained.named_parameters()
            if isinstance(parameter, DTensor) and parameter.requires_grad
        ]

    def _gathered(self, own: Part) -> list[Part]:
        parts: list[Any] = [None] * self.ranks
        dist.all_gather_object(parts, own)
        return parts

    def _sum(self, part: Tensor) -> Tensor:
        dist.all_reduce(part)
        return part

    def _spread(self, slot: Slot, part: Tensor) -> DTensor:
        own = slot.working
        assert isinstance(own, DTensor)
        return DTensor.from_local(part, own.device_mesh, own.placements, shape=own.shape, stride=own.stride())

    @torch.no_grad()
    def _whole(self, slot: Slot, part: Tensor) -> Tensor:
        """On the CPU of rank 0; nothing elsewhere."""
        whole = self._spread(slot, part).full_tensor()
        return whole.cpu() if self.rank == 0 else torch.empty(0)

    @torch.no_grad()
    def _part(self, slot: Slot, whole: Tensor) -> Tensor:
        """Rank 0's `whole`, cut; the other ranks have its shape alone."""
        assert isinstance(slot.working, DTensor)
        device = slot.master.device
        given = whole.to(device, torch.float32) if self.rank == 0 else torch.empty(slot.shape, device=device)
        return distribute_tensor(given, slot.working.device_mesh, slot.working.placements).to_local()

    @torch.no_grad()
    def _publish(self) -> None:
        """The new weights into rank 0's whole model, in place; rounded before they travel, as they would be after."""
        assert isinstance(self._decoder, FSDPModule)
        self._decoder.reshard()  # a forward pass without a backward one leaves embedding, norm and head gathered
        for slot in self.slots:
            whole = self._spread(slot, slot.master.to(self._dtype)).full_tensor()
            if self.rank == 0:
                self._published[slot.name].copy_(whole)


def _shard(decoder: Decoder, dtype: torch.dtype) -> None:
    """Each layer by itself, the rest together; computed in `dtype`, summed in fp32."""
    device = next(decoder.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = set(decoder.model._no_split_modules or ())
    for module in [*decoder.modules()][::-1]:
        if type(module).__name__ in layers or module is decoder:
            fully_shard(module, mesh=mesh, mp_policy=precision)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
