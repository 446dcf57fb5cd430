"""What is timed against what: each workload's contenders, from the vendor's GEMM to the fused kernels, on the same tensors.

Every contender is ``call(set index)``; sets rotate (``timing.rotation``). All see the same random tensors. ``kconcat`` is the
strongest baseline (research/kernels.md §4b): padded buffers ``[x | c]`` and ``[W | B]`` and one vendor GEMM; writing c into its
columns is part of its time, repacking frozen weights is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npt_kernels.activations import get_activation
from npt_kernels.backends import BACKENDS

from .problems import Problem
from .shapes import Case, ModelShape
from .timing import Call, rotation

__all__ = ["Workload", "workloads"]


@dataclass
class Workload:
    """A row group of the report: contenders, the baseline they are divided by, how often the inputs rotate."""

    name: str
    make: Callable[[torch.device], tuple[dict[str, Call], int]]
    baseline: str
    tokens: int
    note: str = ""


def _sets(case: Case, device: torch.device, most: int = 16) -> list[Problem]:
    first = Problem(case, device)
    size = sum(t.numel() * t.element_size() for t in first.tensors.values())
    return [first] + [Problem(case, device, seed) for seed in range(1, rotation(size, device, most))]


def _gate(case: Case, backends: list[str], device: torch.device) -> tuple[dict[str, Call], int]:
    """One projection with the delta, c given: the segment's cost alone."""
    problems = _sets(replace(case, rule="self_key"), device)
    d, rank = case.model.d, case.rank
    pitch = d + -(-rank // 64) * 64
    stores = []
    for problem in problems:
        t = problem.tensors
        x = torch.zeros(case.tokens, pitch, dtype=case.dtype, device=device)
        w = torch.zeros(case.model.f, pitch, dtype=case.dtype, device=device)
        x[:, :d], w[:, :d], w[:, d : d + rank] = t["x"], t["weight"], t["w_b_up"].t()
        out = torch.empty(case.tokens, case.model.f, dtype=case.dtype, device=device)
        stores.append((t["x"], t["weight"], t["z"], t["w_b_up"], x, w, out))

    def base(i: int) -> Tensor:
        x, w, _, _, _, _, out = stores[i]
        return torch.mm(x, w.t(), out=out)

    def addmm(i: int) -> Tensor:
        x, w, c, b, _, _, out = stores[i]
        return torch.mm(x, w.t(), out=out).addmm_(c, b)

    def kconcat(i: int) -> Tensor:
        _, _, c, _, x, w, out = stores[i]
        x[:, d : d + rank] = c
        return torch.mm(x[:, : d + rank], w[:, : d + rank].t(), out=out)

    def op(backend: str) -> Call:
        def call(i: int) -> Any:
            with torch.no_grad():
                return problems[i].call(problems[i].tensors, backend)

        return call

    contenders: dict[str, Call] = {"F.linear, no delta": base, "addmm_": addmm, "kconcat": kconcat}
    contenders |= {f"npt {name}": op(name) for name in backends}
    if "triton" in backends:
        from npt_kernels.ops._triton.segmented_gemm import segmented_gemm

        contenders["triton, one segment"] = lambda i: segmented_gemm([stores[i][:2]])
    return contenders, len(problems)


def _original(t: dict[str, Tensor], model: ModelShape, x: Tensor) -> Tensor:
    """The unmodified, unfused MLP as Hugging Face runs it."""
    act = get_activation(model.act).forward
    up = F.linear(x, t["up_weight"])
    inter = act(F.linear(x, t["gate_weight"])) * up if model.gated else act(up)
    return F.linear(inter, t["down_weight"])


def _plain_npt(t: dict[str, Tensor], model: ModelShape, x: Tensor) -> Tensor:
    """The converted MLP (rule self_key) as a user would write it: what ``torch.compile`` gets."""
    z = t["a"] @ t["w_down"]
    scaled = z * t["key_scale"].unsqueeze(1)
    act = get_activation(model.act).forward
    up = F.linear(x, t["up_weight"]) + scaled @ t["up_value"]
    inter = act(F.linear(x, t["gate_weight"]) + scaled @ t["gate_value"]) * up if model.gated else act(up)
    return F.linear(inter, t["down_weight"]) + z @ t["down_value"]


def _kconcat_mlp(problem: Problem) -> Callable[[], Tensor]:
    """The MLP on K-concatenated vendor GEMMs with the activation as one elementwise expression."""
    t, model, case = problem.tensors, problem.case.model, problem.case
    rank, d, f = case.rank, model.d, model.f
    act = get_activation(model.act).forward
    padded = -(-rank // 64) * 64

    def weight(target: str) -> Tensor:
        w, b = t[f"{target}_weight"], t[f"{target}_value"]
        buffer = torch.zeros(w.shape[0], w.shape[1] + padded, dtype=w.dtype, device=w.device)
        buffer[:, : w.shape[1]], buffer[:, w.shape[1] : w.shape[1] + rank] = w, b.t()
        return buffer[:, : w.shape[1] + rank]

    weights = {target: weight(target) for target in (("gate", "up", "down") if model.gated else ("up", "down"))}
    x = torch.zeros(case.tokens, d + padded, dtype=case.dtype, device=problem.device)
    x[:, :d] = t["x"]  # what produces x is assumed to write it with this pitch
    inter = torch.zeros(case.tokens, f + padded, dtype=case.dtype, device=problem.device)

    def call() -> Tensor:
        z = t["a"] @ t["w_down"]
        torch.mul(z, t["key_scale"].unsqueeze(1), out=x[:, d : d + rank])
        up = F.linear(x[:, : d + rank], weights["up"])
        if model.gated:
            torch.mul(act(F.linear(x[:, : d + rank], weights["gate"])), up, out=inter[:, :f])
        else:
            inter[:, :f] = act(up)
        inter[:, f : f + rank] = z
        return F.linear(inter[:, : f + rank], weights["down"])

    return call


def _mlp_forward(case: Case, backends: list[str], compiled: bool, device: torch.device) -> tuple[dict[str, Call], int]:
    problems = _sets(case, device, most=8)
    model = case.model
    concatenated = [_kconcat_mlp(problem) for problem in problems]

    def without_grad(function: Callable[[Problem], Any]) -> Call:
        def call(i: int) -> Any:
            with torch.no_grad():
                return function(problems[i])

        return call

    contenders: dict[str, Call] = {
        "original": without_grad(lambda p: _original(p.tensors, model, p.tensors["x"])),
        "kconcat": without_grad(lambda p: concatenated[problems.index(p)]()),
    }
    contenders |= {f"npt {b}": without_grad(lambda p, b=b: p.call(p.tensors, b)) for b in backends}
    if compiled:
        function = torch.compile(lambda t, x: _plain_npt(t, model, x), dynamic=False)
        contenders["torch.compile"] = without_grad(lambda p: function(p.tensors, p.tensors["x"]))
    return contenders, len(problems)


def _mlp_training(case: Case, backends: list[str], compiled: bool, device: torch.device) -> tuple[dict[str, Call], int]:
    """Local training (no dx, frozen weights) against the frozen original's forward and dx."""
    problem, model = Problem(case, device), case.model
    t, upstream = problem.tensors, problem.upstream["y"]
    trained = [n for n in t if n == "w_down" or n.endswith(("_key", "_value"))]
    leaves = {n: v.detach().requires_grad_(n in trained) for n, v in t.items()}
    x = t["x"].detach().requires_grad_()

    def original(_: int) -> Any:
        return torch.autograd.grad(_original(t, model, x), x, upstream)

    def npt(backend: str) -> Call:
        return lambda _: torch.autograd.grad(problem.call(leaves, backend)["y"], [leaves[n] for n in trained], upstream)

    contenders: dict[str, Call] = {"original forward + dx": original}
    contenders |= {f"npt {backend}": npt(backend) for backend in backends}
    if compiled:
        function = torch.compile(lambda t: _plain_npt(t, model, t["x"]), dynamic=False)
        contenders["torch.compile"] = lambda _: torch.autograd.grad(
            function(leaves), [leaves[n] for n in trained], upstream
        )
    return contenders, 1


def _kernel(
    case: Case, names: tuple[str, str], backends: list[str], device: torch.device
) -> tuple[dict[str, Call], int]:
    """A kernel against the vendor's products: (vendor's name, ours)."""
    problems = _sets(case, device)
    contenders: dict[str, Call] = {names[0]: lambda i: problems[i].run("eager")}
    for backend in backends:
        if backend != "eager":
            contenders[f"{backend}, {names[1]}"] = lambda i, backend=backend: problems[i].run(backend)
    return contenders, len(problems)


def _norm(case: Case, backends: list[str], device: torch.device) -> tuple[dict[str, Call], int]:
    problems = _sets(case, device)

    def call(backend: str) -> Call:
        def run(i: int) -> Any:
            with torch.no_grad():
                return problems[i].call(problems[i].tensors, backend)

        return run

    usable = [backend for backend in backends if BACKENDS[backend].lacks("matched_norm") is None]
    return {f"npt {backend}": call(backend) for backend in usable}, len(problems)


def workloads(models: dict[str, ModelShape], backends: list[str], small: bool, compiled: bool) -> list[Workload]:
    """All workloads, the most important first."""
    eight, seventy, gpt2 = models["8B"], models["70B"], models["GPT-2"]
    many, few = (40, (1, 5)) if small else (8192, (1, 16, 64, 256))
    rank, ranks = (8, (16,)) if small else (64, (1024, 4096))
    bf16 = torch.bfloat16
    base = Case("mlp", eight, many, bf16, rank=rank)
    result: list[Workload] = []

    def add(name: str, baseline: str, make: Any, tokens: int, note: str = "") -> None:
        result.append(Workload(name, make, baseline, tokens, note))

    for model, tokens in ((eight, many), (gpt2, many)):
        case = replace(base, model=model, tokens=tokens)
        add(f"MLP forward {model.name} T={tokens} R={rank}", "original",
            lambda device, case=case: _mlp_forward(case, backends, compiled, device), tokens)  # fmt: skip
    add(f"gate projection 8B T={many} R={rank}", "F.linear, no delta",
        lambda device: _gate(replace(base, op="factored_linear"), backends, device), many)  # fmt: skip
    for model in (eight, gpt2):
        case = replace(base, model=model)
        add(f"MLP local training {model.name} T={many} R={rank}", "original forward + dx",
            lambda device, case=case: _mlp_training(case, backends, compiled and case.model is eight, device), many)  # fmt: skip
    for tokens in few:
        case = replace(base, tokens=tokens)
        add(f"MLP forward 8B T={tokens} R={rank}", "original",
            lambda device, case=case: _mlp_forward(case, backends, False, device), tokens)  # fmt: skip
    for wide in ranks:
        case = replace(base, op="factored_linear", rank=wide)
        add(f"gate projection 8B T={many} R={wide}", "F.linear, no delta",
            lambda device, case=case: _gate(case, backends, device), many)  # fmt: skip
    add(f"skinny pair 8B T={many} R={rank}", "two GEMMs",
        lambda device: _kernel(replace(base, op="skinny"), ("two GEMMs", "one pass"), backends, device), many)  # fmt: skip
    case, names = replace(base, op="coefficients", rule="rank1"), ("two GEMMs + rule", "one kernel")
    add(f"coefficients rank1 8B T={many} R={rank}", names[0],
        lambda device, case=case, names=names: _kernel(case, names, backends, device), many)  # fmt: skip
    add(
        f"matched norm 8B T={many}",
        "npt eager",
        lambda device: _norm(replace(base, op="matched_norm"), backends, device),
        many,
    )
    case = replace(base, model=seventy, tokens=2048 if not small else many)
    add(f"MLP forward 70B T={case.tokens} R={rank}", "original",
        lambda device, case=case: _mlp_forward(case, backends, False, device), case.tokens)  # fmt: skip
    if "cuda" in backends:
        from .cuda_kernels import cuda_rows

        for name, baseline, tokens, make in cuda_rows(small):
            add(name, baseline, make, tokens)
    return result
