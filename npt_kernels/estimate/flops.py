"""The arithmetic of a step and, from a GPU's rates, the time it is predicted to take.

Products count two operations per multiply-add. *Needed* operations are those of the mathematics; recomputing activations is
work but not needed, so it lowers MFU (needed ÷ (seconds × dense peak)) instead of counting for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..configs.schema import RunConfig
from .byte_count import runs_end_to_end, streams
from .devices import COMPUTE_EFFICIENCY, TRANSFER_EFFICIENCY, Gpu
from .model_sizes import Adapter, ModelNumbers
from .parallel import Parallel
from .storage import Precision

__all__ = ["LayerWork", "StepTime", "needed_flops", "step_time"]


@dataclass(frozen=True)
class LayerWork:
    """Operations of one decoder layer per token.

    Attributes:
        model, adapter: Sizes.
        length: Tokens of a sequence; causal attention looks at half of them on average.
        micro: Tokens of a micro-batch, for all of which ``w_downᵀ W_o`` is made once; ``None``: so many that it does not count.
    """

    model: ModelNumbers
    adapter: Adapter
    length: int
    micro: int | None = None

    @property
    def folds(self) -> bool:
        """Whether the output projection is left out (``model/fold.py``)."""
        return self.adapter.no_projection and (self.micro is None or self.micro >= self.adapter.rank)

    @property
    def folded_weight(self) -> int:
        """``w_downᵀ W_o``, a token's share; the gradient of ``w_down`` behind it takes as many."""
        heads, width = self.model.attention_linears[-1]
        return 2 * heads * width * self.adapter.rank // self.micro if self.micro is not None and self.folds else 0

    @property
    def wider(self) -> int:
        """What a product of the bottleneck with the heads' output takes more than one with the attention's."""
        return (
            2 * self.adapter.rank * (self.model.attention_linears[-1][0] - self.model.hidden_size) if self.folds else 0
        )

    @property
    def projection(self) -> int:
        """The output projection, where it is left out."""
        heads, width = self.model.attention_linears[-1]
        return 2 * heads * width if self.folds else 0

    @property
    def attention_linears(self) -> int:
        return 2 * sum(a * b for a, b in self.model.attention_linears)

    @property
    def attention_scores(self) -> int:
        """QKᵀ and the weighted sum of V, causal: half of 4 · length · width."""
        return 2 * self.length * self.model.heads_width

    @property
    def attention(self) -> int:
        return self.attention_linears + self.attention_scores

    @property
    def mlp(self) -> int:
        return 2 * self.model.mlp

    @property
    def delta(self) -> int:
        """z, the key products, c @ w_b_up."""
        rank = self.adapter.rank
        values = sum(out for _, out in self.adapter.targets.values())
        return 2 * rank * (self.model.hidden_size + values) + self._keys(self.adapter.targets)

    @property
    def delta_gradients(self) -> int:
        """Of w_b_up and of c for every target, of w_down, of the keys and their products."""
        rank = self.adapter.rank
        values = sum(out for _, out in self.adapter.targets.values())
        return 2 * rank * (self.model.hidden_size + 2 * values) + self._keys(self.adapter.targets)

    @property
    def local(self) -> int:
        """Attention once, whole; original and converted MLP; ``dout @ W_down`` alone of the input gradients."""
        return self.original + self.mlp + self.delta + self._first

    @property
    def original(self) -> int:
        """A forward pass of the layer as it was."""
        return self.attention + self.mlp

    @property
    def converted(self) -> int:
        """A forward pass of the converted layer."""
        return self.original + self.delta - self.projection + self.wider + self.folded_weight

    @property
    def backward(self) -> int:
        """Input gradients of all products (flash attention: five products for the forward's two) and NP gradients."""
        into = 2 * self.adapter.rank * self.model.hidden_size + self._keys(self.adapter.targets)
        products = self.attention_linears + self.attention_scores * 5 // 2 + self.mlp + self.delta_gradients + into
        return products - self.projection + 2 * self.wider + self.folded_weight

    @property
    def backward_first(self) -> int:
        """Where nothing below trains, in a layer that runs as the model runs it."""
        return self._first + self.wider + self.folded_weight

    @property
    def _first(self) -> int:
        """NP gradients, and ``dout @ W_down`` if gate or up are targets. The norm's takes no products, unless it has a bias
        (``row_scale`` in ``model/mlp.py``)."""
        into = {"gate", "up"} & set(self.adapter.slots.values())
        by_change = self.adapter.fold and self.adapter.norm_match
        down = [target for target, slot in self.adapter.slots.items() if slot == "down"]
        products = self.down + self._keys(down) if into or (by_change and self.model.layer_norm) else 0
        return self.delta_gradients + products + (self.mlp - self.down if by_change and self.model.layer_norm else 0)

    @property
    def down(self) -> int:
        """The last product of the MLP."""
        d_in, d_out = self.model.mlp_linears[-1]
        return 2 * d_in * d_out

    def _keys(self, targets: Iterable[str]) -> int:
        """Products of as many numbers with the keys of these targets as there are key products."""
        widths = sum(self.adapter.targets[target][0] for target in targets)
        return 2 * {"matrix": self.adapter.rank * widths, "vector": widths, "none": 0}[self.adapter.key]

    @property
    def backward_original(self) -> int:
        return self.attention_linears + self.attention_scores * 5 // 2 + self.mlp


