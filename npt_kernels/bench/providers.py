"""The registry of providers: everything a user would pick instead of the fused kernels, on the same tensors.

A provider says what it computes (``reference.py``), where it can run, and how to build a call. The results of that call are
compared with float64 before it is timed (``kernels.py``); so every provider returns what it computed, by name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..measure.problems import Problem
from ..measure.reference import plain, wanted_gradients
from ..ops.registry import explain
from . import peers
from .kconcat import kconcat_forward
from .results import unknown_name

__all__ = ["BASELINE", "PROVIDERS", "Provider", "Results", "find_provider", "training_call"]

Results = Callable[[], dict[str, Tensor]]
#: ``compute(tensors) -> y``: differentiable in the tensors.
Compute = Callable[[dict[str, Tensor]], Tensor]

#: What ratios are taken to.
BASELINE = "frozen"


@dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Attributes:
        name: What ``--provider`` takes.
        summary: One line for ``--help`` and the report.
        function: Which function it computes: ``npt``, ``frozen`` or ``lora``.
        prepare: ``(problem, mode) -> call``; ``call()`` computes everything the mode asks for and returns it by name.
        why_not: ``(problem's case, mode, device) -> reason it cannot run, or None``.
        floor: Multiple of eps · max|truth| by which it may miss the plain form beyond twice its error; 2 unless said why.
        slow: Whether a call may take so long that it is estimated before it is made.
        applies: ``(case, mode)``: whether it makes sense at all; where it does not, it only takes part when asked for by name.
    """

    name: str
    summary: str
    function: str
    prepare: Callable[[Problem, str], Results]
    why_not: Callable[[Any, str, torch.device], str | None]
    floor: float = 2.0
    slow: bool = False
    applies: Callable[[Any, str], bool] = lambda case, mode: True


def find_provider(name: str) -> Provider:
    """The provider of that name. Raises :class:`BenchError` naming those that exist."""
    if name.lower() not in PROVIDERS:
        raise unknown_name("--provider", name, PROVIDERS)
    return PROVIDERS[name.lower()]


# ---- building calls --------------------------------------------------------------------------------------------------


def training_call(problem: Problem, function: str, mode: str, tensors: dict[str, Tensor], compute: Compute) -> Results:
    """``compute`` with the gradients that the mode asks for, as a call that returns them by name."""
    wanted = wanted_gradients(problem, function, mode)
    if not wanted:

        def forward() -> dict[str, Tensor]:
            with torch.no_grad():
                return {"y": compute(tensors)}

        return forward
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    inputs = [leaves[name] for name in wanted]
    names = [f"d {name}" if name in problem.per_token else f"sum d {name}" for name in wanted]
    upstream = next(iter(problem.upstream.values()))

    def both() -> dict[str, Tensor]:
        y = compute(leaves)
        grads = torch.autograd.grad(y, inputs, upstream)
        return {"y": y.detach(), **dict(zip(names, grads, strict=True))}

    return both


def _from(function: str, build: Callable[[Problem], Compute]) -> Callable[[Problem, str], Results]:
    def prepare(problem: Problem, mode: str) -> Results:
        return training_call(problem, function, mode, problem.tensors, build(problem))

    return prepare


def _plain(function: str) -> Callable[[Problem], Compute]:
    return lambda problem: lambda tensors: plain(problem, function, tensors)


def _backend(name: str) -> Callable[[Problem], Compute]:
    return lambda problem: lambda tensors: next(iter(problem.call(tensors, name).values()))


def _triton_mainloop(problem: Problem) -> Compute:
    from ..kernels.triton.segmented_gemm import segmented_gemm

    return lambda tensors: segmented_gemm([(tensors["x"], tensors["weight"])])


def _cuda_mainloop(problem: Problem) -> Compute:
    from ..kernels.cuda.steps import fused_sum

    def compute(tensors: dict[str, Tensor]) -> Tensor:
        y = fused_sum("bench", [(tensors["x"], tensors["weight"])], [])
        if y is None:
            raise RuntimeError("these sizes cannot be fused")
        return y

    return compute


