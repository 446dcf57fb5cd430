"""The steps that a backend supplies, and what they hand to each other. The order in which they run is in ``ops/*/passes.py``.

Shapes: ``T`` tokens, ``R`` = k·r columns of the bottleneck, ``P`` columns of a key product (R for a matrix key, 1 for a vector
key). All tensors are flat ``[T, ...]``. ``c [T, R]`` are a rule's coefficients: ``ΔW_t u_t = c_t @ w_b_up``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from .cpu_layout import k_contiguous

__all__ = ["Bottleneck", "Low", "Projection", "Spec", "Steps"]


class Projection(NamedTuple):
    """One frozen linear and its per-token change; also the shape of what is asked of it (bools) and of its gradients."""

    weight: Any = None
    """``[out, in]``"""
    bias: Any = None
    """``[out]`` or ``None``"""
    key: Any = None
    """``w_a_up``: ``[R, in]``, ``[in]`` or ``None``, as the rule says"""
    value: Any = None
    """``w_b_up [R, out]``; ``None``: this projection does not change"""


class Spec(NamedTuple):
    """What is no tensor."""

    act: str
    rule: str
    num_ranks: int
    scale: float


class Bottleneck:
    """``z = a @ w_down`` and the key scale that some targets multiply it with. Each is computed once, by whoever needs it first.

    ``z`` is made here by the vendor's GEMM, unless a backend's kernel made it along with the first coefficients and set it.
    """

    __slots__ = ("_scaled", "_z", "a", "key_scale", "w_down")

    def __init__(
        self,
        z: Tensor | None = None,
        key_scale: Tensor | None = None,
        *,
        a: Tensor | None = None,
        w_down: Tensor | None = None,
    ) -> None:
        self.a, self.w_down, self.key_scale = a, w_down, key_scale
        self._z: Tensor | None = z
        self._scaled: Tensor | None = None

    @property
    def made(self) -> bool:
        """Whether there is a ``z`` yet."""
        return self._z is not None

    @property
    def z(self) -> Tensor:
        """``[T, R]``, not scaled."""
        if self._z is None:
            self._z = self.a @ k_contiguous(self.w_down)  # type: ignore[operator, arg-type]
        return self._z

    @z.setter
    def z(self, value: Tensor) -> None:
        self._z = value

    @property
    def scaled(self) -> Tensor:
        """``z̃ = key_scale ⊙ z [T, R]``."""
        if self.key_scale is None:
            return self.z
        if self._scaled is None:
            self._scaled = self.z * self.key_scale.unsqueeze(1)
        return self._scaled


class Low(NamedTuple):
    """The low-rank side of one target."""

    p: Tensor | None
    """key product ``[T, P]``; ``None`` for a rule without key"""
    c: Tensor
    """coefficients ``[T, R]``"""
    own: bool = False
    """whether the kernel put on the stream last is this package's, so that the next one may start under it"""


class Steps(ABC):
    """What a backend computes. ``eager.EagerSteps`` has all of it on the vendor's GEMM; others subclass that and override."""

    #: Whether :meth:`activate_backward` can write over the saved gate and up.
    overwrites_saved: bool = False

    def mlp_row(self, operands: Any, spec: Spec) -> Tensor | None:
        """The op ``mlp`` for one token without gradients, ``[1, d_out]``, where there is something better than its steps."""
        return None

    # ---- targets: mlp and factored_linear -------------------------------------------------------------------------------

    @abstractmethod
    def readable(self, u: Tensor) -> Tensor:
        """``u`` as this backend's kernels read it: itself, or a copy. Asked before anything else is launched."""

    @abstractmethod
    def low(self, u: Tensor, target: Projection, source: Bottleneck, spec: Spec) -> Low:
        """Key product and coefficients of a target with input ``u``; z̃ is ``source.scaled``."""

    @abstractmethod
    def project(self, u: Tensor, target: Projection, low: Low | None, spec: Spec, *, chained: bool) -> Tensor:
        """``u Wᵀ + c @ w_b_up + bias  [T, out]``; ``low`` is ``None`` where there is no delta.

        ``chained``: the kernel before on the stream is this package's, and weights were final before that one.
        """

    @abstractmethod
    def activate(
        self,
        x: Tensor,
        gate: Projection,
        up: Projection,
        low_gate: Low | None,
        low_up: Low | None,
        spec: Spec,
        save: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``(inter, gate, up)``, each ``[T, f]``: ``act(gate) ⊙ up``, or ``act(up)`` where ``gate.weight`` is ``None``.

        The pre-activations are returned if ``save``.
        """

    @abstractmethod
    def recompute(self, gate: Tensor | None, up: Tensor, spec: Spec) -> Tensor:
        """``inter`` from the saved pre-activations."""

    @abstractmethod
    def value_grads(
        self,
        dy: Tensor,
        value: Tensor,
        source: Bottleneck,
        p: Tensor | None,
        spec: Spec,
        want_z: bool,
        want_p: bool,
        want_value: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """``(dz̃ [T, R], dp [T, P], d w_b_up [R, out])`` from ``dy [T, out]``; only what is wanted."""

    @abstractmethod
    def key_grad(self, dp: Tensor, u: Tensor, spec: Spec) -> Tensor:
        """``d w_a_up = dpᵀ @ u``: ``[R, in]`` or ``[in]``."""

    @abstractmethod
    def activate_backward(
        self,
        dout: Tensor,
        down: Projection,
        dp: Tensor | None,
        gate: Tensor | None,
        up: Tensor,
        spec: Spec,
        want_gate: bool,
        want_up: bool,
        overwrite: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """``(dgate, dup)`` from ``dinter = dout @ Wd + dp @ w_a_up``. ``overwrite``: ``gate`` and ``up`` may be written over."""

    @abstractmethod
    def input_grad(self, terms: list[tuple[Tensor, Projection, Tensor | None]], spec: Spec) -> Tensor:
        """``dx = Σ dy @ W + dp @ w_a_up`` over ``(dy, target, dp)``; at least one term."""

    @abstractmethod
    def merge(
        self, shares: list[Tensor], dz_down: Tensor | None, source: Bottleneck, want_scale: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``(dz, d key_scale)``: the targets' shares of dz̃ through the key scale, plus ``dz_down``. May write into them."""

    @abstractmethod
    def bottleneck_grad(self, dz: Tensor, a: Tensor) -> Tensor:
        """``d w_down = aᵀ @ dz  [d_a, R]``."""

    # ---- the explicit form ----------------------------------------------------------------------------------------------

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor, v_a: Tensor, v_b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(y [T, out], s [T, k])`` with ``s_j = ⟨v_a,j, x⟩``."""

    @abstractmethod
    def linear_backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        v_a: Tensor | None,
        v_b: Tensor | None,
        s: Tensor | None,
        needs: list[bool],
    ) -> list[Tensor]:
        """Gradients of (x, weight, v_a, v_b, bias) where ``needs`` is true, in that order."""

    # ---- the norm before the MLP ----------------------------------------------------------------------------------------

    @abstractmethod
    def matched_norm(
        self, h: Tensor, a: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
    ) -> tuple[Tensor, Tensor]:
        """``(u [T, d], key_scale [T])``."""

    @abstractmethod
    def matched_norm_backward(
        self,
        du: Tensor | None,
        d_key_scale: Tensor | None,
        h: Tensor,
        a: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        kind: str,
        eps: float,
        needs: list[bool],
    ) -> list[Tensor]:
        """Gradients of (h, a, weight, bias) where ``needs`` is true, in that order."""
