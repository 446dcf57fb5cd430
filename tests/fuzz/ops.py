"""The public ops on drawn arguments: valid ones are right, broken ones are refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from npt_kernels.ops.registry import get_backend
from npt_kernels.rules import RULES
from tests.support.helpers import Problem, factored_problem, integers, linear_problem, mlp_problem, randn, worst_excess

from .outcome import outcome

__all__ = ["OPS", "check_op"]

_SIZES = st.sampled_from([1, 2, 3, 5, 8, 17])
_TOKENS = st.sampled_from([0, 1, 2, 5, 16, 33])
_LAYOUTS = ("plain", "transposed", "padded", "expanded")
_BACKEND = os.environ.get("NPT_BACKEND", "eager")
#: Those of the backend come back right, all others are refused.
_OF_BACKEND = {
    "eager": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: How a call is broken.
_BREAKS = ("size", "dimension", "dtype", "integer", "no_tensor")
#: With results of a few numbers torch's own error is a matter of luck (tests/support/helpers.py); a wrong index is not.
_FACTOR = 8.0


def _linear(draw: Callable[..., Any], tokens: int, **common: Any) -> Problem:
    return linear_problem(tokens, draw(_SIZES), draw(_SIZES), draw(st.sampled_from([1, 1, 2, 5])), **common)


def _factored(draw: Callable[..., Any], tokens: int, **common: Any) -> Problem:
    rule = draw(st.sampled_from(sorted(RULES)))
    r, k = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 1, 3]))
    return factored_problem(rule, tokens, draw(_SIZES), draw(_SIZES), r, k, **common)


def _mlp(gated: bool) -> Callable[..., Problem]:
    def make(draw: Callable[..., Any], tokens: int, **common: Any) -> Problem:
        names = ("gate", "up", "down") if gated else ("up", "down")
        targets = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        return mlp_problem(
            draw(st.sampled_from(sorted(RULES))), tokens, draw(_SIZES), draw(_SIZES), draw(_SIZES),
            draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 1, 2])), gated=gated, targets=targets,
            act=draw(st.sampled_from(["silu", "gelu", "gelu_new", "relu"])), key_scale=draw(st.booleans()), normalise=True,
            **common,
        )  # fmt: skip

    return make


OPS: dict[str, Callable[..., Problem]] = {
    "npt_linear": _linear, "npt_factored_linear": _factored, "npt_gated_mlp": _mlp(True), "npt_mlp": _mlp(False)
}  # fmt: skip


#: Of the registry.
_NAMES = {"npt_linear": "linear", "npt_factored_linear": "factored_linear", "npt_gated_mlp": "mlp", "npt_mlp": "mlp"}


def check_op(op: str, draw: Callable[..., Any]) -> str:
    """One case of an op: ``right``, ``refused``, or NaN where plain PyTorch has it too; else ``AssertionError``."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from(_DTYPES))
    # Numbers whose sums are exact are compared bit for bit; products of three of them too, but not a tanh.
    exact = (
        dtype in (torch.float32, torch.float64) and op in ("npt_linear", "npt_factored_linear") and draw(st.booleans())
    )
    tokens = draw(_TOKENS)
    problem = OPS[op](draw, tokens, bias=draw(st.booleans()), dtype=dtype, make=integers if exact else randn)
    present = problem.present()
    needs = [name for name in present if draw(st.booleans())]
    layouts = {name: draw(st.sampled_from(_LAYOUTS)) for name in present}
    broken = draw(st.sampled_from((*(None,) * 5, *_BREAKS)))
    if broken is not None:
        return _broken(problem, broken, draw(st.sampled_from(present)), draw(st.integers(0, 2)))
    bases = {name: _base(problem.tensors[name], layouts[name]) for name in present}
    if dtype not in _OF_BACKEND[_BACKEND] and get_backend(_BACKEND).lacks(_NAMES[op]) is None:
        word = outcome(lambda: problem.op(**problem.leaves()), names=("backend=",))
        assert word[0] == "refused", f"{_BACKEND} took {dtype}"
        return "refused"
    run = {which: _run(problem, which, bases, layouts, needs) for which in ("op", "reference", "naive")}
    if not all(bool(tensor.isfinite().all()) for tensor in run["naive"].values()):
        # self_key's vector u/‖u‖² does not exist for u = 0 (relu, integers); its coefficients do.
        run["naive"] = _run(problem, "reference", bases, layouts, needs, torch.float64)
    assert run["op"].keys() == run["reference"].keys(), "a gradient is missing or too many"
    again = _run(problem, "op", bases, layouts, needs)
    for name, actual in run["op"].items():
        _compare(name, actual, run["reference"][name], run["naive"][name], exact, tokens)
        assert torch.equal(again[name].nan_to_num(7.0), actual.nan_to_num(7.0)), f"{name}: two runs differ"
    # Met in 2.13: F.linear in bf16 with an odd number of inputs multiplies the number behind each row by zero. NaN stays NaN.
    return "right" if all(bool(actual.isfinite().all()) for actual in run["op"].values()) else "NaN as F.linear"


