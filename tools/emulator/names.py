"""The one file here that knows what csrc/ and the package call things. Something was renamed? Mend it here.

Importing it chooses the emulated module for the whole process, so tests import it in processes of their own.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["NPT_EMULATE"] = "1"  # before the package is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import Tensor

MODULE = "npt_kernels._cuda_emulated"


def use_module(path: Path) -> ModuleType:
    """Import the emulated module from ``path`` instead of the package's folder (mutants, sanitizer builds)."""
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[MODULE] = module
    return module


if os.environ.get("NPT_EMULATED_MODULE"):
    use_module(Path(os.environ["NPT_EMULATED_MODULE"]))

from npt_kernels.kernels.cuda import coefficients, launch, norm, rules, support, value_grads
from npt_kernels.kernels.cuda.choose import Config, Epilogue, Family
from npt_kernels.kernels.cuda.launch import LOW, LOW_FIRST, LOW_SECOND, MAIN, Segment
from tests.support.mlp_calls import MlpCalls

__all__ = [
    "ACT",
    "ACTIVATIONS",
    "ACT_BWD",
    "DTYPES",
    "GATE_UP",
    "GATE_UP_BWD",
    "LOW",
    "LOW_FIRST",
    "LOW_SECOND",
    "MAIN",
    "STORE",
    "Segment",
    "extension",
    "forward_mlp",
    "gemm_kernels",
    "gemm_label",
    "is_decode",
    "low_rank_kernels",
    "low_rank_kind",
    "run_coefficients",
    "run_gemm",
    "run_norm",
    "run_reduce",
    "run_rule",
    "run_value_grads",
    "splits",
    "use_module",
]  # fmt: skip

DTYPES = {number: dtype for dtype, number in launch.DTYPES.items()}
ACTIVATIONS = launch.FUSED_ACTIVATIONS
STORE, ACT, GATE_UP = Epilogue.STORE, Epilogue.ACT, Epilogue.GATE_UP
ACT_BWD, GATE_UP_BWD = Epilogue.ACT_BWD, Epilogue.GATE_UP_BWD

_FAMILIES = {Family.COOP: "cooperative", Family.PINGPONG: "ping-pong", Family.DECODE: "decode", Family.SPLIT: "split"}
_EPILOGUES = {STORE: "store", ACT: "act", GATE_UP: "gate_up", ACT_BWD: "act_bwd", GATE_UP_BWD: "gate_up_bwd"}
#: csrc/low_rank_dispatch.h, LowRankFamily.
_LOW_RANK = {0: "coefficients", 1: "value_grads", 2: "rule", 3: "rule_bwd", 4: "reduce", 5: "norm", 6: "norm_bwd"}


def extension() -> ModuleType:
    """The emulated module. Raises ``ImportError`` with the way to get it."""
    return support.extension()


# ------------------------------------------------------------------------------------------------ which kernels exist
def gemm_kernels() -> list[dict[str, Any]]:
    """Every segmented-K instance: family, epilogue, dtype, mn_major, cluster, block_m, block_n."""
    return [{**k, "family": Family(k["family"]), "epilogue": Epilogue(k["epilogue"])} for k in extension().kernels()]


def gemm_label(kernel: dict[str, Any]) -> str:
    """``cooperative store`` and so on."""
    return f"{_FAMILIES[kernel['family']]} {_EPILOGUES[kernel['epilogue']]}"


def is_decode(kernel: dict[str, Any]) -> bool:
    return kernel["family"] == Family.DECODE  # type: ignore[no-any-return]


def splits(kernel: dict[str, Any], depth: int) -> list[int]:
    """Into how many parts it can split a K of ``depth``."""
    if kernel["family"] == Family.DECODE:
        return [1, 2, 4, 8]
    if kernel["family"] == Family.SPLIT:
        return [n for n in (1, 2, 4, 8) if n * kernel["cluster"] <= 8 and n * 64 <= max(depth, 64)]
    return [1]


def low_rank_kernels() -> list[dict[str, Any]]:
    """Every low-rank instance: family, dtype, tile, variant."""
    return extension().low_rank_kernels()  # type: ignore[no-any-return]


