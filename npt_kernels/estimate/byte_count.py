"""The byte count of a run: every phase as a list of terms, from numbers alone.

One function, :func:`count_bytes`, is behind ``npt plan``, ``npt train --dry-run``, the advice after an out-of-memory error
and the predictions of ``npt bench train``. It counts tensors; what an allocator adds is in :func:`reserve`.

Why a count and not the real step on fake tensors (tried 2026-11-26, torch 2.13, CPU): time. Forward and backward of a
converted Llama under ``FakeTensorMode`` take 0.15 s with 2 layers and 3.1 s with 32, whatever the widths, and a plan needs
several phases of one configuration, its advice after "does not fit" 695 configurations for Llama-3.1-8B in 8 GiB; a count
takes 0.39 ms. Under the mode the conversion stops as well (it tells activations apart by their values). How near to the live
bytes a fake step would come was not measured; the count is within 10 % (``tests/estimate/test_byte_count.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..configs.schema import RunConfig
from ..model.head import CHUNK_ELEMENTS
from .layer_bytes import LayerBytes
from .model_sizes import Adapter, ModelNumbers
from .parallel import Parallel
from .storage import Precision
from .terms import MemoryTerm, Phase

__all__ = ["count_bytes", "peak", "reserve", "streams"]

#: Tokens per forward of the closed form's first pass (``collect_moments``), of its refit, and of an evaluation.
CALIBRATION_BATCH, REFIT_TOKENS, EVALUATION_BATCH = 512, 16384, 2048
#: The original's states of the held-out text are kept up to this size (``run/evaluation.py`` keeps to it).
TEACHER_BYTES = 2**29
#: Tokens of a prompt, which only a tokenizer would tell.
_PROMPT_TOKENS = 32
_WIDE, _DOUBLE = 4, 8


def streams(config: RunConfig, device: torch.device) -> bool:
    """Whether frozen layers live outside the device and visit it; ``use_cpu_offload`` does nothing on a CPU."""
    o = config.optimization
    return o.stream_layers != "off" or (o.use_cpu_offload and device.type != "cpu")


def count_bytes(
    model: ModelNumbers,
    adapter: Adapter,
    config: RunConfig,
    device: torch.device,
    parallel: Parallel | None = None,
) -> list[Phase]:
    """Every phase of the run with its terms, on the fullest device and, per process, in host memory.

    Args:
        model, adapter: Sizes.
        config: The whole run; micro-batch, precision, mode, streaming, quantisation and evaluation are read.
        device: Type of the device; on ``cpu`` all is host memory.
        parallel: Degrees; ``None``: one device.
    """
    return list(_Count(model, adapter, config, device, parallel or Parallel()).phases())


def peak(phases: list[Phase], where: str = "device") -> int:
    """The most that any phase needs."""
    return max(phase.bytes(where) for phase in phases)


def reserve(counted: int, device: torch.device) -> int:
    """What a GPU needs beside counted tensors: context and library workspaces (assumed 0.75 GiB), and 5 % for blocks that
    the caching allocator rounds up or cannot reuse (assumed; *unverified*). Nothing on a CPU."""
    return 0 if device.type == "cpu" else 3 * 2**28 + counted // 20


def runs_end_to_end(config: RunConfig) -> bool:
    return config.training.mode in {"end_to_end", "local+polish"}


def uses_closed_form(config: RunConfig) -> bool:
    return config.npt_config().uses_closed_form


@dataclass(frozen=True)
class _Count:
    model: ModelNumbers
    adapter: Adapter
    config: RunConfig
    device: torch.device
    parallel: Parallel

    # ---- shared pieces -----------------------------------------------------------------------------------------------

    @cached_property
    def trained(self) -> Precision:
        """Of conversion and training, which run under autocast."""
        precision = Precision.of(self.config, self.device)
        whole = precision.format is None and not self.streamed and not self.sharded
        keeps = precision.casts and precision.base == torch.float32 and self.device.type == "cpu" and whole
        return replace(precision, keeps_casts=keeps)

    @cached_property
    def plain(self) -> Precision:
        """Of evaluation, which does not."""
        return replace(self.trained, compute=self.trained.base, keeps_casts=False)

    def kept_casts(self, *, head: bool) -> list[MemoryTerm]:
        """Copies of the frozen base in the products' dtype, where they are kept."""
        if not self.trained.keeps_casts:
            return []
        model = self.model
        numbers = model.num_layers * sum(a * b for a, b in model.linears)
        numbers += model.vocab_size * model.hidden_size if head else 0
        what = f"frozen linears in {self.trained.compute}".replace("torch.", "")
        return [MemoryTerm("frozen base, cast", numbers * self.trained.width, what)]

    def layer_bytes(self) -> int:
        """Frozen bytes of one layer as stored."""
        return self.precision_linears + self.model.layer_other * self.trained.stream

    @cached_property
    def frozen(self) -> list[MemoryTerm]:
        """The frozen base, wherever it lives."""
        return list(self._frozen())

    def _frozen(self) -> Iterator[MemoryTerm]:
        model, precision, parallel = self.model, self.trained, self.parallel
        layer, count = self.layer_bytes(), self.model.num_layers
        outside = (model.embedding + model.head + model.other) * precision.stream + model.buffers
        what = f"{model.parameters:,} parameters, {precision.storage}"
        if self.streamed:
            # Norms and biases stay; the buffers hold the rest.
            moved = self.precision_linears
            small = count * model.layer_other * precision.stream
            yield MemoryTerm("frozen layers: two buffers", 2 * moved, f"of {moved / 2**20:,.0f} MiB, filled in turn")
            if self.config.optimization.stream_layers != "disk":
                # torch's pinned memory comes in powers of two.
                home = 1 << (moved - 1).bit_length() if self.device.type == "cuda" else moved
                what = f"{count} layers, {precision.storage}" + (", pinned" if self.device.type == "cuda" else "")
                yield MemoryTerm("frozen layers: home", count * home, what, self.host)
        elif self.sharded:
            part = -(-count * layer // parallel.data)
            small = 0
            yield MemoryTerm(
                "frozen layers: own part", part, f"1/{parallel.data} of {count} layers, {precision.storage}"
            )
            yield MemoryTerm("frozen layers: gathered", 2 * layer, "the layer at work and the next one")
        else:
            small = 0
            yield MemoryTerm("frozen layers", count * layer, f"{count} layers of {what}")
        name = "embedding, head" + (", norms" if small else "")
        yield MemoryTerm(name, outside + small, f"{precision.base}".removeprefix("torch."))
        if precision.format is not None:
            # The fused kernels take plain weights: one buffer for each of the MLP's; attention's use the first, one by one.
            first = max(a * b for a, b in model.linears)
            scratch = (first + model.mlp - model.mlp_linears[0][0] * model.mlp_linears[0][1]) * precision.width
            if precision.casts:
                scratch += first * precision.stream
            yield MemoryTerm("dequantised weights", scratch, "scratch buffers that all layers share")

    @cached_property
    def streamed(self) -> bool:
        return streams(self.config, self.device)

    @cached_property
    def sharded(self) -> bool:
        """FSDP2 with somebody to share with."""
        return self.parallel.shard and self.parallel.data > 1

    @property
    def host(self) -> str:
        """Where host memory is counted: on a CPU it is the device's."""
        return "host" if self.device.type != "cpu" else "device"

    @cached_property
    def precision_linears(self) -> int:
        """Stored bytes of the linears of one layer."""
        return self.trained.linears(self.model.linears)

    def adapters(self, *, optimizer: bool) -> Iterator[MemoryTerm]:
        count = self.adapter.total
        yield MemoryTerm("NP parameters", count * _WIDE, f"{count:,} × float32")
        if optimizer:
            yield MemoryTerm("Adam moments", count * 2 * _WIDE, "NP parameters × 2 × float32")

    def layer(self, precision: Precision, sequences: int, length: int) -> LayerBytes:
        return LayerBytes(self.model, self.adapter, precision, sequences, length)

    def worst(self, name: str, terms: list[MemoryTerm], moments: dict[str, list[MemoryTerm]]) -> Phase:
        """The phase with the common ``terms`` at the largest of its ``moments``."""
        sizes = {moment: sum(t.bytes for t in extra if t.where == "device") for moment, extra in moments.items()}
        moment = max(sizes, key=lambda key: sizes[key])
        common = sum(term.bytes for term in terms if term.where == "device")
        merged = [term for term in (*terms, *moments[moment]) if term.bytes]
        return Phase(name, moment, merged, {key: common + size for key, size in sizes.items()})

    # ---- phases ------------------------------------------------------------------------------------------------------

    def phases(self) -> Iterator[Phase]:
        yield self.load()
        yield self.evaluation()
        if self.config.evaluation.prompts:
            yield self.generation()
        if uses_closed_form(self.config):
            yield self.conversion()
        if self.config.training.mode in {"local", "local+polish"}:
            yield self.local()
        if runs_end_to_end(self.config):
            yield self.end_to_end()

    def load(self) -> Phase:
        terms = list(self.frozen)
        if self.device.type != "cpu":
            terms.append(self.loading())
        return self.worst("load", terms, {"loaded": []})

    def loading(self) -> MemoryTerm:
        """The model on its way through host memory."""
        model, size = self.model, self.trained.stream
        outside = (model.embedding + model.head + model.other) * size
        if not self.streamed:
            return MemoryTerm(
                "frozen weights while loading", model.parameters * size, "whole, before they move to the GPU", "host"
            )
        layer = self.layer_bytes() if self.config.optimization.stream_layers != "disk" else 0
        return MemoryTerm("outside of the layers while loading", outside + layer, "and the layer that is moved", "host")

    def evaluation(self) -> Phase:
        config, length = self.config, self.config.data.max_length
        rows = min(max(1, EVALUATION_BATCH // length), max(1, config.evaluation.tokens // length))
        layer = self.layer(self.plain, rows, length)
        during = bool(config.training.eval_steps) and config.training.mode != "none"
        terms = [*self.frozen, *self.adapters(optimizer=during)]
        kept = config.evaluation.tokens // length * length * self.model.hidden_size * self.plain.stream
        copies = 1 if kept <= TEACHER_BYTES else 0
        teacher = MemoryTerm("original's states", kept * copies, f"{config.evaluation.tokens:,} held-out tokens, kept")
        logits = min(layer.tokens, max(1, CHUNK_ELEMENTS // self.model.vocab_size)) * self.model.vocab_size
        return self.worst(
            "evaluation",
            terms,
            {
                "original's states gathered": [
                    MemoryTerm("original's states", 2 * kept, "while they are put together")
                ],
                "a layer": [
                    teacher,
                    MemoryTerm("hidden states", 2 * layer.stream, f"{layer.tokens:,} tokens"),
                    MemoryTerm("one layer", layer.forward_inference, "without gradient"),
                ],
                "logits": [
                    teacher,
                    MemoryTerm("hidden states", 2 * layer.stream, f"{layer.tokens:,} tokens, both models"),
                    _logits(logits, self.model.vocab_size),
                ],
            },
        )

    def generation(self) -> Phase:
        new = _PROMPT_TOKENS + self.config.evaluation.max_new_tokens
        layer = self.layer(self.plain, 1, _PROMPT_TOKENS)
        # A cache grows by concatenation: the old one and the new one exist side by side in one layer.
        per_layer = 2 * new * self.model.kv_width * self.plain.width
        during = bool(self.config.training.prediction_logging_steps) and self.config.training.mode != "none"
        return self.worst(
            "generation",
            [*self.frozen, *self.adapters(optimizer=during)],
            {
                "a token": [
                    MemoryTerm(
                        "key-value cache", (self.model.num_layers + 1) * per_layer, f"about {new} tokens, one prompt"
                    ),
                    MemoryTerm("one layer", layer.forward_inference + 2 * layer.stream, f"{_PROMPT_TOKENS} tokens"),
                    MemoryTerm("logits", 2 * self.model.vocab_size * _WIDE, "of one token"),
                ]
            },
        )

    def conversion(self) -> Phase:
        config, model, data = self.config, self.model, self.config.data
        length = data.max_length
        rows = min(max(1, CALIBRATION_BATCH // length), max(1, data.calibration_tokens // length))
        layer = self.layer(self.trained, rows, length)
        square = model.hidden_size**2 * _DOUBLE
        count = len(self.adapter.layers)
        fisher = config.model.basis == "fisher"
        moments = MemoryTerm(
            "second moments", (2 if fisher else 1) * count * square, f"{count} layers × d × d × float64"
        )
        above = self._above()
        kept = layer.kept_first_unconverted + above * layer.kept_unconverted + layer.norm_copy
        elements = layer.tokens * model.vocab_size
        tokens = min(REFIT_TOKENS, data.calibration_tokens) // length * length
        refit = self.layer(self.trained, max(1, tokens // length), length)
        batch = self.layer(self.trained, min(4, max(1, tokens // length)), length)
        # Metric and covariance of every layer, until the components are filled its basis too: in host memory.
        metric = 2 if fisher else 1

        def fitted(copies: int) -> list[MemoryTerm]:
            why = f"{count} layers × {copies} × d × d × float32"
            return [
                MemoryTerm("metrics and bases", count * square * copies // 2, why, self.host, once=self.host == "host")
            ]

        hook = layer.wide + model.hidden_size**2 * (_WIDE + _DOUBLE)
        scratch = MemoryTerm(
            "one layer", 2 * layer.stream + max(layer.forward_original, hook), f"{layer.tokens:,} tokens"
        )
        passes = {"forward": [moments, scratch]}
        if fisher:
            what = f"{above + 1} layers, {layer.tokens:,} tokens"
            size = f"{layer.tokens:,} × {model.vocab_size:,}"
            # Probabilities and their sums, in float32.
            passes = {
                "loss": [
                    moments,
                    MemoryTerm("activations", kept + layer.stream, what),
                    MemoryTerm("logits", elements * (self.trained.width + 2 * _WIDE), size),
                ],
                "backward": [
                    moments,
                    MemoryTerm("activations", kept + max(layer.backward_unconverted, hook), what),
                    MemoryTerm("logits", 2 * elements * self.trained.width, f"{size}, and their gradient"),
                ],
            }
        left = 0 if self.device.type == "cpu" else moments.bytes
        passes["bases"] = [
            *fitted(metric + 3),
            MemoryTerm("second moments", left, moments.why),
            MemoryTerm("decomposition", 9 * square if left else 3 * square, "d × d × float64"),
        ]
        if config.model.refit:
            after = [*fitted(metric + 1), *self.adapters(optimizer=False)]
            tokens_text = f"{refit.tokens:,} tokens"
            one = max(batch.forward_inference, batch.forward_original)
            streams_ = MemoryTerm("streams", 4 * refit.stream, f"{tokens_text}, original and converted, h and a")
            passes["refit, regression"] = [
                *after, streams_, MemoryTerm("regression", 4 * refit.wide + 9 * square, f"{tokens_text} in float32")
            ]  # fmt: skip
            passes["refit, a layer"] = [*after, streams_, MemoryTerm("one layer", one, f"{batch.tokens:,} tokens")]
        if not self.sharded or self.device.type == "cpu":
            return self.worst("conversion", [*self.frozen, *self.kept_casts(head=fisher)], passes)
        # Before it is sharded the model is converted whole, on the host, by one process; the others wait with theirs.
        phase = self.worst("conversion", [], passes)
        moved = [replace(term, where="host", once=True) for term in phase.terms]
        return Phase("conversion", phase.moment, [self.loading(), *moved], dict.fromkeys(phase.moments, 0))

    def _above(self) -> int:
        """Decoder layers here above the first converted one."""
        first = self.adapter.layers[0]
        return max(0, self.model.num_layers - first - 1)

    # ---- training ----------------------------------------------------------------------------------------------------

    def optimizer_moment(self) -> list[MemoryTerm]:
        """Activations are gone; foreach on a GPU makes one more number per parameter, on a CPU one tensor at a time."""
        temporary = self.adapter.total if self.device.type != "cpu" else 2 * self.largest_tensor
        return [
            MemoryTerm("gradients", self.adapter.total * _WIDE, "NP parameters × float32"),
            *self.reduced(),
            MemoryTerm("optimizer step", temporary * _WIDE, "square roots of the second moments"),
        ]

    @property
    def largest_tensor(self) -> int:
        widths = (self.model.hidden_size, *(max(size) for size in self.adapter.targets.values()))
        return self.adapter.rank * max(widths)

    def reduced(self) -> list[MemoryTerm]:
        if self.parallel.data == 1:
            return []
        return [MemoryTerm("gradients, all-reduced", self.adapter.total * _WIDE, "one flat buffer for all processes")]

    def local(self) -> Phase:
        training, length = self.config.training, self.config.data.max_length
        layer = self.layer(self.trained, training.batch_size, length)
        visits = min(self.config.optimization.micro_batches_per_layer, training.gradient_accumulation_steps)
        what = f"h of {visits} micro-batches of {layer.tokens:,} tokens, y of one"
        hidden = [MemoryTerm("hidden states", (1 + visits) * layer.stream, what)]
        # The last layer's own gradients are among its activations.
        before = max(0, self.adapter.total - self.adapter.largest)
        if training.gradient_accumulation_steps > 1:
            before = self.adapter.total
        gradients = MemoryTerm("gradients", before * _WIDE, "NP parameters × float32")
        one = "one layer at a time, original and converted on its input"
        penalty = layer.penalty if training.regularization_weight else 0
        cast = layer.wide if self.trained.casts else 0  # the loss's gradient before it is cast
        moments = {
            "original layer": layer.forward_original + layer.narrow - layer.stream,
            "converted layer, forward": layer.forward_converted + layer.narrow,
            "converted layer, backward": layer.kept(True) + layer.backward_mlp(False) + cast + penalty,
        }
        extra = {name: [*hidden, gradients, MemoryTerm("activations", size, one)] for name, size in moments.items()}
        terms = [*self.frozen, *self.kept_casts(head=False), *self.adapters(optimizer=True)]
        return self.worst("local", terms, {**extra, "optimizer step": self.optimizer_moment()})

    def end_to_end(self) -> Phase:
        training, length = self.config.training, self.config.data.max_length
        layer = self.layer(self.trained, training.batch_size, length)
        tokens = f"{layer.tokens:,} tokens"
        task = training.objective == "task"
        kl = training.objective == "kl" or training.mode == "local+polish"
        first, kept, saved = self._kept(layer)
        accumulated = training.gradient_accumulation_steps > 1
        whole = self.adapter.total * _WIDE
        own = self.adapter.largest * _WIDE

        def term(name: str, size: int, why: str = tokens) -> MemoryTerm:
            return MemoryTerm(name, size, why)

        def gradients(size: int) -> MemoryTerm:
            return MemoryTerm("gradients", size, "NP parameters × float32")

        converted = len(self.adapter.layers)
        checkpointing = self.config.optimization.gradient_checkpointing
        if training.regularization_weight:
            # Its graph hangs on the loss, not on the layer: checkpointing does not drop it, and it holds the attention output.
            saved += converted * (layer.penalty + (layer.narrow if checkpointing else 0))
        chunk = min(layer.tokens, max(1, CHUNK_ELEMENTS // self.model.vocab_size)) * self.model.vocab_size
        head = self.model.vocab_size * self.model.hidden_size
        copies = (2 if kl else 1) * layer.narrow if self.trained.casts else 0
        copies += head * self.trained.width if self.trained.casts and not self.trained.keeps_casts else 0
        recomputed = first if converted == 1 else kept - layer.stream
        again = recomputed if checkpointing else 0
        # The MLP's part of what the layer kept is free by the time its norm runs.
        rest = max(layer.backward_norm, layer.backward_attention) + 2 * layer.narrow + layer.adapter.largest * _WIDE
        transient = max(layer.backward_mlp() + layer.stream, rest - layer.mlp_kept())
        # In the frame of the loss: states of both models, of the one, or every layer's output and target.
        states = (2 if kl else 1 if task else converted + 1) * layer.stream
        if task:
            loss = [
                term("activations", saved + layer.stream + layer.norm_copy, self._why(layer, checkpointing)),
                term("states", 2 * layer.stream + copies, f"{tokens}, and their gradient"),
                _logits(chunk, self.model.vocab_size, models=1),
            ]
        elif kl:
            loss = [
                term("activations", saved + layer.stream + layer.norm_copy, self._why(layer, checkpointing)),
                term("states of both models", 3 * layer.stream + copies, f"{tokens}, and their gradient"),
                _logits(chunk, self.model.vocab_size),
            ]
        else:
            # The loss works on float32: copies of both, where they are not that already.
            wide = 2 * layer.wide if layer.stream != layer.wide else 0
            loss = [
                term("activations", saved + layer.stream, self._why(layer, checkpointing)),
                term("layer outputs and targets", converted * (layer.stream + wide) + layer.wide, tokens),
            ]
            states += (converted - 1) * layer.stream  # their gradients all exist before the first layer's turn
        moments = {
            "loss": [*loss, gradients(whole if accumulated else 0)],
            "last layer, backward": [
                term("activations", saved + states + layer.stream + again + transient, self._why(layer, checkpointing)),
                gradients(whole if accumulated else 0),
            ],
            "first layers, backward": [
                term(
                    "activations",
                    (first if not checkpointing else layer.stream) + recomputed + states + layer.stream + transient,
                ),
                gradients(whole if accumulated else max(0, whole - 2 * own)),
            ],
            "last layer, forward": [
                term("activations", saved + states + layer.stream + layer.forward_converted - layer.mlp_kept()),
                gradients(whole if accumulated else 0),
            ],
            "optimizer step": self.optimizer_moment(),
        }
        terms = [*self.frozen, *self.kept_casts(head=kl or task), *self.adapters(optimizer=True)]
        return self.worst("end_to_end", terms, moments)

    def _why(self, layer: LayerBytes, checkpointing: bool) -> str:
        what = "layer inputs, and one layer" if checkpointing else "all layers above the first converted one"
        return f"{what}, {layer.tokens:,} tokens"

    def _kept(self, layer: LayerBytes) -> tuple[int, int, int]:
        """``(by the first converted layer, by another, by all together)`` for the backward pass."""
        above = self._above()
        converted = min(above, len(self.adapter.layers) - 1)
        first, kept = layer.kept(True), layer.kept(False)
        if self.config.optimization.gradient_checkpointing:
            return first, kept, (above + 1) * layer.stream
        return first, kept, first + converted * kept + (above - converted) * layer.kept_unconverted


def _logits(elements: int, vocabulary: int, models: int = 2) -> MemoryTerm:
    """Logits in their dtype and as log-softmax: 8 bytes an entry and model at the widest, in any dtype."""
    return MemoryTerm("logits", 8 * models * elements, f"chunks of {elements // vocabulary:,} tokens × {vocabulary:,}")
