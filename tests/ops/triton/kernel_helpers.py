"""The 2× rule and the odd tensors that the kernels' tests share.

An implementation passes if its largest error against float64 is at most twice that of torch in the same dtype on the same
inputs, plus ``2·eps·max|truth|`` (rounding the result twice), which matters only where torch was lucky.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: What a tensor's memory may look like; :func:`odd` makes them.
LAYOUTS = ("contiguous", "transposed", "strided", "expanded", "offset")


def assert_within_twice(actual: Tensor, reference: Tensor, truth: Tensor, what: str = "") -> None:
    """``max|actual − truth| ≤ 2·max|reference − truth| + 2·eps·max|truth|``; dtype and shape as the reference's."""
    assert actual.dtype == reference.dtype, f"{what}: dtype {actual.dtype}, reference {reference.dtype}"
    assert actual.shape == reference.shape == truth.shape, f"{what}: {actual.shape}, {reference.shape}, {truth.shape}"
    assert truth.dtype == torch.float64
    if truth.numel() == 0:
        return
    assert bool(actual.isfinite().all()), f"{what}: not finite"
    error, allowed = ((t.double() - truth).abs().max() for t in (actual, reference))
    bound = 2 * allowed + 2 * torch.finfo(actual.dtype).eps * truth.abs().max()
    assert error <= bound, f"{what}: error {error:.3e} > {bound:.3e}, torch's own {allowed:.3e}"


def randn(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


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