def needed_flops(
    model: ModelNumbers, adapter: Adapter, length: int, phase: str, *, recompute: bool = False, micro: int | None = None
) -> int:
    """Operations per trained token of ``phase``, with what checkpointing recomputes if asked for.

    ``micro``: tokens of a micro-batch; ``None``: so many that products of weights with each other do not count.

    local: layers up to the last converted one; no head. end_to_end: both models' forward and head, backward down to the first
    converted layer. task: the same without the original.
    """
    work = LayerWork(model, adapter, length, micro)
    count, first, last = len(adapter.layers), adapter.layers[0], adapter.layers[-1]
    if phase == "local":
        return count * work.local + (last + 1 - count) * work.original
    others = model.num_layers - count
    above = model.num_layers - first - count
    head = 2 * model.hidden_size * model.vocab_size
    total = count * work.converted + others * work.original
    if phase != "task":
        total += model.num_layers * work.original + head
    total += work.backward_first + (count - 1) * work.backward + above * work.backward_original + 2 * head
    if recompute:
        # Recomputing an unconverted layer stops at the last thing it kept, in front of its last product.
        total += count * work.converted + above * (work.original - work.down)
    return total


@dataclass(frozen=True)
class StepTime:
    """A predicted optimizer step on one of ``parallel.devices`` GPUs.

    Attributes:
        phase: ``local`` or ``end_to_end``.
        seconds: All of it.
        compute: Products and memory traffic of the layers.
        transfer: Frozen layers over PCIe (streamed), or gathered from other GPUs (FSDP2).
        hidden: Share of the transfer that hides behind compute.
        optimizer: Optimizer step and the gradients' all-reduce.
        tokens: Of the global step.
        flops: Needed operations of the global step.
        mfu: Predicted: needed operations ÷ (seconds × dense peak × devices).
    """

    phase: str
    seconds: float
    compute: float
    transfer: float
    hidden: float
    optimizer: float
    tokens: int
    flops: int
    mfu: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def step_time(
    model: ModelNumbers, adapter: Adapter, config: RunConfig, gpu: Gpu, parallel: Parallel | None = None
) -> list[StepTime]:
    """A step of every training phase, by a roofline with the rates of ``gpu`` (how much of them: module ``devices``)."""
    mode = config.training.mode
    names = [name for name, on in (("local", mode.startswith("local")), ("end_to_end", runs_end_to_end(config))) if on]
    return [_step(name, model, adapter, config, gpu, parallel or Parallel()) for name in names]


def _step(
    phase: str, model: ModelNumbers, adapter: Adapter, config: RunConfig, gpu: Gpu, parallel: Parallel
) -> StepTime:
    training, optimization, length = config.training, config.optimization, config.data.max_length
    device = torch.device("cuda")
    precision = Precision.of(config, device)
    recompute = phase == "end_to_end" and optimization.gradient_checkpointing
    micro = training.batch_size * length
    batches = training.gradient_accumulation_steps
    work = "task" if phase == "end_to_end" and training.objective == "task" else phase
    flops_micro = needed_flops(model, adapter, length, work, recompute=recompute, micro=micro) * micro
    peak = gpu.tflops * 1e12 * COMPUTE_EFFICIENCY * (1.0 if precision.width == 2 else 0.5)
    memory = gpu.memory_gbs * 1e9 * TRANSFER_EFFICIENCY
    # Passes over the layers of one micro-batch: local meets each once; end to end twice forward and once or twice backward; a
    # task once forward.
    passes = 1 if phase == "local" else 3 + recompute - (work == "task")
    stored = precision.linears(model.linears)
    read = (
        model.layer_linear * precision.width
        if phase != "local"
        else (model.layer_linear + 2 * model.mlp) * precision.width
    )
    if precision.format is not None:
        read += stored + model.layer_linear * precision.width  # read what is stored, write the dequantised copy
    elements = 24 * model.hidden_size + 12 * model.intermediate_size  # reads and writes of a pass, about
    traffic = model.num_layers * (passes * read + passes * micro * elements * precision.width)
    compute = batches * max(flops_micro / peak, traffic / memory)
    transfer = _transfer(work, model, adapter, config, gpu, parallel, precision, batches)
    exposed = max(0.0, transfer - compute)
    parameters = adapter.total
    optimizer = 7 * 4 * parameters / memory  # reads parameter, gradient, two moments; writes parameter and moments
    if parallel.data > 1:
        ring = 2 * (parallel.data - 1) / parallel.data
        optimizer += ring * 4 * parameters / gpu.link(parallel.data)
    seconds = compute + exposed + optimizer
    tokens = micro * batches * parallel.data
    needed = needed_flops(model, adapter, length, work, micro=micro) * tokens
    mfu = needed / (seconds * gpu.tflops * 1e12 * parallel.devices)
    hidden = 1.0 - exposed / transfer if transfer else 1.0
    return StepTime(phase, seconds, compute, transfer, hidden, optimizer, tokens, needed, mfu)


def _transfer(
    phase: str,
    model: ModelNumbers,
    adapter: Adapter,
    config: RunConfig,
    gpu: Gpu,
    parallel: Parallel,
    precision: Precision,
    batches: int,
) -> float:
    """Seconds that frozen layers travel in one optimizer step."""
    layer = precision.linears(model.linears) + model.layer_other * precision.stream
    last = adapter.layers[-1] + 1 if phase == "local" else model.num_layers
    # Original forward (not of a task), converted forward, backward; layers below the first converted one have no backward.
    visits = last if phase == "local" else (2 if phase == "task" else 3) * model.num_layers - adapter.layers[0]
    rounds = -(-batches // config.optimization.micro_batches_per_layer) if phase == "local" else batches
    if streams(config, torch.device("cuda")):
        return rounds * visits * layer / (gpu.pcie_gbs * 1e9 * TRANSFER_EFFICIENCY)
    if parallel.shard and parallel.data > 1:
        part = (parallel.data - 1) / parallel.data
        return rounds * visits * layer * part / gpu.link(parallel.data)
    return 0.0
