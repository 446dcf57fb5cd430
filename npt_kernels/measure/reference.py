"""What every provider is held to: the ops in ordinary PyTorch, with ordinary autograd and no code of the package's backends.

A provider computes one of three functions, and is compared with that one:

- ``npt``: the converted form, per-token weight changes included;
- ``frozen``: the same layer without any change, the floor;
- ``lora``: static low-rank adapters on the same projections, ``W u + B (A u)``, what PEFT computes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import get_activation
from ..rules import get_rule
from .problems import Problem

__all__ = ["FUNCTIONS", "MODES", "lora_tensors", "plain", "reference_results", "wanted_gradients"]

FUNCTIONS = ("npt", "frozen", "lora")
#: Mode → what it stands for.
MODES = {
    "forward": "no gradients",
    "local": "forward and backward with frozen weights, no gradient for the layer's input",
    "end_to_end": "forward and backward with frozen weights, with gradients for the input and the attention output",
    "decode": "no gradients, few tokens, CUDA graph where there is one",
}
TRAINING_MODES = ("local", "end_to_end")


def lora_tensors(problem: Problem) -> dict[str, Tensor]:
    """``lora_a_TARGET [R, in]`` and ``lora_b_TARGET [R, out]`` of every projection; the same for the same problem."""
    case, model = problem.case, problem.case.model
    generator = torch.Generator(device=problem.device).manual_seed(17)
    widths = {"gate": (model.d, model.f), "up": (model.d, model.f), "down": (model.f, model.d)}
    targets = model.targets if case.op == "mlp" else ("gate",)
    tensors: dict[str, Tensor] = {}
    for target in targets:
        d_in, d_out = widths[target]
        for name, width, scale in (("a", d_in, d_in**-0.5), ("b", d_out, case.rank**-0.5)):
            tensor = torch.empty(case.rank, width, dtype=case.dtype, device=problem.device)
            tensors[f"lora_{name}_{target}"] = tensor.normal_(0, scale, generator=generator)
    return tensors


def _coefficients(t: dict[str, Tensor], u: Tensor, z: Tensor, key: Tensor | None, case: Any) -> Tensor:
    if get_rule(case.rule).key == "none":
        return z
    assert key is not None
    if key.dim() == 1:  # anchored
        return z * (u @ key).unsqueeze(-1)
    p = u @ key.t()
    if case.rule == "diagonal":
        return torch.tanh(z) * p
    z_blocks, p_blocks = (tensor.unflatten(-1, (case.num_ranks, -1)) for tensor in (z, p))
    return (z_blocks * (z_blocks * p_blocks).sum(-1, keepdim=True)).flatten(-2)


def _project(problem: Problem, t: dict[str, Tensor], function: str, target: str, u: Tensor, z: Tensor | None) -> Tensor:
    """One projection of the MLP, with the change that ``function`` asks for."""
    y = F.linear(u, t[f"{target}_weight"])
    if function == "lora":
        return y + (u @ t[f"lora_a_{target}"].t()) @ t[f"lora_b_{target}"]
    if function == "npt":
        assert z is not None
        c = _coefficients(t, u, z, t.get(f"{target}_key"), problem.case)
        return y + c @ t[f"{target}_value"]
    return y


def plain(problem: Problem, function: str, t: dict[str, Tensor]) -> Tensor:
    """The op's output in ordinary operations on the tensors ``t`` (named as in ``problem.tensors``)."""
    case, model = problem.case, problem.case.model
    if case.op == "mlp":
        z = scaled = None
        if function == "npt":
            z = t["a"] @ t["w_down"]
            scaled = z * t["key_scale"].unsqueeze(-1) if "key_scale" in t else z
        act = get_activation(model.act).forward
        up = _project(problem, t, function, "up", t["x"], scaled)
        inter = act(_project(problem, t, function, "gate", t["x"], scaled)) * up if model.gated else act(up)
        return _project(problem, t, function, "down", inter, z)
    if case.op == "factored_linear":
        y = F.linear(t["x"], t["weight"])
        if function == "lora":
            return y + (t["x"] @ t["lora_a_gate"].t()) @ t["lora_b_gate"]
        return y if function == "frozen" else y + _coefficients(t, t["x"], t["z"], t.get("w_a_up"), case) @ t["w_b_up"]
    if case.op == "matched_norm":
        h = t["h"]
        total = h + t["a"] if function == "npt" else h
        if model.norm == "layer":
            h, total = h - h.mean(-1, keepdim=True), total - total.mean(-1, keepdim=True)
        u = h * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * t["weight_"]
        return u + t["bias"] if "bias" in t else u
    raise ValueError(f"op {case.op!r} has no plain form")


