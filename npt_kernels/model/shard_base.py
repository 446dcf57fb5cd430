"""Sharding the frozen base of a converted model over processes with FSDP2; the NP components stay whole on every one.

Only matrices of decoder layers are sharded. Norms and biases stay whole, because ``vector_penalty`` reads a layer's norm
outside its forward and they are less than 0.01 % of a layer; embeddings and head stay whole, because KL reads the head's
weight chunk by chunk (Llama-3.1-8B: 2.0 of 15.0 GiB in bf16).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from .forward import decoder_of
from .install import npt_parameters
from .select import find_layers
from .sharding import gathered, is_sharded, local_part
from .weight_location import set_residence

__all__ = ["shard_base"]


def shard_base(model: nn.Module, device: torch.device | str, mesh: Any = None) -> int:
    """Shard the matrices of every decoder layer of a converted model over the processes of ``mesh``, in place.

    The model may be on the host: layers move to ``device`` one after the other, each only as its shard, so a device holds one
    whole layer at most. Every process must have the whole model and call this.

    Args:
        model: A converted model; convert it first, since the closed form reads whole weights.
        device: Where shards, NP components and all that is not sharded go.
        mesh: A one-dimensional device mesh; ``None``: all processes.

    Returns:
        Bytes of the base that this process still holds between two forwards.

    Raises:
        ValueError: The model is not converted, sharded already, or holds weights that cannot be sharded (quantised ones).
        RuntimeError: This torch has no FSDP2 that can recover from a stopped forward.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "reset_iter_state"):
        raise RuntimeError(
            f"optimization.distributed=fsdp needs a newer torch than {torch.__version__} (tested with 2.13); use ddp"
        )
    if is_sharded(model):
        raise ValueError("the model is sharded already; shard a model once")
    own = set(npt_parameters(model))
    _, layers = find_layers(model)
    matrices = {p for p in layers.parameters() if p.dim() > 1 and p not in own}
    odd = next((p for p in matrices if not p.is_floating_point() or type(p) is not nn.Parameter), None)
    if odd is not None:
        raise ValueError(
            f"a weight of type {type(odd).__name__} and dtype {odd.dtype} cannot be sharded; use optimization.quantization=none "
            "with distributed=fsdp, or distributed=ddp"
        )
    rest = {p for p in model.parameters() if p not in matrices}
    # FSDP2 lets go of a whole matrix when nobody refers to it any more: this set would keep all of them to the last layer.
    del matrices
    for parameter in rest:
        parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    residence = _Shards(torch.device(device))
    # By itself fully_shard takes a GPU where there is one, wherever the model computes.
    mesh = mesh or init_device_mesh(residence.device.type, (get_world_size(),))
    for layer in layers:
        set_residence(layer, residence)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=rest)
    # The root owns nothing; it ties the layers together, whichever of them a forward meets first.
    root = decoder_of(model)
    fully_shard(root, mesh=mesh, ignored_params=set(root.parameters()))
    return sum(local_part(p).numel() * p.element_size() for p in model.parameters() if p not in own)


class _Shards:
    """The residence of sharded layers: whoever visits one for several micro-batches gathers it once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def hold(self, layer: nn.Module) -> AbstractContextManager[None]:
        return gathered(layer)
