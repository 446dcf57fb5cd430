"""The public ops as functions: check the arguments, choose a backend, call the op. All maths is in ``npt_kernels/ops``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .activations import get_activation
from .argument_checks import autocast_dtype, check_shape, check_tensors, differ, flatten_tokens
from .ops.factored_linear import factored_linear
from .ops.linear import linear
from .ops.mlp import mlp
from .ops.mlp.operands import Operands, Projection, Spec
from .ops.registry import resolve_backend
from .rules import Rule, get_rule

if TYPE_CHECKING:
    from .component import AdapterTensors, NPComponent

__all__ = ["npt_factored_linear", "npt_gated_mlp", "npt_linear", "npt_mlp"]


def _cast(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Under autocast every floating tensor in autocast's dtype (differentiable), as ``F.linear`` would; else unchanged."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return [x, *tensors]
    return [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in (x, *tensors)]


def npt_linear(
    x: Tensor,
    weight: Tensor,
    v_a: Tensor,
    v_b: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """A linear whose weight changes per token by a sum of k rank-1 terms, explicit form.

    ``y_t = (W + Σ_j v_b[t,j] ⊗ v_a[t,j]) x_t + bias``. The change is applied inside the product and never built.
    Source of the formula: Neuro-Plastic Transformers, per-token rank-1 update; maths in ``ops/linear/README.md``.

    Args:
        x: ``[..., in]``, floating.
        weight: ``[out, in]``, same dtype and device as ``x``; any strides.
        v_a: ``[..., in]`` (k = 1) or ``[..., k, in]``: the key vectors.
        v_b: ``[..., out]`` (k = 1) or ``[..., k, out]``: the value vectors; the same k as ``v_a``.
        bias: ``[out]`` or ``None``.
        backend: Backend by name; ``None`` (or ``NPT_BACKEND``) chooses.

    Returns:
        ``[..., out]`` in the dtype of ``x`` (autocast's dtype under autocast). Differentiable in every tensor.

    Raises:
        ValueError: A shape or device does not fit; the message names it.
        TypeError: Dtypes differ or are not floating.
        BackendUnavailableError: The backend asked for cannot run this call.
    """
    op = "npt_linear"
    for name, tensor in (("x", x), ("weight", weight), ("v_a", v_a), ("v_b", v_b)):
        _require_tensor(op, name, tensor)
    if autocast_dtype(x) is not None:
        x, weight, v_a, v_b, bias = _cast(x, weight, v_a, v_b, bias)  # type: ignore[assignment]
    check_tensors(op, (("weight", weight), ("v_a", v_a), ("v_b", v_b), ("bias", bias)), x)
    leading, d_in, d_out = _check_linear(op, x, weight, bias)
    if v_a.dim() != v_b.dim():
        raise ValueError(
            f"{op}: v_a has shape {list(v_a.shape)} and v_b {list(v_b.shape)}; give both as [..., n] or both as [..., k, n]"
        )
    if v_a.dim() == x.dim():
        v_a, v_b = v_a.unsqueeze(-2), v_b.unsqueeze(-2)
    elif v_a.dim() != x.dim() + 1:
        raise ValueError(
            f"{op}: v_a has shape {list(v_a.shape)}, expected [..., in] or [..., k, in] with x {list(x.shape)}"
        )
    if v_a.shape[-2] != v_b.shape[-2]:
        raise ValueError(f"{op}: v_a has k = {v_a.shape[-2]} terms but v_b has {v_b.shape[-2]}")
    if v_a.shape[-1] != d_in or v_b.shape[-1] != d_out:
        raise ValueError(
            f"{op}: v_a ends in {v_a.shape[-1]} and v_b in {v_b.shape[-1]}; weight [out, in] = {[d_out, d_in]} needs "
            f"v_a [..., {d_in}] and v_b [..., {d_out}]"
        )
    flat = flatten_tokens(op, "x", x, leading, 1, "[..., in]")
    keys = flatten_tokens(op, "v_a", v_a, leading, 2, "[..., k, in]")
    values = flatten_tokens(op, "v_b", v_b, leading, 2, "[..., k, out]")
    chosen = resolve_backend("linear", backend, x.device, x.dtype)
    y = linear(flat, weight, keys, values, bias, chosen)[0]
    return y if len(leading) == 1 else y.reshape(*leading, d_out)


def npt_factored_linear(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    w_a_up: Tensor | None,
    w_b_up: Tensor,
    bias: Tensor | None = None,
    *,
    rule: str = "rank1",
    num_ranks: int = 1,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """A linear whose weight changes per token, the change given through a bottleneck of R = k·r numbers per token.

    ``y = x Wᵀ + c @ w_b_up + bias`` with ``c = rule(z, x @ w_a_upᵀ)``, which equals ``(W + ΔW_t) x_t``; neither ΔW nor its
    vectors are built. Rules and gradients: ``ops/factored_linear/README.md``.

    Args:
        x: ``[..., in]``, floating.
        z: ``[..., R]``: the bottleneck ``a @ w_down``.
        weight: ``[out, in]``.
        w_a_up: ``[R, in]`` for rules ``rank1`` and ``diagonal``, ``[in]`` for ``anchored``, ``None`` for ``self_key``.
        w_b_up: ``[R, out]``.
        bias: ``[out]`` or ``None``.
        rule: ``"rank1"``, ``"diagonal"``, ``"anchored"`` or ``"self_key"``.
        num_ranks: k, the number of rank-1 terms; divides R. Rows j·r … (j+1)·r − 1 belong to term j.
        scale: Modulation scale of the ``diagonal`` rule (``c = scale·tanh(z) ⊙ p``); other rules ignore it.
        backend: Backend by name; ``None`` (or ``NPT_BACKEND``) chooses.

    Returns:
        ``[..., out]`` in the dtype of ``x`` (autocast's dtype under autocast). Differentiable in every tensor.

    Raises:
        ValueError: An unknown rule, or a shape or device that does not fit; the message names it.
        TypeError: Dtypes differ or are not floating.
        BackendUnavailableError: The backend asked for cannot run this call.
    """
    op = "npt_factored_linear"
    rule_ = get_rule(rule)
    for name, tensor in (("x", x), ("z", z), ("weight", weight), ("w_b_up", w_b_up)):
        _require_tensor(op, name, tensor)
    x, z, weight, w_a_up, w_b_up, bias = _cast(x, z, weight, w_a_up, w_b_up, bias)  # type: ignore[assignment]
    check_tensors(op, (("z", z), ("weight", weight), ("w_a_up", w_a_up), ("w_b_up", w_b_up), ("bias", bias)), x)
    leading, d_in, d_out = _check_linear(op, x, weight, bias)
    z = flatten_tokens(op, "z", z, leading, 1, "[..., R]")
    total_rank = z.shape[-1]
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"{op}: scale={scale!r} must be a number")
    _check_num_ranks(op, num_ranks, total_rank)
    _check_adapter(op, "w_a_up", "w_b_up", w_a_up, w_b_up, rule_, total_rank, d_in, d_out)
    flat = flatten_tokens(op, "x", x, leading, 1, "[..., in]")
    chosen = resolve_backend("factored_linear", backend, x.device, x.dtype, rule=rule)
    y = factored_linear(flat, z, weight, w_a_up, w_b_up, bias, rule, num_ranks, float(scale), chosen)[0]
    return y if len(leading) == 1 else y.reshape(*leading, d_out)


def npt_gated_mlp(
    x: Tensor,
    a: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    adapter: NPComponent | AdapterTensors | Mapping[str, Any],
    *,
    act: str = "silu",
    key_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A gated MLP (SwiGLU and kin) whose weights change per token with the attention output ``a``.

    ``out = (act(gate) ⊙ up) (W_down + ΔW_t)ᵀ`` with gate and up likewise changed; maths in ``ops/mlp/README.md``.

    Args:
        x: ``[..., d]``: the normed MLP input (with α folded in when norm matched).
        a: ``[..., d_a]``: the attention output; ``z [..., R]`` where the adapter has ``w_down=None``.
        gate_proj, up_proj: ``[f, d]``.
        down_proj: ``[d, f]``.
        adapter: An :class:`~npt_kernels.NPComponent`, or its tensors: :class:`~npt_kernels.component.AdapterTensors` or a mapping
            with keys ``w_down`` ``[d_a, R]``, ``w_a_up`` and ``w_b_up`` (each a mapping ``gate``/``up``/``down`` → tensor, or
            flat as in ``state_dict()``: ``w_b_up.gate``) and optionally ``rule``, ``num_ranks``, ``scale``.
        act: Name of the activation, as in transformers (``silu``, ``gelu``, ``gelu_new``, ``relu``, ...).
        key_scale: ``[...]``: 1/ρ_T per token, multiplies ``z`` for gate and up (norm matching); ``None`` is 1.
        row_scale: ``[...]`` of ones in float32 (float64 for float64), for their gradient: that of a factor on ``x`` and
            ``key_scale`` both. It takes no product, where gradients of ``x`` take two; rules without a key only.
        gate_bias, up_bias, down_bias: ``[f]``, ``[f]``, ``[d]`` or ``None``.
        backend: Backend by name; ``None`` (or ``NPT_BACKEND``) chooses.

    Returns:
        ``[..., d]``, differentiable in every tensor.

    Raises:
        ValueError: An unknown rule, activation or target, or a shape or device that does not fit.
        TypeError: Dtypes differ or are not floating.
        BackendUnavailableError: The backend asked for cannot run this call.
    """
    return _mlp(
        "npt_gated_mlp", ("gate_proj", "up_proj", "down_proj"), ("gate", "up", "down"), x, a, gate_proj, up_proj, down_proj,
        gate_bias, up_bias, down_bias, adapter, act, key_scale, row_scale, backend,
    )  # fmt: skip


def npt_mlp(
    x: Tensor,
    a: Tensor,
    c_fc: Tensor,
    c_proj: Tensor,
    adapter: NPComponent | AdapterTensors | Mapping[str, Any],
    *,
    act: str = "gelu_new",
    key_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    c_fc_bias: Tensor | None = None,
    c_proj_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A plain two-layer MLP (GPT-2) whose weights change per token with the attention output ``a``.

    ``out = act(x (W_fc + ΔW_t)ᵀ) (W_proj + ΔW'_t)ᵀ``. As :func:`npt_gated_mlp` with targets ``c_fc`` and ``c_proj``.

    Args:
        x: ``[..., d]``. a: ``[..., d_a]``.
        c_fc: ``[f, d]``; pass ``conv1d.weight.t()`` for GPT-2's ``Conv1D``, which stores ``[in, out]`` (a view, no copy).
        c_proj: ``[d, f]``.
        adapter, act, key_scale, row_scale, backend: As in :func:`npt_gated_mlp`; the adapter's targets are ``c_fc``, ``c_proj``.
        c_fc_bias, c_proj_bias: ``[f]``, ``[d]`` or ``None``.

    Returns:
        ``[..., d]``, differentiable in every tensor.

    Raises:
        ValueError, TypeError, BackendUnavailableError: As :func:`npt_gated_mlp`.
    """
    return _mlp(
        "npt_mlp", ("", "c_fc", "c_proj"), ("", "c_fc", "c_proj"), x, a, None, c_fc, c_proj,
        None, c_fc_bias, c_proj_bias, adapter, act, key_scale, row_scale, backend,
    )  # fmt: skip


def _mlp(
    op: str,
    weight_names: tuple[str, str, str],
    targets: tuple[str, str, str],
    x: Tensor,
    a: Tensor,
    gate_weight: Tensor | None,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    adapter: NPComponent | AdapterTensors | Mapping[str, Any],
    act: str,
    key_scale: Tensor | None,
    row_scale: Tensor | None,
    backend: str | None,
) -> Tensor:
    """Both MLPs; the three slots are (gate, up, down), the first absent for a plain MLP."""
    from .component import as_adapter_tensors

    _require_tensor(op, "x", x)
    cast_to = autocast_dtype(x)
    adapter = as_adapter_tensors(adapter, cast_to or x.dtype, targets if targets[0] else targets[1:])
    by_key, by_value, w_down = adapter.w_a_up, adapter.w_b_up, adapter.w_down
    keys, values = [by_key.get(t) for t in targets], [by_value.get(t) for t in targets]
    if cast_to is not None:
        cast: list[Any] = _cast(
            x, a, key_scale, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, w_down, *keys, *values
        )
        x, a, key_scale, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, w_down = cast[:10]
        keys, values = cast[10:13], cast[13:]
    signature = None
    if not torch.compiler.is_compiling():
        # The type too: True is 1, and no number of ranks. Whatever is no tensor is refused by the check, and so never kept.
        try:
            signature = (
                op, act, x.dtype, x.device, x.shape[-1], adapter.rule, type(adapter.num_ranks), adapter.num_ranks,
                (a.shape[-1], a.dtype, a.device), None if key_scale is None else (key_scale.dtype, key_scale.device),
                *[
                    t if t is None else (t.shape, t.dtype, t.device)
                    for t in (gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, w_down, *keys, *values)
                ],
            )  # fmt: skip
            known = signature in _checked
        except (AttributeError, IndexError, TypeError):  # no tensors, no last dimension, or a value that has no hash
            signature, known = None, False
    if signature is None or not known:
        get_activation(act)
        tensors = (
            gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, a, key_scale, w_down, *keys, *values
        )  # fmt: skip
        _check_mlp(op, weight_names, targets, x, tensors, adapter)
        if signature is not None:
            if len(_checked) >= _CHECKED_AT_MOST:
                _checked.clear()
            _checked.add(signature)
    leading, d_out = x.shape[:-1], down_weight.shape[0]
    a_flat = flatten_tokens(op, "a", a, leading, 1, "[..., d_a]")
    flat = flatten_tokens(op, "x", x, leading, 1, "[..., d]")
    if key_scale is not None:
        if differ(key_scale.shape, leading):
            raise ValueError(f"{op}: key_scale has shape {list(key_scale.shape)}, expected [...] = {list(leading)}")
        key_scale = key_scale.reshape(-1)
    if row_scale is not None:
        if get_rule(adapter.rule).key != "none":
            raise ValueError(
                f"{op}: row_scale has no gradient under rule={adapter.rule!r}, whose change is not linear in x"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        if not isinstance(row_scale, Tensor) or row_scale.dtype != wide or row_scale.device != x.device:
            got = (
                f"{row_scale.dtype} on {row_scale.device}"
                if isinstance(row_scale, Tensor)
                else type(row_scale).__name__
            )
            raise TypeError(f"{op}: row_scale must be {wide} on {x.device} (its gradient is a long sum), got {got}")
        if differ(row_scale.shape, leading):
            raise ValueError(f"{op}: row_scale has shape {list(row_scale.shape)}, expected [...] = {list(leading)}")
        row_scale = row_scale.reshape(-1)
    sizes: tuple[int, ...] = ()
    if x.is_cuda and not torch.compiler.is_compiling():
        sizes = (*up_weight.shape[::-1], *(value.shape[0] for value in values if value is not None))
    chosen = resolve_backend(
        "mlp", backend, x.device, x.dtype, act=act, rule=adapter.rule, tokens=flat.shape[0] if sizes else 0, sizes=sizes,
        trains=torch.is_grad_enabled(),
    )  # fmt: skip
    gate = Projection(gate_weight, gate_bias, keys[0], values[0])
    up = Projection(up_weight, up_bias, keys[1], values[1])
    down = Projection(down_weight, down_bias, keys[2], values[2])
    operands = Operands(flat, a_flat, key_scale, w_down, gate, up, down, row_scale)
    spec = Spec(act, adapter.rule, adapter.num_ranks, adapter.scale)
    out = mlp(operands, spec, torch.is_grad_enabled(), chosen)
    return out if len(leading) == 1 else out.reshape(*leading, d_out)


#: Calls that were found right: everything that :func:`_check_mlp` looks at, so that a layer is checked once and not at every
#: token (20 of 84 us of a call at sizes where nothing else counts).
_checked: set[tuple[Any, ...]] = set()
_CHECKED_AT_MOST = 4096


def _check_mlp(
    op: str,
    weight_names: tuple[str, str, str],
    targets: tuple[str, str, str],
    x: Tensor,
    tensors: tuple[Any, ...],
    adapter: AdapterTensors,
) -> None:
    """Types, dtypes, devices and shapes, all but the leading dimensions of per-token tensors."""
    gated = bool(weight_names[0])
    bias_names = ("gate_bias", "up_bias", "down_bias") if gated else ("", "c_fc_bias", "c_proj_bias")
    for name, tensor in (("a", tensors[6]), *list(zip(weight_names, tensors, strict=False))[not gated :]):
        _require_tensor(op, name, tensor)
    gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, a, _, w_down = tensors[:9]
    keys, values = tensors[9:12], tensors[12:]
    names = (
        *weight_names, *bias_names, "a", "key_scale", "w_down",
        *(f"w_a_up[{t}]" for t in targets), *(f"w_b_up[{t}]" for t in targets),
    )  # fmt: skip
    check_tensors(op, tuple(zip(names, tensors, strict=True)), x)
    _, d, f = _check_linear(op, x, up_weight, up_bias, weight_names[1], bias_names[1])
    if gate_weight is not None:
        check_shape(op, weight_names[0], gate_weight, (f, d), "[f, d]")
    if gate_bias is not None:
        check_shape(op, bias_names[0], gate_bias, (f,), "[f]")
    d_out = down_weight.shape[0] if down_weight.dim() else 0
    check_shape(op, weight_names[2], down_weight, (d_out, f), "[d_out, f]")
    if down_bias is not None:
        check_shape(op, bias_names[2], down_bias, (d_out,), "[d_out]")
    rule = get_rule(adapter.rule)
    flatten_tokens(op, "a", a, x.shape[:-1], 1, "[..., d_a]")
    if w_down is not None and (w_down.dim() != 2 or w_down.shape[0] != a.shape[-1]):
        raise ValueError(f"{op}: w_down has shape {list(w_down.shape)}, expected [d_a, R] = [{a.shape[-1]}, R]")
    total_rank = a.shape[-1] if w_down is None else w_down.shape[1]
    _check_num_ranks(op, adapter.num_ranks, total_rank)
    for target, key, value, width, height in zip(targets, keys, values, (d, d, f), (f, f, d_out), strict=True):
        if value is not None:
            _check_adapter(op, f"w_a_up[{target}]", f"w_b_up[{target}]", key, value, rule, total_rank, width, height)
        elif key is not None:
            raise ValueError(f"{op}: w_a_up[{target}] is given without w_b_up[{target}]; give both or neither")


def _require_tensor(op: str, name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")


def _check_linear(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, name: str = "weight", bias_name: str = "bias"
) -> tuple[torch.Size, int, int]:
    """Shapes of x, weight and bias; returns (leading dims, in, out)."""
    if weight.dim() != 2:
        raise ValueError(f"{op}: {name} has shape {list(weight.shape)}, expected [out, in]")
    d_out, d_in = weight.shape
    if x.dim() == 0 or x.shape[-1] != d_in:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}, expected [..., in] with in = {d_in} from {name} {list(weight.shape)}"
            + (" (GPT-2's Conv1D stores [in, out]: pass weight.t())" if x.dim() and x.shape[-1] == d_out else "")
        )
    if bias is not None:
        check_shape(op, bias_name, bias, (d_out,), "[out]")
    return x.shape[:-1], d_in, d_out


def _check_num_ranks(op: str, num_ranks: int, total_rank: int) -> None:
    if not isinstance(num_ranks, int) or isinstance(num_ranks, bool) or num_ranks < 1 or total_rank % num_ranks:
        raise ValueError(f"{op}: num_ranks={num_ranks!r} must be a positive whole number that divides R = {total_rank}")


def _check_adapter(
    op: str,
    key_name: str,
    value_name: str,
    w_a_up: Tensor | None,
    w_b_up: Tensor,
    rule: Rule,
    total_rank: int,
    d_in: int,
    d_out: int,
) -> None:
    check_shape(op, value_name, w_b_up, (total_rank, d_out), "[R, out]")
    if rule.key == "none":
        if w_a_up is not None:
            raise ValueError(f"{op}: {key_name} must be None for rule={rule.name!r} (its key is the input itself)")
        return
    expected, meaning = ((total_rank, d_in), "[R, in]") if rule.key == "matrix" else ((d_in,), "[in]")
    if w_a_up is None:
        raise ValueError(
            f"{op}: {key_name} is None, but rule={rule.name!r} needs it with shape {meaning} = {list(expected)}"
        )
    check_shape(op, key_name, w_a_up, expected, f"{meaning} (rule {rule.name!r})")
