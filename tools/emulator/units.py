"""What a mutation compiles again and runs. With names.py this is all that knows what csrc/ calls things.

``UNITS``: name → (stem of the translation unit, command).
"""

from __future__ import annotations

__all__ = ["UNITS"]


def _check(family: str) -> tuple[str, ...]:
    return ("check.py", "--shapes", "3", "--stop", "--bf16", "--jobs", "1", "--family", family)


UNITS = {
    "cooperative": ("coop_bf16", _check("cooperative")),
    "split": ("split_bf16", _check("split")),
    "pingpong": ("pingpong_bf16", _check("ping-pong (store|act|gate_up)$")),
    "pingpong_bwd": ("pingpong_bwd_bf16", _check("bwd")),
    "decode": ("decode_bf16", _check("decode")),
    "overlap": ("decode_bf16", ("overlap.py", "6")),
    "coefficients": ("coefficients_bf16", _check("coefficients")),
    "value_grads": ("low_rank_bf16", _check("value_grads")),
    "norm": ("norm_bf16", _check("norm")),
}
