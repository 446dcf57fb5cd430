"""What users have instead: the published loop over tokens, materialised weight changes, PEFT's LoRA, Liger's SwiGLU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import get_activation
from ..measure.problems import Problem
from ..measure.reference import lora_tensors
from ..rules import get_rule

__all__ = [
    "ROUNDED_WEIGHT",
    "delta_bytes",
    "has_swiglu",
    "liger",
    "loop",
    "materialised",
    "prepare_peft",
    "why_not_liger",
    "why_not_loop",
    "why_not_materialised",
    "why_not_peft",
]

#: ``W + ΔW_t`` is rounded to the dtype before the product: an error of half an eps per weight, which no accumulation order
#: mends. 16 eps of the largest result bounds it at the sizes here, and still fails a zeroed row by a factor of 8 in bf16.
ROUNDED_WEIGHT = 16.0
#: Largest ΔW of all tokens of one projection that is built, in bytes.
MATERIALISED_LIMIT = 2**30
#: Largest ΔW kept by autograd in the training modes of the loop, in bytes.
LOOP_LIMIT = 2**33

Compute = Callable[[dict[str, Tensor]], Tensor]
Product = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def delta_bytes(case: Any, itemsize: int | None = None) -> int:
    """Bytes of the ΔW_t of all tokens of the op's widest projection."""
    return int(case.tokens * case.model.d * case.model.f * (itemsize or case.dtype.itemsize))


def _explicit(problem: Problem, product: Product) -> Compute:
    """The op with explicit vectors, ``product(u [T, in], W [out, in], v_a [T, k, in], v_b [T, k, out])`` per projection."""
    case, model = problem.case, problem.case.model
    rule = get_rule(case.rule)

    def project(u: Tensor, z: Tensor, weight: Tensor, key: Tensor | None, value: Tensor) -> Tensor:
        v_a, v_b = rule.vectors(z, u, key, value, case.num_ranks, 1.0)
        return product(u, weight, v_a, v_b)

    if case.op == "factored_linear":
        return lambda t: project(t["x"], t["z"], t["weight"], t.get("w_a_up"), t["w_b_up"])
    act = get_activation(model.act).forward

    def mlp(t: dict[str, Tensor]) -> Tensor:
        z = t["a"] @ t["w_down"]
        scaled = z * t["key_scale"].unsqueeze(1) if "key_scale" in t else z

        def target(name: str, u: Tensor, bottleneck: Tensor) -> Tensor:
            return project(u, bottleneck, t[f"{name}_weight"], t.get(f"{name}_key"), t[f"{name}_value"])

        up = target("up", t["x"], scaled)
        inter = act(target("gate", t["x"], scaled)) * up if model.gated else act(up)
        return target("down", inter, z)

    return mlp


def loop(problem: Problem) -> Compute:
    """Token by token: ``y_t = (W + Σ_j v_b ⊗ v_a) u_t``, one weight matrix built and used at a time (the explicit form)."""

    def product(u: Tensor, weight: Tensor, v_a: Tensor, v_b: Tensor) -> Tensor:
        rows = []
        for t in range(len(u)):
            modified = weight + v_b[t].t() @ v_a[t]
            rows.append(F.linear(u[t], modified))
        return torch.stack(rows)

    return _explicit(problem, product)


def why_not_loop(case: Any, mode: str, device: torch.device) -> str | None:
    if case.op == "matched_norm":
        return "matched_norm has no weight to change"
    if mode in ("local", "end_to_end") and delta_bytes(case) > LOOP_LIMIT:
        return (
            f"autograd would keep a weight per token, {delta_bytes(case) / 2**30:,.0f} GiB a projection "
            f"(limit {LOOP_LIMIT / 2**30:.0f})"
        )
    return None


def materialised(problem: Problem) -> Compute:
    """ΔW of all tokens at once, ``[T, out, in]``, added to W; then one batched product."""

    def product(u: Tensor, weight: Tensor, v_a: Tensor, v_b: Tensor) -> Tensor:
        modified = torch.bmm(v_b.transpose(1, 2), v_a).add_(weight)
        return torch.bmm(modified, u.unsqueeze(2)).squeeze(2)

    return _explicit(problem, product)


