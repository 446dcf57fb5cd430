"""RMSNorm and LayerNorm with the *norm match* of the closed form (``docs/method.md``).

The original MLP input is ``norm(h + a)``; the converted one is built from ``h`` alone. Dividing by the norm of ``h + a``
instead of that of ``h`` makes the two differ by a term that is linear in ``a``:

    RMSNorm    norm(h + a) = γ ⊙ h/ρ_T + γ ⊙ a/ρ_T                       ρ_T = sqrt(mean((h + a)²) + eps)
    LayerNorm  norm(h + a) = γ ⊙ (h − mean h)/σ_T + β + γ ⊙ (a − mean a)/σ_T

so the returned input is ``u = γ ⊙ h/ρ_T`` (that is α·norm(h), α = ρ(h)/ρ_T) and the key scale is ``1/ρ_T`` per token.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..argument_checks import differ
from ..ops.matched_norm import matched_norm as matched_norm_op
from ..ops.registry import resolve_backend

__all__ = ["NormKind", "identify_norm", "matched_norm", "matched_scale", "norm_eps", "norm_weight"]

#: ``rms1`` and ``layer1`` multiply with ``1 + weight`` (Gemma, Nemotron); ``none`` is no norm.
NormKind = Literal["rms", "layer", "rms1", "layer1", "none"]


def norm_weight(norm: nn.Module, kind: NormKind) -> Tensor | None:
    """What the normed input is multiplied with, ``[d]`` or ``None``."""
    weight: Tensor | None = getattr(norm, "weight", None)
    return weight if weight is None or not kind.endswith("1") else 1 + weight


def norm_eps(norm: nn.Module) -> float:
    """The epsilon of a norm module under the names in use (``variance_epsilon``, ``eps``)."""
    for name in ("variance_epsilon", "eps"):
        value = getattr(norm, name, None)
        if isinstance(value, float | int):
            return float(value)
    # F.layer_norm with nothing but a shape (OLMo 1) has the default of its own; identify_norm tries it.
    return 1e-5 if isinstance(getattr(norm, "normalized_shape", None), tuple | list) else 0.0


def matched_norm(
    norm: nn.Module, kind: NormKind, h: Tensor, a: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """``(u [..., d], key_scale [...])`` from the layer input ``h`` and the attention output ``a``, both ``[..., d]``.

    Both results are differentiable. Statistics are taken in float32 at least, over the same rounded sum ``h + a`` that the
    original layer norms. Maths, gradients and the fused kernel: ``ops/matched_norm``.

    Args:
        norm: The layer's norm module; its ``weight`` and ``bias`` (either may be absent) and its epsilon are read.
        kind: What it computes, as :func:`identify_norm` finds.
        backend: By name; ``None`` leaves it to ``NPT_BACKEND`` or the automatic choice.

    Raises:
        ValueError: ``h`` and ``a`` differ in shape.
        BackendUnavailableError: The backend asked for cannot run this call.
    """
    if differ(h.shape, a.shape):
        raise ValueError(f"matched_norm: h has shape {list(h.shape)} but a {list(a.shape)}; both are [..., d]")
    width = h.shape[-1]
    weight, bias = norm_weight(norm, kind), getattr(norm, "bias", None)
    chosen = resolve_backend("matched_norm", backend, h.device, h.dtype)
    flat_h, flat_a = h.reshape(-1, width), a.reshape(-1, width)
    u, key_scale = matched_norm_op(flat_h, flat_a, weight, bias, kind.removesuffix("1"), norm_eps(norm), chosen)
    return u.reshape(h.shape), key_scale.reshape(h.shape[:-1])


def matched_scale(kind: NormKind, h: Tensor, a: Tensor, scale: Tensor) -> Tensor:
    """Ones ``[...]`` whose gradient with respect to ``a`` is that of ``log 1/ρ_T``, for ``scale [...] = 1/ρ_T`` of ``h + a``.

    In float32 at least, in which their gradient is summed.
    """
    return _MatchedScale.apply(kind, h, a, scale)  # type: ignore[no-any-return]


class _MatchedScale(torch.autograd.Function):
    """``∂ log s / ∂a = −s² τ / d`` with ``τ = h + a``, of a LayerNorm minus its mean."""

    @staticmethod
    def forward(ctx: Any, kind: str, h: Tensor, a: Tensor, scale: Tensor) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(h, a, scale)
        return torch.ones_like(scale, dtype=torch.promote_types(scale.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, None]:
        h, a, scale = ctx.saved_tensors
        wide = torch.promote_types(h.dtype, torch.float32)
        total = (h + a).to(wide)
        if ctx.kind.startswith("layer"):
            total = total - total.mean(-1, keepdim=True)
        factor = grads[0].to(wide) * scale.to(wide).square() / -total.shape[-1]
        return None, None, total.mul_(factor.unsqueeze(-1)).to(a.dtype), None


def identify_norm(norm: nn.Module, width: int) -> NormKind | None:
    """Which norm a module computes, found by running it: names differ between families, numbers do not. ``None``: neither."""
    if isinstance(norm, nn.Identity):
        return "none"
    weight = getattr(norm, "weight", None)
    if weight is None and next(norm.parameters(), None) is None:
        weight = torch.empty(width)  # a norm without weights (OLMo 1, nanochat); only its device and dtype are read
    if not isinstance(weight, Tensor) or weight.is_meta or weight.shape != (width,):
        return None
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, width, generator=generator).to(weight.device, weight.dtype)
    # The small one is of the size of the epsilon.
    probes = [noise * 2 + 0.5, noise * 3e-3]
    kinds: tuple[NormKind, ...] = ("rms", "layer", "rms1", "layer1")
    if getattr(norm, "weight", None) is None:
        kinds = ("rms", "layer")
    with torch.no_grad():
        for kind in kinds:
            if all(_same_norm(norm, kind, probe) for probe in probes):
                return kind
    return None


def _same_norm(norm: nn.Module, kind: NormKind, probe: Tensor) -> bool:
    expected = norm(probe).float()
    ours = matched_norm(norm, kind, probe, torch.zeros_like(probe), backend="eager")[0].float()
    # float32 at best: RMSNorm modules compute in it whatever they are given.
    eps = max(torch.finfo(probe.dtype).eps, torch.finfo(torch.float32).eps)
    tolerance = 8 * eps * expected.abs().max().clamp_min(1e-3)
    return bool(torch.allclose(ours, expected, rtol=0, atol=float(tolerance)))
