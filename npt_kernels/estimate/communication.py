"""Bytes that devices exchange in an optimizer step, by the way a run is spread. ``docs/scaling.md`` says where each comes from.

Of a ring all-reduce over n devices each sends 2 (n − 1)/n of the tensor, of a gather of a sharded tensor it receives
(n − 1)/n. Latency is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..configs.schema import RunConfig
from .model_sizes import Adapter, ModelNumbers
from .parallel import Parallel
from .storage import Precision

__all__ = ["Exchange", "exchanges", "pipeline_bubble", "tensor_gradients", "tensor_per_token"]


@dataclass(frozen=True)
class Exchange:
    """What each device sends (or, gathering, receives) in one optimizer step: ``bytes``, over which group, and of what."""

    group: str
    bytes: int
    what: str


def tensor_per_token(model: ModelNumbers, adapter: Adapter, phase: str) -> dict[str, int]:
    """Numbers per token and layer that a tensor-parallel group all-reduces: ``forward`` and ``backward``.

    local: attention's output, the original MLP's, the converted one's; the loss's gradient is the same on every device and
    stays there. end_to_end: both models' attention and MLP outputs; backward the MLP's and the attention's input gradients, z's
    gradient, and 1/ρ's where norms are matched. No rule needs more: c is linear in the key product p and every gradient in
    the gradient of c, so partial sums pass through to what is summed anyway.
    """
    d = model.hidden_size
    if phase == "local":
        return {"forward": 3 * d, "backward": 0}
    return {"forward": 4 * d, "backward": 2 * d + adapter.rank + (1 if adapter.norm_match else 0)}


def tensor_gradients(model: ModelNumbers, adapter: Adapter) -> int:
    """NP gradients of one layer that tensor-parallel devices hold parts of and sum once a step: of what is replicated and fed
    from sharded columns. w_down always; for rules with a key also gate's and up's ``w_a_up`` and down's ``w_b_up``.
    """
    rank, d = adapter.rank, model.hidden_size
    total = d * rank
    if adapter.key == "none":
        return total
    for target, (d_in, d_out) in adapter.targets.items():
        if adapter.slots[target] == "down":
            total += rank * d_out
        elif not adapter.tied:
            total += d_in * (rank if adapter.key == "matrix" else 1)
    return total


def exchanges(
    model: ModelNumbers, adapter: Adapter, config: RunConfig, parallel: Parallel, phase: str
) -> list[Exchange]:
    """Everything one device exchanges in one optimizer step of ``phase``; empty on one device."""
    training = config.training
    precision = Precision.of(config, torch.device("cuda"))
    tokens = training.batch_size * config.data.max_length * training.gradient_accumulation_steps
    layers = -(-model.num_layers // parallel.pipeline)
    count = -(-len(adapter.layers) // parallel.pipeline)
    found: list[Exchange] = []
    if parallel.tensor > 1:
        ring = 2 * (parallel.tensor - 1) / parallel.tensor
        numbers = tensor_per_token(model, adapter, phase)
        size = round(ring * layers * tokens * sum(numbers.values()) * precision.width)
        found.append(Exchange("tensor", size, f"{sum(numbers.values()):,} numbers per token and layer"))
        size = round(ring * count * tensor_gradients(model, adapter) * 4)
        found.append(Exchange("tensor", size, "gradients of replicated NP parameters, once a step"))
    if parallel.pipeline > 1:
        passes = 1 if phase == "local" else 3
        size = passes * tokens * model.hidden_size * precision.stream
        found.append(Exchange("pipeline", size, f"hidden states to the next stage, {passes} × [tokens, d]"))
    if parallel.data > 1:
        share = (parallel.data - 1) / parallel.data
        if parallel.shard:
            layer = precision.linears(model.linears) // parallel.tensor + model.layer_other * precision.stream
            below = adapter.layers[0] if parallel.pipeline == 1 else 0
            visits = layers if phase == "local" else 3 * layers - below
            rounds = training.gradient_accumulation_steps
            if phase == "local":
                rounds = -(-rounds // config.optimization.micro_batches_per_layer)
            found.append(
                Exchange(
                    "data",
                    round(share * rounds * visits * layer),
                    f"frozen layers gathered, {visits} visits × {rounds}",
                )
            )
        own = adapter.total / parallel.pipeline * adapter.tensor_share(parallel.tensor)
        found.append(Exchange("data", round(2 * share * own * 4), "NP gradients, float32, once a step"))
    return found


def pipeline_bubble(stages: int, micro_batches: int, steps: int, phase: str) -> float:
    """Share of the time that a stage waits.

    end_to_end: (P − 1)/(m + P − 1) of every step of m micro-batches (GPipe, Huang et al. 2019): the step ends when the last
    gradient is back. local: no gradient crosses a layer, so a stage's step waits for nobody and the pipeline fills once a run.
    """
    if phase == "local":
        return (stages - 1) / (steps * micro_batches + stages - 1)
    return (stages - 1) / (micro_batches + stages - 1)
