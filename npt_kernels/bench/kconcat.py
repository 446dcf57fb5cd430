"""The strongest baseline without a custom kernel: the low-rank part as further columns of K in the vendor's own GEMM.

``y = [x | c] [W | B]ᵀ`` over padded buffers (row pitch a multiple of 64 elements, research/kernels.md §4b). Writing ``c`` into
its columns is part of its time; repacking the frozen weights, which a user does once, is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..activations import get_activation
from ..measure.problems import Problem
from ..rules import get_rule

__all__ = ["kconcat_forward"]


class _Concatenated(torch.autograd.Function):
    """``y = [x | c] @ stackedᵀ``; backward: ``[dx | dc] = dy @ stacked`` in one product where dx is wanted, else dc alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, value: Tensor, stacked: Tensor, buffer: Tensor | None) -> Tensor:
        d, rank = x.shape[1], c.shape[1]
        if buffer is None:
            buffer = torch.empty(len(x), stacked.stride(0), dtype=x.dtype, device=x.device)
            buffer[:, :d] = x
        buffer[:, d : d + rank] = c
        ctx.save_for_backward(c, value, stacked)
        ctx.d = d
        return buffer[:, : d + rank] @ stacked.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (dy,) = grads
        c, value, stacked = ctx.saved_tensors
        need_x, need_c, need_value = ctx.needs_input_grad[:3]
        dx = dc = None
        if need_x:
            both = dy @ stacked
            dx, dc = both[:, : ctx.d], both[:, ctx.d :]
        elif need_c:
            dc = dy @ value.t()
        return dx, dc, c.t() @ dy if need_value else None, None, None


def _stack(weight: Tensor, value: Tensor) -> Tensor:
    out, fan_in = weight.shape
    rank = len(value)
    buffer = torch.zeros(out, fan_in + -(-rank // 64) * 64, dtype=weight.dtype, device=weight.device)
    buffer[:, :fan_in], buffer[:, fan_in : fan_in + rank] = weight, value.t()
    return buffer[:, : fan_in + rank]


def kconcat_forward(problem: Problem) -> Callable[[dict[str, Tensor]], Tensor]:
    """``compute(tensors) -> y`` of the op ``mlp`` or ``factored_linear``; the weights are packed here, once."""
    case, model, tensors = problem.case, problem.case.model, problem.tensors
    rule = get_rule(case.rule)
    # What produces x is assumed to write it with this pitch; the buffer is shared by all calls, as it would be in a model.
    width = model.d + -(-case.rank // 64) * 64
    shared = torch.zeros(case.tokens, width, dtype=case.dtype, device=problem.device)
    shared[:, : model.d] = tensors["x"]

    def coefficients(u: Tensor, z: Tensor, key: Tensor | None) -> Tensor:
        if rule.key == "none":
            return z
        assert key is not None
        p = u @ (key.t() if key.dim() == 2 else key.unsqueeze(1))
        return rule.coefficients(z, p, case.num_ranks, 1.0)

    if case.op == "factored_linear":
        stacked = _stack(tensors["weight"], tensors["w_b_up"])

        def linear(t: dict[str, Tensor]) -> Tensor:
            c = coefficients(t["x"], t["z"], t.get("w_a_up"))
            return _Concatenated.apply(t["x"], c, t["w_b_up"], stacked, shared)  # type: ignore[no-any-return]

        return linear
    weights = {name: _stack(tensors[f"{name}_weight"], tensors[f"{name}_value"]) for name in model.targets}
    act = get_activation(model.act).forward

    def mlp(t: dict[str, Tensor]) -> Tensor:
        z = t["a"] @ t["w_down"]
        scaled = z * t["key_scale"].unsqueeze(1) if "key_scale" in t else z

        def project(target: str, u: Tensor, bottleneck: Tensor, buffer: Tensor | None) -> Tensor:
            c = coefficients(u, bottleneck, t.get(f"{target}_key"))
            return _Concatenated.apply(u, c, t[f"{target}_value"], weights[target], buffer)  # type: ignore[no-any-return]

        up = project("up", t["x"], scaled, shared)
        inter = act(project("gate", t["x"], scaled, shared)) * up if model.gated else act(up)
        return project("down", inter, z, None)

    return mlp
