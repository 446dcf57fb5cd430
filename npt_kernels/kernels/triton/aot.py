"""What a kernel file says about itself so that it can be compiled and checked without a GPU (``tools/check_triton.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["AotSpec"]


@dataclass(frozen=True)
class AotSpec:
    """One kernel at one real configuration.

    Attributes:
        name: Row of the table.
        fn: The ``@triton.jit`` function.
        signature: Argument name → type as Triton writes it (``*bf16``, ``i32``, ``i64``, ``fp32``), constexprs included as
            ``"constexpr"``.
        constexprs: Values of the constexpr arguments.
        num_warps, num_stages: Launch options.
        divisible_by_16: Arguments that a real call passes divisible by 16 (Triton specialises on that: vector loads).
        equal_to_1: Arguments that a real call passes as 1 (contiguous strides).
        tensor_core: Whether tensor-core instructions must appear.
        wgmma: Whether, on sm_90, those must be ``wgmma`` (a tile with fewer than 64 rows uses ``mma.sync``).
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible_by_16: tuple[str, ...] = ()
    equal_to_1: tuple[str, ...] = ()
    tensor_core: bool = True
    wgmma: bool = False
