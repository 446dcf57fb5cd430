"""The frozen base sharded over processes with FSDP2 (``fully_shard``); the NP components stay whole on every one of them.

Only matrices of decoder layers are sharded. Norms and biases stay whole, because ``vector_penalty`` reads a layer's norm
outside its forward and they are less than 0.01 % of a layer; embeddings and head stay whole, because KL reads the head's
weight chunk by chunk (Llama-3.1-8B: 2.0 of 15.0 GiB in bf16).

How the hooks are ordered: FSDP2 gathers a layer in a pre-forward hook and frees it again in a forward hook. The taps of
``models/walk.py`` come *before* that forward hook (``prepend=True``), so a visited layer is still whole while its student and
its local backward run. Anywhere else :func:`gathered` makes it whole; ``walk_group`` does, once for all micro-batches of a visit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .forward import decoder_of
from .weight_location import set_residence

__all__ = ["forget_broken_forward", "gathered", "is_sharded", "local_part", "shard_base", "whole"]


def _fsdp_class() -> Any:
    """``FSDPModule``, or ``None`` where nobody has imported it: then nothing is sharded."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def is_sharded(model: nn.Module) -> bool:
    """Whether any part of the model is an FSDP2 module."""
    cls = _fsdp_class()
    return cls is not None and any(isinstance(module, cls) for module in model.modules())


def local_part(tensor: Tensor) -> Tensor:
    """This process's rows of a sharded tensor; any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()  # type: ignore[no-any-return]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (a collective: every process must call it); any other tensor itself."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()  # type: ignore[no-any-return]


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

    from .patching import find_layers, npt_parameters

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


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """Inside the block the layer's weights are whole, through any number of its forwards; a no-op if it is not sharded.

    Every process must enter it. Backward through those weights belongs inside too.
    """
    cls = _fsdp_class()
    if cls is None or not isinstance(layer, cls):
        yield
        return
    layer.unshard()
    # Else the first forward inside would free them again.
    layer.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        layer.set_reshard_after_forward(True, recurse=False)
        layer.reshard()


class _Shards:
    """The residence of sharded layers: whoever visits one for several micro-batches gathers it once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def hold(self, layer: nn.Module) -> AbstractContextManager[None]:
        return gathered(layer)


def forget_broken_forward(model: nn.Module) -> None:
    """After a forward that an exception ended: free what FSDP2 had gathered and let the next forward start clean.

    A no-op for a model that is not sharded. Every process must have stopped at the same place.
    """
    cls = _fsdp_class()
    root = decoder_of(model)
    if cls is not None and isinstance(root, cls):
        root.reset_iter_state()
