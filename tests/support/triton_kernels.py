"""Dtypes and odd layouts that the kernels' tests share."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: What a tensor's memory may look like; :func:`odd` makes them.
LAYOUTS = ("contiguous", "transposed", "strided", "expanded", "offset")


def odd(tensor: Tensor, layout: str) -> Tensor:
    """The tensor (or, when expanded, its first row everywhere) in an unusual layout."""
    if tensor.dim() < 2 or layout == "contiguous":
        return tensor
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":  # every second column of a wider buffer
        buffer = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
        view = buffer[..., : 2 * tensor.shape[-1] : 2]
        return view.copy_(tensor)
    if layout == "offset":  # columns of a wider buffer, base not aligned to 16 bytes
        buffer = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 5), float("nan"))
        view = buffer[..., 3 : 3 + tensor.shape[-1]]
        return view.copy_(tensor)
    assert layout == "expanded"
    return tensor[:1].expand_as(tensor) if tensor.shape[0] else tensor
