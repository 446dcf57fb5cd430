"""The ops of one backend called directly, below dispatch and autograd, with flat tensors in the order of the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from npt_kernels.kernels.steps import Projection, Spec
from npt_kernels.ops.factored_linear import op as factored_op
from npt_kernels.ops.mlp import plan
from npt_kernels.ops.mlp.operands import Operands, Saved
from npt_kernels.ops.registry import get_steps

__all__ = ["FactoredCalls", "MlpCalls", "mlp_operands"]


def mlp_operands(args: Sequence[Any]) -> Operands:
    """From 16 tensors in the order of the public functions (``helpers.MLP_TENSORS``)."""
    x, a, key_scale, gate_w, up_w, down_w, gate_b, up_b, down_b, w_down, gk, gv, uk, uv, dk, dv = args
    gate, up, down = map(Projection, (gate_w, up_w, down_w), (gate_b, up_b, down_b), (gk, uk, dk), (gv, uv, dv))
    return Operands(x, a, key_scale, w_down, gate, up, down)


class MlpCalls:
    """``mlp`` on the backend of that name."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        """``(out, z, p_gate, p_up, p_down, gate, up)`` of 16 tensors, then act, rule, num_ranks, scale, save."""
        *spec, save = args[16:]
        out, made = plan.forward(get_steps(self.backend), mlp_operands(args[:16]), Spec(*spec), save)
        return (out, *made)

    def backward(self, dout: Tensor, *args: Any) -> list[Tensor]:
        """Gradients that ``needs`` asks for, in the forward's order of tensors.

        ``args``: x, a, key_scale, three weights, w_down, three pairs of key and value, the six results after ``out``, gated, act,
        rule, num_ranks, scale, needs, and ``overwrite`` if wanted.
        """
        gated, *spec, needs = args[19:25]
        overwrite = bool(args[25:] and args[25])
        o, need = mlp_operands((*args[:6], None, None, None, *args[6:13])), mlp_operands(tuple(needs))
        g = plan.backward(
            get_steps(self.backend), dout, o, Saved(*args[13:19]), need, Spec(*spec), gated, overwrite
        )  # fmt: skip
        targets = (g.gate, g.up, g.down)
        flat = (
            g.x, g.a, g.key_scale, *(t.weight for t in targets), *(t.bias for t in targets), g.w_down,
            *(part for t in targets for part in (t.key, t.value)),
        )  # fmt: skip
        wanted = [grad for grad, needed in zip(flat, needs, strict=True) if needed]
        assert all(grad is not None for grad in wanted)
        return wanted


class FactoredCalls:
    """``factored_linear`` on the backend of that name."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        """``(y, p)`` of x, z, weight, w_a_up, w_b_up, bias, rule, num_ranks, scale."""
        return factored_op._forward(*args, self.backend)

    def backward(self, *args: Any) -> list[Tensor]:
        """Of dy, x, z, weight, w_a_up, w_b_up, p, rule, num_ranks, scale, needs."""
        *tensors, rule, num_ranks, scale, needs = args
        return factored_op._raw_backward(*tensors, 0, rule, num_ranks, scale, self.backend, needs)