def _compiled(problem: Problem) -> Compute:
    # A function of its own per problem: dynamo would otherwise count every shape as a recompilation of one and give up.
    return torch.compile(lambda tensors: plain(problem, "npt", tensors), dynamic=False)


# ---- availability ----------------------------------------------------------------------------------------------------


def _always(case: Any, mode: str, device: torch.device) -> str | None:
    return None


def _ours(backend: str) -> Callable[[Any, str, torch.device], str | None]:
    def why_not(case: Any, mode: str, device: torch.device) -> str | None:
        act = case.model.act if case.op == "mlp" else None
        explanation = explain(case.op, device=device, dtype=case.dtype, act=act, backend=backend)
        return None if explanation.chosen == backend else explanation.reasons[backend]

    return why_not


def _has_product(case: Any, mode: str) -> bool:
    return bool(case.op != "matched_norm")


def _is_bare_product(case: Any, mode: str) -> bool:
    return case.op == "factored_linear" and mode in ("forward", "decode")


def _mainloop(backend: str) -> Callable[[Any, str, torch.device], str | None]:
    def why_not(case: Any, mode: str, device: torch.device) -> str | None:
        if not _is_bare_product(case, mode):
            return "it is the bare product of one projection, forward only"
        return _ours(backend)(case, mode, device)

    return why_not


def _not_for_norms(case: Any, mode: str, device: torch.device) -> str | None:
    return f"{case.op} has no product to put it into" if case.op == "matched_norm" else None


def _can_compile(case: Any, mode: str, device: torch.device) -> str | None:
    import shutil

    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton on a GPU: pip install triton"
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler on a CPU: apt-get install g++"
    return None


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(
            "frozen", "the same layer without a delta on the vendor's GEMM: the floor that ratios are taken to",
            "frozen", _from("frozen", _plain("frozen")), _always,
        ),
        Provider(
            "eager", "ours, plain PyTorch: in-place addmm on the vendor's GEMM",
            "npt", _from("npt", _backend("eager")), _ours("eager"),
        ),
        Provider(
            "kconcat", "vendor's GEMM over padded buffers [x | c] and [W | B], activation as elementwise operations",
            "npt", _from("npt", kconcat_forward), _not_for_norms, applies=_has_product,
        ),
        Provider(
            "compile", "torch.compile of the factored form as a user would write it",
            "npt", _from("npt", _compiled), _can_compile,
        ),
        Provider("triton", "ours, portable fused kernels", "npt", _from("npt", _backend("triton")), _ours("triton")),
        Provider(
            "cuda", "ours, hand-written Hopper kernels",
            "npt", _from("npt", _backend("cuda")), _ours("cuda"), applies=_has_product,
        ),
        Provider(
            "triton-mainloop", "ours, Triton's GEMM without a delta: tells the main loop's quality from the fusion's gain",
            "frozen", _from("frozen", _triton_mainloop), _mainloop("triton"), applies=_is_bare_product,
        ),
        Provider(
            "cuda-mainloop", "ours, the Hopper GEMM without a delta",
            "frozen", _from("frozen", _cuda_mainloop), _mainloop("cuda"), applies=_is_bare_product,
        ),
        Provider(
            "loop", "the published way: token by token, build W + ΔW_t, multiply", "npt",
            _from("npt", peers.loop), peers.why_not_loop, floor=peers.ROUNDED_WEIGHT, slow=True,
            applies=_has_product,
        ),
        Provider(
            "materialised", "all ΔW_t of the batch built, then one batched product", "npt",
            _from("npt", peers.materialised), peers.why_not_materialised, floor=peers.ROUNDED_WEIGHT, slow=True,
            applies=_has_product,
        ),
        Provider(
            "peft", "PEFT's LoRA linears on the same projections (a static delta, from x)",
            "lora", peers.prepare_peft, peers.why_not_peft, applies=_has_product,
        ),
        Provider(
            "liger", "Liger's SwiGLU: the frozen MLP with a fused activation, no delta", "frozen",
            _from("frozen", peers.liger), peers.why_not_liger, applies=peers.has_swiglu,
        ),
    )
}  # fmt: skip
