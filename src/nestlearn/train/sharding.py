"""Training with parameters that are divided over processes: FSDP2 and HSDP, on GPUs and on CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

WEIGHTS = "pytorch_model_fsdp_0"
"""The folder of a checkpoint that holds the parts of the weights, as accelerate names it."""


def process_mesh(shard_size: int | None, device: torch.device) -> DeviceMesh:
    """All processes in one row (FSDP), or in rows of ``shard_size`` that each hold all parameters (HSDP)."""
    processes = dist.get_world_size()
    if shard_size is None:
        return init_device_mesh(device.type, (processes,), mesh_dim_names=("shard",))
    shape = (processes // shard_size, shard_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the parameters of a model over the processes of a mesh, in place.

    A block is a unit: its parameters are gathered when it is called, and dropped afterwards. All processes must call
    the units in one order. Where levels learn from the next-token loss, the number of calls depends on the text, so the
    model is one unit.
    """
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    if getattr(getattr(model, "model", None), "segment_length", None) is None:
        for module in model.modules():
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights of a divided model, on the CPU of the first process; nothing on the others. Tied ones once."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = cast("dict[str, Tensor]", get_model_state_dict(model, options=options))
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    return {name: weights for name, weights in found.items() if name not in tied}


def read_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load the divided weights of a checkpoint into a whole model, in this process alone."""
    import torch.distributed.checkpoint as dcp

    state: dict[str, Any] = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=checkpoint / WEIGHTS, no_dist=True)
    model.load_state_dict(state["model"])
