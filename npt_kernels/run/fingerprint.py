"""Fingerprints: of the frozen base, which must not move, and of the training text, which a resumed run expects again."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from ..model.install import converted_layers
from ..model.sharding import local_part
from ..quantised.foreign import stored_tensors

__all__ = ["base_fingerprint", "text_fingerprint"]

#: Sequences, evenly over all, that tell one training text from another.
_ROWS = 4096
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def base_fingerprint(model: nn.Module) -> dict[str, int]:
    """Name → sum of the bit patterns, for all that is stored and no NP component's (quantised weights too): equal if nothing
    moved. A sharded parameter has the sum of its shards, which is that of the whole; every process must call this then."""
    parts = [
        layer._modules.get(name) for layer in converted_layers(model).values() for name in ("np_component", "np_extra")
    ]
    own = {id(p) for part in parts if part is not None for p in part.parameters()}
    return {
        name: _bit_sum(t)
        for name, t in stored_tensors(model)
        if id(t) not in own and not t.is_meta and not t.is_complex()
    }


def _bit_sum(tensor: Tensor) -> int:
    part = local_part(tensor.detach())
    total = part.contiguous().view(_INTEGER[part.element_size()]).sum(dtype=torch.int64)
    if (mesh := getattr(tensor, "device_mesh", None)) is not None:
        torch.distributed.all_reduce(total, group=mesh.get_group())
    return int(total)


def text_fingerprint(train: Any) -> str | None:
    """Of token ids ``[n, L]``; ``None`` for a stream, whose position knows what it belongs to."""
    if not isinstance(train, Tensor):
        return None
    rows = train[:: max(1, len(train) // _ROWS)].contiguous()
    digest = hashlib.sha256(str(list(train.shape)).encode())
    digest.update(rows.cpu().numpy().tobytes())
    return digest.hexdigest()