def low_rank_kind(kernel: dict[str, Any]) -> dict[str, Any]:
    """What an instance computes: ``kind`` and, by kind, ``key_kind``, ``compute_z``, ``vector``, ``shares``, ``accesses``."""
    kind, variant = _LOW_RANK[kernel["family"]], kernel["variant"]
    if kind == "coefficients":
        return {"kind": kind, "key_kind": variant // 10, "compute_z": bool(variant % 10)}
    if kind.startswith("norm"):
        return {"kind": kind, "accesses": variant}
    if kind.startswith("rule"):
        return {"kind": kind, "vector": variant % 10, "shares": variant >= 10}
    return {"kind": kind}


# ------------------------------------------------------------------------------------------------ launches on `sms` SMs
def run_gemm(
    kernel: dict[str, Any],
    segments: Sequence[Segment],
    outputs: Sequence[Tensor | None],
    *,
    sms: int,
    inputs: Sequence[Tensor] = (),
    bias: Tensor | None = None,
    activation: tuple[float, float] = (1.0, 0.0),
    store_pre: bool = False,
    group: int = 2,
    split: int = 1,
    overlap: launch.Overlap = None,
) -> None:
    """One segmented-K product on exactly this instance."""
    config = Config(
        kernel["family"],
        kernel["epilogue"],
        kernel["cluster"],
        kernel["block_m"],
        kernel["block_n"],
        group,
        "test",
        split,
    )
    arguments = launch.launch_arguments(
        kernel["epilogue"], segments, outputs, inputs=inputs, bias=bias, activation=activation, store_pre=store_pre,
        overlap=overlap, config=config,
    )  # fmt: skip
    extension().launch(*arguments, sms, 0)


def run_coefficients(
    a: Tensor | None, u: Tensor | None, w_down: Tensor | None, key: Tensor | None, key_kind: int, key_scale: Tensor | None,
    z: Tensor, p: Tensor | None, c: Tensor | None, rule: str, terms: int, scale: float, tile: int, parts: int, sms: int,
) -> None:  # fmt: skip
    """z, p and c of a rule; ``key`` as stored."""
    width = z.shape[1] // terms
    plan = coefficients.CoefficientsPlan(tile, parts, "test")
    arguments = coefficients.coefficients_arguments(
        a, u, w_down, key, key_kind, key_scale, z, p, c, rule, width, scale, plan
    )
    extension().coefficients(*arguments, sms, 0)


def run_value_grads(dy: Tensor, c: Tensor, w_b_up: Tensor, dc: Tensor, db: Tensor, ranges: int, sms: int) -> None:
    """Shares of dc and d w_b_up, fp32."""
    extension().value_grads(*value_grads.pair_arguments(dy, c, w_b_up, dc, db, ranges), sms, 0)


def run_reduce(shares: Tensor, out: Tensor, sms: int, size: int | None = None) -> None:
    """``out = shares.sum(0)``; ``size``: a number of elements that is not true."""
    dtype, source, target, elements, parts = rules.reduce_arguments(shares, out)
    extension().reduce(dtype, source, target, size or elements, parts, sms, 0)


def run_rule(
    backward: bool, z: Tensor, p: Tensor | None, c: Tensor | None, dc: Tensor | None, dz: Tensor | None, dp: Tensor | None,
    shares: Tensor | None, key_scale: Tensor | None, rule: str, terms: int, scale: float, sms: int,
) -> None:  # fmt: skip
    """A rule alone: c, or dz and dp."""
    arguments = rules.rule_arguments(backward, z, p, c, dc, dz, dp, shares, key_scale, rule, terms, scale)
    extension().rule(*arguments, sms, 0)


def run_norm(
    backward: bool, h: Tensor, a: Tensor, du: Tensor | None, u: Tensor | None, dh: Tensor | None, da: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, key_scale: Tensor | None, d_key_scale: Tensor | None, kind: str, eps: float,
    sms: int,
) -> None:  # fmt: skip
    """matched_norm: u and key_scale, or dh and da."""
    arguments = norm.norm_arguments(backward, h, a, du, u, dh, da, weight, bias, key_scale, d_key_scale, kind, eps)
    extension().norm(*arguments, sms, 0)


def forward_mlp(x: Tensor, weights: dict[str, Tensor | None], rule: str) -> Tensor:
    """The package's gated MLP, with its own choice of kernels and of what may overlap."""
    order = ("gate_key", "gate_value", "up_key", "up_value", "down_key", "down_value")
    return MlpCalls("cuda").forward(
        x, x, None, weights["gate_weight"], weights["up_weight"], weights["down_weight"], None, None, None, weights["w_down"],
        *(weights[name] for name in order), "silu", rule, 1, 1.0, False,
    )[0]  # fmt: skip
