"""``optimization.mixed_precision: auto``: bfloat16 where the device computes in it, float32 elsewhere; decided once.

Measured on a CPU with AVX2 but without bf16 instructions (2 cores, 2026-11-25, commit 89296b4): a product 512 × 576 × 1536 takes
6.5 ms in float32 and 52.7 ms in bfloat16; training SmolLM2-135M runs at 100 tokens/s and 4.
"""

from __future__ import annotations

import os
import platform

import torch

from ..configs.schema import RunConfig

__all__ = ["bf16_arithmetic", "choose_mixed_precision", "settle_mixed_precision", "slow_bf16"]

#: Values of ``ONEDNN_MAX_CPU_ISA`` under which oneDNN has no bf16 instructions (its documentation, "CPU dispatcher control").
_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}


def bf16_arithmetic(device: torch.device) -> tuple[bool, str]:
    """Whether ``device`` multiplies bfloat16 in hardware, and the reason in words.

    ``ONEDNN_MAX_CPU_ISA=AVX2`` makes a CPU one without, for oneDNN as for this answer: so another machine can be imitated.
    """
    if device.type == "cuda":
        if not torch.cuda.is_available():  # a plan for a GPU that is elsewhere: every one that it knows has bf16
            return True, "GPUs since Ampere have bf16 arithmetic"
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"compute capability {major}.{minor} has {'' if major >= 8 else 'no '}bf16 arithmetic"
    if device.type != "cpu":
        return False, f"bf16 arithmetic on device {device.type!r} is not known"
    limit = next((os.environ[k] for k in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if os.environ.get(k)), "")
    if limit.upper() in _WITHOUT_BF16:
        return False, f"ONEDNN_MAX_CPU_ISA={limit} leaves the CPU without bf16 instructions"
    # oneDNN says yes for every AVX-512, where it emulates; so the CPU is asked as well.
    if not _onednn_takes_bf16():
        return False, "the CPU has no bf16 instructions"
    if platform.machine().lower() in ("x86_64", "amd64"):
        found = [
            name
            for name, has in (
                ("amx", torch.cpu._is_amx_tile_supported()),
                ("avx512_bf16", torch.cpu._is_avx512_bf16_supported()),
            )
            if has
        ]
        return bool(found), f"the CPU has {' and '.join(found)}" if found else "the CPU has no bf16 instructions"
    return True, "the CPU has bf16 instructions"


def _onednn_takes_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_mixed_precision(config: RunConfig, device: torch.device) -> str:
    """``no``, ``bf16`` or ``fp16``: the key, or what its ``auto`` is on this device."""
    asked = config.optimization.mixed_precision
    return asked if asked != "auto" else "bf16" if bf16_arithmetic(device)[0] else "no"


def settle_mixed_precision(config: RunConfig, device: torch.device) -> str | None:
    """Put the choice into ``config``, which the run records and a resumed run takes; a line that says it, or ``None``."""
    asked, chosen = config.optimization.mixed_precision, choose_mixed_precision(config, device)
    config.optimization.mixed_precision = chosen  # type: ignore[assignment]
    has, why = bf16_arithmetic(device)
    if asked == "auto":
        return f"mixed_precision: auto is {chosen} ({'bfloat16 products' if has else 'float32'}): {why}"
    if chosen == "bf16" and not has and device.type == "cpu":
        return slow_bf16(why)
    return None


def slow_bf16(why: str) -> str:
    """What bf16 costs where there are no instructions for it."""
    return (
        f"optimization.mixed_precision=bf16, but {why}: products take 8 times as long as in float32 and training 25 times "
        "(measured on AVX2); use auto or no"
    )
