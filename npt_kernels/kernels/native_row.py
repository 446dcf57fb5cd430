"""The second half of a converted layer for one token on a CPU, in one call of compiled code (``csrc/cpu``).

Where no C++ compiler was found at installation there is none, and the callers do the same with torch. The compiled code reads
addresses, so dtypes, strides and devices are checked here. Who keeps a :class:`NativeRow` asks it whether a tensor :meth:`moved`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..rules import get_rule
from . import native
from .steps import Projection

__all__ = ["NativeRow", "mlp_row", "native_row"]

_NORMS = {"given": 0, "rms": 1, "layer": 2}
_ABSENT = (0, 0, 0, 0, 0, 1)


class NativeRow:
    """One layer's call, for as long as the tensors that it reads stay where they were.

    ``row(h, heard, u, scale) -> out [1, d_out]``: contiguous rows of the layer's dtype; ``u`` and the key scale ``[1]`` only
    where the norm is ``given``, ``h`` only where it is not.
    """

    def __init__(
        self, layer: Any, width: int, dtype: torch.dtype, watched: Sequence[Tensor], kept: Sequence[Tensor | None]
    ) -> None:
        self._run, self._width, self._dtype, self._kept = layer.run, width, dtype, kept
        self._at = [(tensor, tensor.data_ptr()) for tensor in watched]

    def moved(self) -> bool:
        """Whether another ``.data`` was put into one of the watched tensors."""
        return any(tensor.data_ptr() != address for tensor, address in self._at)

    def __call__(self, h: Tensor | None, heard: Tensor, u: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        out = torch.empty(1, self._width, dtype=self._dtype)
        self._run(
            0 if h is None else h.data_ptr(), heard.data_ptr(), 0 if u is None else u.data_ptr(),
            0 if scale is None else scale.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out


def native_row(
    bottleneck: tuple[Tensor | None, Tensor | None],
    projections: list[Projection],
    values: dict[str, Tensor],
    act: str,
    dtype: torch.dtype,
    *,
    norm: str,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    matches_change: bool = False,
    watched: Sequence[Tensor] = (),
) -> NativeRow | None:
    """``None`` where the compiled code is not there or cannot read these tensors.

    Args:
        bottleneck: ``W [R, width of what is heard]`` and ``b [R]`` or ``None`` of ``z = heard Wᵀ + b``, of the values' dtype,
            float32 or bfloat16. Without ``W`` what is heard is ``z``.
        projections: Gate (without weight: none), up, down; of their keys and values nothing is read.
        values: Slot → ``w_b_up [R, out]``.
        act: Name of the activation.
        norm: ``given``, ``rms``, ``layer``; ``rms1`` and ``layer1`` multiply with 1 + weight.
        matches_change: Statistics of ``h + m``, ``m`` the change of the last linear's output, and not of ``h`` + what is heard.
        watched: The tensors whose storage projections and norm are views of. They are not kept alive by it: streamed weights come
            and go. Bottleneck and values are.
    """
    gate, up, down = projections
    number = native.act_number(act)
    component = next((t.dtype for t in (bottleneck[0], *values.values()) if t is not None), dtype)
    if native.compiled is None or dtype not in native.DTYPES or component not in native.DTYPES or number is None:
        return None

    def address(tensor: Tensor | None, wanted: torch.dtype) -> int:
        if tensor is None:
            return 0
        if tensor.dtype is not wanted or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise _UnreadableError
        return tensor.data_ptr()

    def linear(weight: Tensor | None, bias: Tensor | None, wanted: torch.dtype) -> tuple[int, ...]:
        if weight is None:
            return _ABSENT
        row, col = weight.stride()
        if weight.dtype is not wanted or weight.device.type != "cpu" or 1 not in (row, col):
            raise _UnreadableError
        out, fan_in = weight.shape
        return weight.data_ptr(), address(bias, wanted), out, fan_in, row if col == 1 else 1, col

    assert up.weight is not None and down.weight is not None
    f, d = up.weight.shape
    width = down.weight.shape[0]
    rank = bottleneck[0].shape[0] if bottleneck[0] is not None else next((len(v) for v in values.values()), 0)
    shapes = {"gate": (rank, f), "up": (rank, f), "down": (rank, width)}
    if any(tuple(value.shape) != shapes[slot] for slot, value in values.items()):
        return None
    if down.weight.shape[1] != f or (gate.weight is not None and gate.weight.shape != up.weight.shape):
        return None
    # What the norm adds to h is as wide as h.
    beside = width if matches_change else rank if bottleneck[0] is None else bottleneck[0].shape[1]
    if norm != "given" and beside != d:
        return None
    try:
        made = (
            (0, 0, rank, rank, 0, 1) if bottleneck[0] is None else linear(bottleneck[0], bottleneck[1], component),
            linear(gate.weight, gate.bias, dtype), linear(up.weight, up.bias, dtype), linear(down.weight, down.bias, dtype),
            *(address(values.get(slot), component) for slot in ("gate", "up", "down")),
        )  # fmt: skip
        vectors = address(norm_weight, dtype), address(norm_bias, dtype)
    except _UnreadableError:
        return None
    kinds = native.DTYPES[dtype], native.DTYPES[component], number, _NORMS[norm.removesuffix("1")], norm.endswith("1")
    layer = native.compiled.Layer(*kinds, matches_change, eps, d, rank, *vectors, *made)
    return NativeRow(layer, width, dtype, watched, (*bottleneck, *values.values()))


def mlp_row(o: Any, spec: Any) -> Tensor | None:
    """The op ``mlp`` for one token without gradients, ``o`` its operands; ``None`` where this cannot compute it."""
    x, values = (
        o.x,
        {slot: t.value for slot, t in (("gate", o.gate), ("up", o.up), ("down", o.down)) if t.value is not None},
    )
    plain = (x, o.a, o.key_scale, o.w_down, *o.gate[:2], *o.up[:2], *o.down[:2], *values.values())
    if (
        native.compiled is None
        or x.dtype not in native.DTYPES
        or o.row_scale is not None
        or get_rule(spec.rule).key != "none"
    ):
        return None
    if not all(t is None or type(t) is Tensor or type(t) is Parameter for t in plain) or native.traced():
        return None
    w_down = None if o.w_down is None else o.w_down.t()
    row = native_row((w_down, None), [o.gate, o.up, o.down], values, spec.act, x.dtype, norm="given")
    return None if row is None else row(None, o.a.contiguous(), x.contiguous(), o.key_scale)


class _UnreadableError(Exception):
    pass