def wanted_gradients(problem: Problem, function: str, mode: str) -> list[str]:
    """Names of the tensors whose gradient a mode asks for. Weights are frozen in every mode."""
    if mode not in TRAINING_MODES:
        return []
    end_to_end, op = mode == "end_to_end", problem.case.op
    if op == "matched_norm":
        return ["h", "a"] if function == "npt" else ["h"]
    if function == "frozen":
        # A frozen layer passes its input's gradient on in either mode: the least that backpropagation costs.
        return ["x"]
    if function == "lora":
        return [*lora_tensors(problem), *(["x"] if end_to_end else [])]
    names = problem.tensors
    if op == "factored_linear":
        return ["z", *(n for n in ("w_a_up", "w_b_up") if n in names), *(["x"] if end_to_end else [])]
    trained = [n for n in names if n == "w_down" or n.endswith(("_key", "_value"))]
    return [*trained, *(n for n in ("x", "a", "key_scale") if end_to_end and n in names)]


def _run(
    problem: Problem, function: str, mode: str, rows: Tensor | slice | None, dtype: torch.dtype | None, sums: bool
) -> dict[str, Tensor]:
    tensors = problem.tensors | (lora_tensors(problem) if function == "lora" else {})
    wanted = wanted_gradients(problem, function, mode)
    wanted = wanted if sums else [name for name in wanted if name in problem.per_token]

    def prepare(tensor: Tensor, per_token: bool) -> Tensor:
        tensor = tensor[rows] if per_token and rows is not None else tensor
        return tensor if dtype is None else tensor.to(dtype)

    leaves = {
        name: prepare(tensor, name in problem.per_token).detach().requires_grad_(name in wanted)
        for name, tensor in tensors.items()
    }
    with torch.set_grad_enabled(bool(wanted)):
        y = plain(problem, function, leaves)
    results = {"y": y.detach()}
    if wanted:
        upstream = prepare(next(iter(problem.upstream.values())), True)
        grads = torch.autograd.grad(y, [leaves[name] for name in wanted], upstream)
        results |= {_name(problem, name): grad for name, grad in zip(wanted, grads, strict=True)}
    return results


def _name(problem: Problem, tensor: str) -> str:
    return f"d {tensor}" if tensor in problem.per_token else f"sum d {tensor}"


def reference_results(
    problem: Problem, function: str, mode: str, rows: Tensor, chunk: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``(same dtype, float64)`` results of the plain form: ``y`` and ``d NAME`` of ``rows``, ``sum d NAME`` over all tokens."""
    wanted = wanted_gradients(problem, function, mode)
    reference = _run(problem, function, mode, rows, None, sums=False)
    truth = _run(problem, function, mode, rows, torch.float64, sums=False)
    sums = [_name(problem, name) for name in wanted if name not in problem.per_token]
    if sums:
        full = _run(problem, function, mode, None, None, sums=True)
        reference |= {name: full[name] for name in sums}
        for start in range(0, problem.case.tokens, chunk):
            part = _run(problem, function, mode, slice(start, start + chunk), torch.float64, sums=True)
            for name in sums:
                truth[name] = truth[name] + part[name] if name in truth else part[name]
    return reference, truth