def _compare(name: str, actual: Tensor, reference: Tensor, truth: Tensor, exact: bool, tokens: int) -> None:
    assert actual.dtype == reference.dtype and actual.shape == reference.shape, f"{name}: {actual.dtype} {actual.shape}"
    if truth.numel() == 0:
        return
    assert bool(truth.isfinite().all()), f"{name}: the truth is not finite"
    assert bool(actual.isfinite().all()) or not bool(reference.isfinite().all()), f"{name}: not finite"
    if exact and torch.equal(reference.double(), truth):
        assert torch.equal(actual.double(), truth), f"{name}: integers are not exact"
    elif actual.dtype == torch.float64:
        error, size = (actual - truth).abs().max(), 1 + truth.abs().max()
        assert error <= 1e-10 * size, f"{name}: off by {error:.3e} of {size:.3e}"
    elif tokens >= 16 and bool(reference.isfinite().all()):
        found = worst_excess(actual, reference, truth, factor=_FACTOR, floor=_FACTOR, blocks=False)
        assert found.ratio <= 1, f"{name} {found}"


# ---- layouts ---------------------------------------------------------------------------------------------------------


def _base(tensor: Tensor | None, layout: str) -> Tensor:
    """What the argument is a view of."""
    assert tensor is not None
    return tensor[:1].clone() if layout == "expanded" and tensor.dim() and tensor.shape[0] else tensor.clone()


def _view(base: Tensor, layout: str, rows: int) -> Tensor:
    if layout == "transposed" and base.dim() >= 2:
        return base.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "padded" and base.dim():
        return torch.nn.functional.pad(base, (2, 3), value=float("nan"))[..., 2 : 2 + base.shape[-1]]
    if layout == "expanded" and base.dim() and rows:
        return base.expand(rows, *base.shape[1:])
    return base


def _run(
    problem: Problem,
    which: str,
    bases: dict[str, Tensor],
    layouts: dict[str, str],
    needs: Sequence[str],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Output and gradients of what the arguments are views of."""
    dtype = torch.float64 if which == "naive" else dtype
    leaves = {n: b.detach().clone().to(dtype or b.dtype).requires_grad_(n in needs) for n, b in bases.items()}
    arguments: dict[str, Tensor | None] = {
        n: None if t is None else _view(leaves[n], layouts[n], t.shape[0] if t.dim() else 0)
        for n, t in problem.tensors.items()
    }
    y = getattr(problem, which)(**arguments)
    found = {"output": y.detach()}
    if needs:
        up = torch.randint(-1, 2, y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
        wanted = [leaves[name] for name in needs]
        grads = torch.autograd.grad(y, wanted, up, allow_unused=True) if y.requires_grad else (None,) * len(wanted)
        # What the result does not depend on has no gradient, or zeros: with no token, with a rule that reads no key.
        zeros = (torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, wanted, strict=True))
        found |= {f"d {name}": grad for name, grad in zip(needs, zeros, strict=True)}
    else:
        assert not y.requires_grad, "nothing asked for a gradient"
    return found


# ---- broken calls ----------------------------------------------------------------------------------------------------


def _broken(problem: Problem, how: str, name: str, dim: int) -> str:
    """One argument is not what it has to be. What plain PyTorch computes from it may be returned; nothing else may."""
    tensors: dict[str, Any] = {n: t if t is None else t.clone() for n, t in problem.tensors.items()}
    tensor = tensors[name]
    if how == "size":
        dim %= tensor.dim()
        tensors[name] = torch.cat(
            [tensor, tensor.new_ones([1 if i == dim else s for i, s in enumerate(tensor.shape)])], dim
        )
    elif how == "dimension":
        tensors[name] = tensor.unsqueeze(0)
    elif how == "dtype":
        tensors[name] = tensor.to(torch.float32 if tensor.dtype != torch.float32 else torch.float64)
    elif how == "integer":
        tensors[name] = tensor.to(torch.int64)
    else:
        tensors[name] = [1.0, 2.0]
    # A size that two arguments disagree on is an error of either; the message has to show one of the op's.
    word = outcome(lambda: problem.op(**tensors), names=("npt_",))
    if word[0] == "refused":
        return "refused"
    assert how in ("size", "dimension"), f"{how} of {name} was taken"
    reference = problem.reference(**tensors)
    assert word[1].shape == reference.shape, f"{how} of {name}: {word[1].shape}, plain PyTorch {reference.shape}"
    error = (word[1].double() - reference.double()).abs()
    eps = torch.finfo(reference.dtype).eps
    assert error.numel() == 0 or float(error.max()) <= 64 * eps * (1 + float(reference.double().abs().max())), how
    return "right"
