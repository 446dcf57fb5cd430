"""MFU: how much of the GPU's arithmetic goes into what the mathematics of a training step needs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..estimate.devices import Gpu, local_gpu
from ..estimate.flops import needed_flops
from ..estimate.model_sizes import Adapter, read_numbers
from ..model.install import converted_layers, npt_disabled

__all__ = ["Utilisation", "utilisation_of"]


@dataclass(frozen=True)
class Utilisation:
    """What MFU is made of.

    Attributes:
        flops_per_token: Operations that a trained token needs (:func:`npt_kernels.estimate.flops.needed_flops`): two per
            multiply-add; recomputing activations is not needed.
        peak: Of all devices together, dense bfloat16, operations per second, from the data sheet whatever the run's dtype.
    """

    flops_per_token: int
    peak: float

    def mfu(self, tokens: int, seconds: float) -> float:
        """``tokens`` of the global step in ``seconds``: 1 would be the data sheet's rate."""
        return self.flops_per_token * tokens / (max(seconds, 1e-9) * self.peak)


def utilisation_of(
    model: nn.Module, length: int, objective: str, *, batch: int | None = None, devices: int = 1, gpu: Gpu | None = None
) -> Utilisation | None:
    """For training a converted model on this machine's GPU; ``None`` on a CPU and on GPUs whose peak is not known.

    Args:
        model: A converted model.
        length: Tokens of a sequence.
        objective: ``local``, ``layer``, ``kl`` or ``task``.
        batch: Sequences of a micro-batch, for products that are made once for all of it; ``None``: many.
        devices: GPUs that share the steps.
        gpu: Instead of this machine's.
    """
    gpu = gpu or local_gpu()
    if gpu is None:
        return None
    layers = converted_layers(model)
    components = [layer.np_component for layer in layers.values()]
    first = next(iter(layers.values()))
    try:
        with npt_disabled(model):
            numbers = read_numbers(model)
    except (ValueError, StopIteration):
        return None  # a base that the planner cannot read trains without this figure
    # The operations are linear in the rank, so the mean stands for layers of different ranks.
    mean = round(sum(component.total_rank for component in components) / len(components))
    adapter = Adapter(
        layers=sorted(layers), ranks=[mean] * len(layers), parameters=[], targets=components[0].target_shapes,
        slots={target: first.npt_plan.shape.targets[target].slot for target in components[0].target_shapes},
        key=components[0].rule.key, norm_match=first.npt_plan.norm_match, fold=first.npt_plan.fold,
        no_projection=first.npt_plan.projection is not None,
    )  # fmt: skip
    phase = objective if objective in ("local", "task") else "end_to_end"
    flops = needed_flops(numbers, adapter, length, phase, micro=None if batch is None else batch * length)
    if objective == "layer":  # no head, in either direction
        flops -= 3 * 2 * numbers.hidden_size * numbers.vocab_size
    return Utilisation(flops, gpu.tflops * 1e12 * devices)
