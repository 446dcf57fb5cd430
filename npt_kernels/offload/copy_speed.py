"""The arithmetic of streaming: a layer's transfer against the work that hides it.

A local step visits each layer once for m micro-batches of T tokens. While it computes, the next layer arrives, so a visit costs
``max(transfer, m·work)`` and the transfer is hidden from ``m ≥ transfer ÷ work`` on. Per token, a converted layer does

    2·(attention weights)   +   4·d·seq/2 (scores and values, causal)   +   2·3·d·f each for the original and the converted MLP
    +   2·d·f (the local backward through the down projection)   +   6 × the NP parameters

floating-point operations ("attention + 7 GEMMs"). The rates are assumptions, stated with every line that is printed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["RATES", "Rates", "TransferPlan", "flops_per_token", "plan_transfer"]


@dataclass(frozen=True)
class Rates:
    """Assumed speeds. ``host``: bytes/s from pinned memory; ``pageable``; ``disk``; ``flops``: achieved, of matrix products."""

    host: float = 25e9
    pageable: float = 8e9
    disk: float = 3e9
    flops: float = 400e12

    def transfer(self, where: str) -> float:
        """Bytes per second from ``host``, ``pageable`` or ``disk``."""
        return {"host": self.host, "pageable": self.pageable, "disk": self.disk}[where]


#: PCIe 4.0 ×16 moves about 25 GB/s of its 31.5; PCIe 5.0 about 50. An NVMe disk reads 3 GB/s. 400 TFLOP/s is about 40 % of the
#: dense bf16 peak of an H100 or H200 (989).
RATES = Rates()


def flops_per_token(
    *, hidden: int, intermediate: int, attention_weights: int, np_parameters: int, seq: int, gated: bool = True
) -> float:
    """Floating-point operations per token of one layer in local training (module docstring).

    Args:
        hidden, intermediate: d and f.
        attention_weights: Numbers in the layer's attention projections.
        np_parameters: Of the layer's NP component.
        seq: Tokens per sequence.
        gated: Three MLP matrices, else two.
    """
    mlp = (3 if gated else 2) * hidden * intermediate
    return 2.0 * attention_weights + 2.0 * hidden * seq + 4.0 * mlp + 2.0 * hidden * intermediate + 6.0 * np_parameters


@dataclass(frozen=True)
class TransferPlan:
    """One layer's transfer against its work.

    Attributes:
        where: ``host``, ``pageable`` or ``disk``.
        layers: Streamed layers.
        layer_bytes: Of the largest one.
        host_bytes: Of all of them.
        device_bytes: Of the two buffers.
        transfer_seconds: Of the largest layer.
        compute_seconds: Of one micro-batch at one layer.
        tokens: Of one micro-batch.
        micro_batches: ``micro_batches_per_layer`` of the run.
        rates: What was assumed.
    """

    where: str
    layers: int
    layer_bytes: int
    host_bytes: int
    device_bytes: int
    transfer_seconds: float
    compute_seconds: float
    tokens: int
    micro_batches: int
    rates: Rates

    @property
    def hiding_micro_batches(self) -> int:
        """The smallest ``micro_batches_per_layer`` whose work takes as long as the transfer."""
        return max(1, math.ceil(self.transfer_seconds / self.compute_seconds))

    @property
    def visit_seconds(self) -> float:
        """One layer, ``micro_batches`` micro-batches."""
        return max(self.transfer_seconds, self.micro_batches * self.compute_seconds)

    @property
    def slowdown(self) -> float:
        """Time ÷ that of a resident model."""
        return self.visit_seconds / (self.micro_batches * self.compute_seconds)

    def step_seconds(self, micro_batches: int) -> float:
        """All layers for an optimizer step of so many micro-batches."""
        whole, rest = divmod(micro_batches, self.micro_batches)
        last = max(self.transfer_seconds, rest * self.compute_seconds) if rest else 0.0
        return self.layers * (whole * self.visit_seconds + last)

    def lines(self) -> list[str]:
        """For people."""
        place = {"host": "pinned host memory", "pageable": "host memory", "disk": "mapped files"}[self.where]
        first = (
            f"streaming: {self.layers} layers of {_size(self.layer_bytes)} in {place} ({_size(self.host_bytes)}), "
            f"two buffers on the device ({_size(self.device_bytes)})"
        )
        rate = self.rates.transfer(self.where) / 1e9
        work = (
            f"streaming: a layer arrives in {_time(self.transfer_seconds)} (assuming {rate:g} GB/s), "
            f"{self.micro_batches} × {self.tokens:,} tokens of local training keep it busy for "
            f"{_time(self.micro_batches * self.compute_seconds)} (assuming {self.rates.flops / 1e12:g} TFLOP/s)"
        )
        if self.hiding_micro_batches <= self.micro_batches:
            return [first, f"{work}: hidden"]
        return [
            first,
            f"{work}: {self.slowdown:.1f} × the time of a resident model; optimization.micro_batches_per_layer="
            f"{self.hiding_micro_batches} (with training.gradient_accumulation_steps of at least that) would hide it",
        ]


def plan_transfer(
    layer_bytes: list[int],
    layer_flops_per_token: float,
    tokens: int,
    *,
    where: str = "host",
    micro_batches: int = 1,
    rates: Rates = RATES,
) -> TransferPlan:
    """The plan of streaming layers of ``layer_bytes`` each.

    Args:
        layer_bytes: Streamed bytes of every layer.
        layer_flops_per_token: Of :func:`flops_per_token`, or counted otherwise.
        tokens: Of one micro-batch.
        where: ``host``, ``pageable`` or ``disk``.
        micro_batches: Per visit of a layer.
        rates: Assumed speeds.

    Raises:
        ValueError: No layers, or a number that is not positive.
    """
    if not layer_bytes or min(tokens, micro_batches) < 1 or layer_flops_per_token <= 0:
        raise ValueError(
            f"a transfer plan needs layers, tokens and work: {len(layer_bytes)} layers, tokens={tokens}, "
            f"micro_batches={micro_batches}, layer_flops_per_token={layer_flops_per_token}"
        )
    largest = max(layer_bytes)
    return TransferPlan(
        where=where, layers=len(layer_bytes), layer_bytes=largest, host_bytes=sum(layer_bytes), device_bytes=2 * largest,
        transfer_seconds=largest / rates.transfer(where), compute_seconds=tokens * layer_flops_per_token / rates.flops,
        tokens=tokens, micro_batches=micro_batches, rates=rates,
    )  # fmt: skip


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
