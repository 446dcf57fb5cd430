"""The registry of shapes: which models, at real sizes and small ones, and one case of an op at such a size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

__all__ = ["MODELS", "SMALL_MODELS", "Case", "ModelShape"]

#: Small shapes of ``npt bench`` are the real ones with every width divided by this.
SMALL_DIVISOR = 16


@dataclass(frozen=True)
class ModelShape:
    """The MLP of a model: ``d`` hidden size, ``f`` MLP width, gated (gate, up, down) or plain (c_fc, c_proj)."""

    name: str
    d: int
    f: int
    gated: bool = True
    act: str = "silu"
    norm: str = "rms"
    #: The model's own name, where ``name`` is short for it.
    title: str = ""

    @property
    def targets(self) -> tuple[str, ...]:
        """Slots of the op ``mlp`` that this MLP has."""
        return ("gate", "up", "down") if self.gated else ("up", "down")

    def small(self) -> ModelShape:
        """The same proportions at a sixteenth of every width."""
        n = SMALL_DIVISOR
        return replace(self, name=f"{self.name} ÷{n}", title=f"{self.title} ÷{n}", d=self.d // n, f=self.f // n)


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("SmolLM2", 576, 1536, title="SmolLM2-135M"),
        ModelShape("GPT-2", 768, 3072, gated=False, act="gelu_new", norm="layer", title="GPT-2"),
        ModelShape("1B", 2048, 8192, title="Llama-3.2-1B"),
        ModelShape("8B", 4096, 14336, title="Llama-3.1-8B"),
        ModelShape("70B", 8192, 28672, title="Llama-3.1-70B"),
    )
}
SMALL_MODELS = {
    "8B": ModelShape("8B-small", 48, 80, title="8B-small"),
    "70B": ModelShape("70B-small", 64, 96, title="70B-small"),
    "GPT-2": ModelShape("GPT-2-small", 32, 56, gated=False, act="gelu_new", norm="layer", title="GPT-2-small"),
}


@dataclass(frozen=True)
class Case:
    """One numeric check.

    Attributes:
        op: ``linear``, ``factored_linear``, ``mlp``, ``matched_norm``, ``coefficients`` or ``value_grads``.
        rank: R = k·r.
        key_scale: With a key scale (norm matched), for ``mlp``.
        sums: Whether gradients that are sums over tokens are compared too (their float64 truth costs a full pass).
        backward: Whether gradients are compared at all.
    """

    op: str
    model: ModelShape
    tokens: int
    dtype: torch.dtype
    rule: str = "self_key"
    rank: int = 64
    num_ranks: int = 1
    key_scale: bool = True
    sums: bool = True
    backward: bool = True

    def __str__(self) -> str:
        parts = [self.op, self.model.name, f"T={self.tokens}", str(self.dtype).removeprefix("torch.")]
        if self.op not in ("linear", "matched_norm"):
            parts.append(f"{self.rule} R={self.rank}" + (f" k={self.num_ranks}" if self.num_ranks > 1 else ""))
        if not self.backward:
            parts.append("forward")
        return " ".join(parts)
