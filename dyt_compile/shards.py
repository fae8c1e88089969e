"""What is learned, split among the ranks: each holds a part of every weight (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["like", "sharded", "whole"]


def sharded(
    module: torch.nn.Module, parts: Iterable[torch.nn.Module], group: ProcessGroup
) -> torch.nn.Module:
    """The module, of whose weights each rank of the group holds a part; gradients are their sums.

    parts: modules in it, whose weights are gathered when one is run, forwards or backwards, and
    dropped behind it; those of the rest stay for the whole step.
    """
    device = next(module.parameters()).device.type
    mesh = DeviceMesh.from_group(group, device)
    for part in (*parts, module):
        wrapped = fully_shard(part, mesh=mesh)
        if isinstance(wrapped, FSDPModule):
            wrapped.set_gradient_divide_factor(1.0)
            wrapped.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return module


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every rank has to ask for it where each holds a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor that every rank has, lying as another: on its device, and split as that is."""
    own = tensor.to(other.device)
    if isinstance(other, DTensor):
        return distribute_tensor(own, other.device_mesh, other.placements, src_data_rank=None)
    return own
