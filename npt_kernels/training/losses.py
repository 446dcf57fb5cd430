"""The losses of equivalence pre-training: per-layer MSE, the vector penalty, and KL(original‖converted).

Per layer, with ``h`` the layer's input, ``y`` what the original layer returns and ``ŷ`` what the converted one returns:

    mse           mean over tokens and features of (ŷ − y)²
    relative_mse  mse / Var(δ),   δ = y − h,   Var(δ) = mean over tokens and features of (δ − mean over tokens of δ)²

``δ`` is all that the layer adds to the residual stream, attention included: the part that the converted layer has to
produce (``h`` itself passes through untouched on both sides, and would hide every error in the upper layers, where it is
large). So 0 is exact, 1 is what the best constant ``ŷ − h`` reaches, and ``1 − relative_mse`` is the explained variance.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..argument_checks import autocast_dtype
from ..model.head import CHUNK_ELEMENTS

__all__ = ["delta_variance", "kl_divergence", "layer_loss", "vector_penalty"]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def delta_variance(teacher: Tensor, h: Tensor) -> Tensor:
    """Var(δ) of ``δ = teacher − h``, both ``[..., d]``: a scalar, never below the smallest normal number."""
    delta = (teacher - h).flatten(0, -2).to(_wide(teacher.dtype))
    return (delta - delta.mean(0)).square_().mean().clamp_min(torch.finfo(delta.dtype).tiny)


def layer_loss(
    student: Tensor, teacher: Tensor, h: Tensor, *, kind: str = "relative_mse", variance: Tensor | float | None = None
) -> Tensor:
    """Equivalence loss of one layer: a scalar.

    Args:
        student, teacher, h: ``[..., d]``: ŷ, y and the layer's input. Only ``student`` gets a gradient.
        kind: ``"relative_mse"`` or ``"mse"``, see the module's docstring.
        variance: Var(δ) measured once for this layer. Then the loss is a plain sum over tokens, and accumulated
            micro-batches equal one large batch exactly; ``None`` measures it on these tokens.

    Raises:
        ValueError: An unknown ``kind``.
    """
    if kind not in ("relative_mse", "mse"):
        raise ValueError(f"loss={kind!r} is not known; choose relative_mse or mse")
    wide = _wide(student.dtype)
    error = F.mse_loss(student.to(wide), teacher.detach().to(wide))
    if kind == "mse":
        return error
    return error / (delta_variance(teacher.detach(), h.detach()) if variance is None else variance)


def vector_penalty(layer: Any, h: Tensor, a: Tensor) -> Tensor:
    """``|v_a|² + |v_b|²`` of a converted layer, mean per token, summed over terms and targets: a scalar.

    Norms come from Gram matrices (``NPComponent.vector_norms``); no ``[T, k, d]`` vector is made. Under ``self_key`` the key
    is the token's own input, of which nothing is trained, so only ``|v_b|²`` counts.

    Args:
        layer: A converted layer (:class:`npt_kernels.model.layer.NPTLayer`).
        h, a: ``[..., d]``: its input and its attention output.
    """
    component = layer.np_component
    z = component(a).flatten(0, -2)
    _, key_scale = layer.npt_mlp_input(h, a)
    z_matched = z if key_scale is None else z * key_scale.reshape(-1, 1).to(z.dtype)
    total = z.new_zeros((), dtype=_wide(z.dtype))
    for target in component.target_shapes:
        z_target = z if layer.npt_plan.shape.targets[target].slot == "down" else z_matched
        # The input u only enters the norm of a self key, which is left out, so z stands in for it.
        key_norm, value_norm = component.vector_norms(z_target, z_target, target)
        total = total + value_norm.mean()
        if component.rule.key != "none":
            total = total + key_norm.mean()
    return total


def _kl_in_chunks(
    students: Tensor,
    teachers: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    chunk: int,
    wide: torch.dtype,
    gradient: Tensor | None,
) -> Tensor:
    """Sum of the KL over tokens; ``gradient [T, d]``, if given, is filled with that of their mean."""
    tokens = len(students)
    total = torch.zeros((), dtype=wide if students.device.type == "mps" else torch.float64, device=students.device)
    for start in range(0, tokens, chunk):
        rows = slice(start, start + chunk)
        s, t = students[rows], teachers[rows]
        if weight is not None:
            s, t = F.linear(s, weight, bias), F.linear(t, weight, bias)
        log_s, log_t = s.to(wide).log_softmax(-1), t.to(wide).log_softmax(-1)
        del s, t
        p_t = log_t.exp()
        total += torch.dot(p_t.view(-1), log_t.sub_(log_s).view(-1))
        if gradient is not None:
            # d KL / d logits = softmax(student) − softmax(teacher); divided last, or fp16 would lose the small entries.
            d_logits = log_s.exp_().sub_(p_t)
            if weight is not None:
                d_logits = (d_logits.to(weight.dtype) @ weight).to(wide)
            gradient[rows] = d_logits.div_(tokens).to(gradient.dtype)
            del d_logits
        # Else they live beside those of the next chunk: 12 bytes a logit, 96 MiB.
        del log_s, log_t, p_t
    return total


class _KLDivergence(torch.autograd.Function):
    """The gradient is made chunk by chunk in the forward, where the logits exist anyway; the backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor | None, bias: Tensor | None, chunk: int | None
    ) -> Tensor:
        width = student.shape[-1]
        students, teachers = student.detach().reshape(-1, width), teacher.detach().reshape(-1, width)
        tokens = len(students)
        vocabulary = width if weight is None else len(weight)
        dtype = autocast_dtype(students)
        if weight is not None and dtype is not None:
            # Autocast would cast the whole head anew for every chunk.
            students, teachers, weight = students.to(dtype), teachers.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        chunk = chunk or max(1, CHUNK_ELEMENTS // vocabulary)
        wide = _wide(student.dtype)
        # float16 cannot hold it before the loss scale, which comes with the backward.
        kept = torch.float32 if student.dtype == torch.float16 else student.dtype
        gradient = student.new_empty(tokens, width, dtype=kept) if ctx.needs_input_grad[0] else None
        ctx.dtype = student.dtype
        with torch.autocast(student.device.type, enabled=False):
            total = _kl_in_chunks(students, teachers, weight, bias, chunk, wide, gradient)
        ctx.save_for_backward(None if gradient is None else gradient.view_as(student))
        return (total / max(tokens, 1)).to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        if gradient is None:
            return None, None, None, None, None
        return (gradient * grads[0].to(gradient.dtype)).to(ctx.dtype), None, None, None, None


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    chunk: int | None = None,
) -> Tensor:
    """KL(teacher‖student) in nats, mean over tokens: ``mean_t Σ_v p_T[t,v] (log p_T[t,v] − log p_S[t,v])``, a scalar.

    Args:
        student, teacher: Logits ``[..., vocab]``; or, with ``weight``, the hidden states ``[..., d]`` that a frozen output
            head turns into logits ``x @ weightᵀ + bias``. Only ``student`` gets a gradient.
        weight, bias: ``[vocab, d]`` and ``[vocab]``. With them no ``[T, vocab]`` tensor is ever made: logits, their softmax
            and the gradient with respect to the hidden states are made for ``chunk`` tokens at a time.
        chunk: Tokens at a time; default as many as 2²³ logits hold.

    Raises:
        ValueError: Shapes that do not fit.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {list(student.shape)} and teacher {list(teacher.shape)}; they must be equal"
        )
    if weight is not None and weight.shape[-1] != student.shape[-1]:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [vocab, d] with d = {student.shape[-1]}")
    return _KLDivergence.apply(student, teacher, weight, bias, chunk)  # type: ignore[no-any-return]