def why_not_materialised(case: Any, mode: str, device: torch.device) -> str | None:
    if case.op == "matched_norm":
        return "matched_norm has no weight to change"
    size = delta_bytes(case)
    if size > MATERIALISED_LIMIT:
        return f"ΔW of {case.tokens:,} tokens is {size / 2**30:,.1f} GiB a projection (limit {MATERIALISED_LIMIT / 2**30:.0f})"
    return None


class _Projections(nn.Module):
    """The frozen projections of a problem as modules, for libraries that wrap modules."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        case, t = problem.case, problem.tensors
        names = {name: f"{name}_weight" for name in case.model.targets} if case.op == "mlp" else {"gate": "weight"}
        for name, key in names.items():
            out, fan_in = t[key].shape
            linear = nn.Linear(fan_in, out, bias=False, device="meta")
            linear.weight = nn.Parameter(t[key], requires_grad=False)
            setattr(self, name, linear)


def prepare_peft(problem: Problem, mode: str) -> Callable[[], dict[str, Tensor]]:
    """PEFT's own LoRA layers around the frozen projections, through its public ``inject_adapter_in_model``."""
    from peft import LoraConfig, inject_adapter_in_model

    case, model, t = problem.case, problem.case.model, problem.tensors
    targets = model.targets if case.op == "mlp" else ("gate",)
    config = LoraConfig(
        r=case.rank, lora_alpha=case.rank, lora_dropout=0.0, target_modules=list(targets), init_lora_weights=False
    )
    layers: Any = inject_adapter_in_model(config, _Projections(problem))
    parameters: dict[str, nn.Parameter] = {}
    given = lora_tensors(problem)
    for target in targets:
        layer = getattr(layers, target)
        for name, linear, value in (
            ("a", layer.lora_A["default"], given[f"lora_a_{target}"]),
            ("b", layer.lora_B["default"], given[f"lora_b_{target}"].t().contiguous()),
        ):
            linear.weight = nn.Parameter(value)
            parameters[f"lora_{name}_{target}"] = linear.weight
    act = get_activation(model.act).forward
    training, end_to_end = mode in ("local", "end_to_end"), mode == "end_to_end"
    x = t["x"].detach().requires_grad_(end_to_end)

    def compute() -> Tensor:
        if case.op == "factored_linear":
            return layers.gate(x)
        up = layers.up(x)
        return layers.down(act(layers.gate(x)) * up if model.gated else act(up))

    if not training:

        def forward() -> dict[str, Tensor]:
            with torch.no_grad():
                return {"y": compute()}

        return forward
    inputs: list[Tensor] = [*parameters.values(), *([x] if end_to_end else [])]
    upstream = problem.upstream["y"]

    def both() -> dict[str, Tensor]:
        y = compute()
        grads = torch.autograd.grad(y, inputs, upstream)
        # PEFT stores B as [out, R]; here it is [R, out] throughout.
        named = {
            f"sum d {name}": grad.t() if name.startswith("lora_b") else grad
            for name, grad in zip(parameters, grads, strict=False)
        }
        return {"y": y.detach(), **named, **({"d x": grads[-1]} if end_to_end else {})}

    return both


def why_not_peft(case: Any, mode: str, device: torch.device) -> str | None:
    if case.op == "matched_norm":
        return "PEFT adapts linears"
    return None if importlib.util.find_spec("peft") else "not installed: pip install peft"


def liger(problem: Problem) -> Compute:
    """The frozen MLP with Liger's fused ``silu(gate) ⊙ up``."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def mlp(t: dict[str, Tensor]) -> Tensor:
        gate, up = F.linear(t["x"], t["gate_weight"]), F.linear(t["x"], t["up_weight"])
        return F.linear(LigerSiLUMulFunction.apply(gate, up), t["down_weight"])

    return mlp


def has_swiglu(case: Any, mode: str) -> bool:
    return bool(case.op == "mlp" and case.model.gated and case.model.act == "silu")


def why_not_liger(case: Any, mode: str, device: torch.device) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "not installed: pip install liger-kernel"
    if not has_swiglu(case, mode):
        return "it is a SwiGLU; this op has none"
    return None if device.type == "cuda" else "its kernels need a CUDA GPU"
