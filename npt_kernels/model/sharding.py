"""Working with a model whose layers FSDP2 may have sharded: is it, what is this process's part, the whole for a while.

Everything is a no-op on a model that is not sharded; :mod:`.shard_base` shards one.

How the hooks are ordered: FSDP2 gathers a layer in a pre-forward hook and frees it again in a forward hook. The taps of
:mod:`.visits` come *before* that forward hook (``prepend=True``), so a visited layer is still whole while its student and
its local backward run. Anywhere else :func:`gathered` makes it whole; ``walk_group`` does, once for all micro-batches of a visit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .forward import decoder_of

__all__ = ["forget_broken_forward", "gathered", "is_sharded", "local_part", "whole"]


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


def forget_broken_forward(model: nn.Module) -> None:
    """After a forward that an exception ended: free what FSDP2 had gathered and let the next forward start clean.

    A no-op for a model that is not sharded. Every process must have stopped at the same place.
    """
    cls = _fsdp_class()
    root = decoder_of(model)
    if cls is not None and isinstance(root, cls):
        root.reset_iter_state()
