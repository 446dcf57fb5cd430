"""The one place that knows an order: what the MLP reads, what it saves, and the schema made from both.

``Operands`` is also the shape of what is asked for (bools) and of what the backward returns (gradients). ``key`` is a target's
``w_a_up``, ``value`` its ``w_b_up``: key and value of a rank-1 change of a linear memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from ...kernels.steps import Projection, Spec

__all__ = ["BACKWARD_SCHEMA", "FORWARD_SCHEMA", "NUM_SAVED", "NUM_TENSORS", "Operands", "Projection", "Saved", "Spec"]


class Operands(NamedTuple):
    """``x [T, d]``, ``a [T, d_a]``, ``key_scale [T]`` or ``None``, ``w_down [d_a, R]``; a plain MLP has an empty ``gate``.

    Without a ``w_down`` the ``a`` is the bottleneck itself, ``z [T, R]``. ``row_scale [T]`` is a factor 1 on ``x`` and on
    ``key_scale``, of which only the gradient counts.
    """

    x: Any
    a: Any
    key_scale: Any
    w_down: Any
    gate: Projection
    up: Projection
    down: Projection
    row_scale: Any = None

    @classmethod
    def of(cls, flat: Iterable[Any]) -> Operands:
        """From the flat order of the schema."""
        # Spelled out: five of these are made in a training step, 3 us each as a loop.
        (
            x, a, key_scale, w_down, gate_weight, gate_bias, gate_key, gate_value, up_weight, up_bias, up_key, up_value,
            down_weight, down_bias, down_key, down_value, row_scale,
        ) = flat  # fmt: skip
        return cls(
            x, a, key_scale, w_down, Projection(gate_weight, gate_bias, gate_key, gate_value),
            Projection(up_weight, up_bias, up_key, up_value), Projection(down_weight, down_bias, down_key, down_value), row_scale,
        )  # fmt: skip

    def flat(self) -> tuple[Any, ...]:
        """In the order of the schema."""
        return (*self[:4], *self.gate, *self.up, *self.down, self.row_scale)


class Saved(NamedTuple):
    """What the forward makes for the backward: ``z [T, R]`` (if not given), the key products, the pre-activations ``[T, f]``."""

    z: Any
    p_gate: Any
    p_up: Any
    p_down: Any
    gate: Any
    up: Any


_GATE, _UP, _DOWN = (
    Projection(*(f"{target}_{part}" for part in Projection._fields)) for target in ("gate", "up", "down")
)
_NAMES = Operands("x", "a", "key_scale", "w_down", _GATE, _UP, _DOWN, "row_scale").flat()
_ALWAYS = {"x", "a", "up_weight", "down_weight"}
_SPEC = "str act, str rule, int num_ranks, float scale"

#: Tensors among the arguments of ``npt_kernels::mlp``, and of its backward's saved ones.
NUM_TENSORS = len(_NAMES)
NUM_SAVED = len(Saved._fields)

_INPUTS = ", ".join(f"Tensor{'' if name in _ALWAYS else '?'} {name}" for name in _NAMES)
FORWARD_SCHEMA = (
    f"({_INPUTS}, {_SPEC}, bool save, str backend) -> (Tensor out, {', '.join(f'Tensor {n}' for n in Saved._fields)})"
)
#: ``saved_*`` of the forward's outputs keep names of their own: gate and up are projections among the operands.
BACKWARD_SCHEMA = (
    f"(Tensor dout, {', '.join(f'Tensor? {name}' for name in _NAMES)}, "
    f"{', '.join(f'Tensor? saved_{name}' for name in Saved._fields)}, "
    f"int[] sizes, bool[] needs, {_SPEC}, str backend, bool overwrite=False) -> Tensor[]"
)
