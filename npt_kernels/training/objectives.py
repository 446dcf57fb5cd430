"""What one micro-batch teaches: the training modes behind one interface.

An objective runs its forward *and* its backward, because local training has one backward per layer. The loop gives it the
token ids, the micro-batch's share of the step and accelerate's ``backward``; gradients land in the NP components. A step of
several micro-batches goes through :meth:`Objective.accumulate_group`, so that an objective may choose the order of the work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..model.forward import decoder_of
from ..model.head import OutputHead
from ..model.install import converted_layers, npt_disabled, require_converted
from ..model.visits import tapped_layers, walk_group, walk_layers
from .losses import delta_variance, kl_divergence, layer_loss, vector_penalty

__all__ = [
    "Backward",
    "EndToEnd",
    "KLObjective",
    "LayerObjective",
    "LocalObjective",
    "Losses",
    "Objective",
    "delta_variances",
    "enable_checkpointing",
]

Backward = Callable[[Tensor], None]


@dataclass
class Losses:
    """Of one micro-batch, detached, still on the device.

    Attributes:
        loss: What was minimised.
        equivalence: The equivalence part: mean over layers, or KL in nats per token.
        layers: Layer index → its equivalence loss; empty under KL.
        penalty: ``|v_a|² + |v_b|²``, mean over layers; 0 when not asked for.
    """

    loss: Tensor
    equivalence: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)
    penalty: Tensor | float = 0.0


class Objective(ABC):
    """Base of the training modes.

    Args:
        model: A converted model.
        equivalence_weight, regularization_weight: ``loss = equivalence_weight·equivalence + regularization_weight·penalty``.
    """

    name: str

    def __init__(
        self, model: nn.Module, *, equivalence_weight: float = 1.0, regularization_weight: float = 0.0
    ) -> None:
        self.model = model
        self.layers = require_converted(model)
        self.equivalence_weight, self.regularization_weight = equivalence_weight, regularization_weight

    @abstractmethod
    def accumulate(self, ids: Tensor, share: float, backward: Backward) -> Losses:
        """Add ``share`` × the gradient of the loss on ``ids [n, seq]`` to the NP components."""

    def accumulate_group(self, batches: Sequence[Tensor], shares: Sequence[float], backward: Backward) -> list[Losses]:
        """:meth:`accumulate` for the micro-batches of one optimizer step, in the order that costs this objective least.

        Args:
            batches: Token ids ``[n, seq]`` each; may be empty (a rank without rows).
            shares: Share of each in the step.
            backward: Called with every scaled loss.

        Returns:
            The losses of each micro-batch, in order.
        """
        return [self.accumulate(ids, share, backward) for ids, share in zip(batches, shares, strict=True)]


def delta_variances(model: nn.Module, ids: Tensor) -> dict[int, Tensor]:
    """Layer index → Var(δ) of the original layer on ``ids [n, seq]`` (``losses.delta_variance``): the unit of its loss."""
    variances: dict[int, Tensor] = {}

    def visit(layer: Any, h: Tensor, a: Tensor, y: Tensor) -> None:
        variances[layer.npt_plan.index] = delta_variance(y, h)

    walk_layers(model, ids, visit)
    return variances


class LocalObjective(Objective):
    """Every converted layer on the *original's* input; no gradient crosses a layer.

    The original's hidden state walks down the layers without gradient. As each converted layer returns, its input, attention
    output and output are at hand: the converted form is computed from the first two, compared with the third, and its backward
    runs on the spot. So attention is computed once and the activations of one layer for one micro-batch are alive at a time. The
    language-model head never runs. The loss is the mean over layers.

    A layer is visited once for ``micro_batches_per_layer`` micro-batches. That does not change a bit of the gradients (each
    component meets the micro-batches in the same order); it costs their hidden states, ``n × seq × d`` each.

    Original and converted MLP are two calls, not one on stacked rows ``[2T, d]``. Stacking pays where a weight is read for few
    rows: measured in one thread of an AMD EPYC, fp32, SmolLM2-135M's MLP (576 → 1536 → 576), forward stacked ÷ forward twice,
    is .62 at T = 2, .82 at 16, .91 at 64, .97 at 128 and 1.10 at 256 tokens; no training has micro-batches of 64 tokens, and
    the rows of the original would have to be cut out of the backward again. (2026-11-22, commit 1bde921.)

    Args:
        kind: ``relative_mse`` or ``mse``.
        variances: Of :func:`delta_variances`; missing layers measure theirs on each micro-batch.
        micro_batches_per_layer: Micro-batches of a step per visit of a layer.

    Raises:
        ValueError: ``micro_batches_per_layer`` below 1.
    """

    name = "local"

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: str = "relative_mse",
        variances: Mapping[int, Tensor] | None = None,
        micro_batches_per_layer: int = 1,
        **weights: float,
    ) -> None:
        super().__init__(model, **weights)
        if micro_batches_per_layer < 1:
            raise ValueError(f"micro_batches_per_layer={micro_batches_per_layer} must be at least 1")
        self.kind, self.variances = kind, variances or {}
        self.micro_batches_per_layer = micro_batches_per_layer

    def accumulate(self, ids: Tensor, share: float, backward: Backward) -> Losses:
        return self._visit_layers([ids], [share], backward)[0]

    def accumulate_group(self, batches: Sequence[Tensor], shares: Sequence[float], backward: Backward) -> list[Losses]:
        if len(batches) != len(shares):
            raise ValueError(f"{len(batches)} micro-batches, but {len(shares)} shares")
        losses: list[Losses] = []
        for start in range(0, len(batches), self.micro_batches_per_layer):
            rows = slice(start, start + self.micro_batches_per_layer)
            losses += self._visit_layers(batches[rows], shares[rows], backward)
        return losses

    def _visit_layers(self, batches: Sequence[Tensor], shares: Sequence[float], backward: Backward) -> list[Losses]:
        records = [_LocalRecord() for _ in batches]

        def visit(position: int, layer: Any, h: Tensor, a: Tensor, y: Tensor) -> None:
            index, record = layer.npt_plan.index, records[position]
            h, a = h.detach(), a.detach()
            with torch.enable_grad():
                error = layer_loss(layer.npt_student(h, a), y, h, kind=self.kind, variance=self.variances.get(index))
                loss = self.equivalence_weight * error
                if self.regularization_weight:
                    penalty = vector_penalty(layer, h, a)
                    loss = loss + self.regularization_weight * penalty
                    record.penalties.append(penalty.detach())
                backward(loss * (shares[position] / len(self.layers)))
            record.equivalence[index] = error.detach()
            record.losses.append(loss.detach())

        walk_group(self.model, batches, visit)
        return [record.finish() for record in records]


@dataclass
class _LocalRecord:
    """One micro-batch on its way down the layers."""

    equivalence: dict[int, Tensor] = field(default_factory=dict)
    penalties: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def finish(self) -> Losses:
        return Losses(
            torch.stack(self.losses).mean(),
            torch.stack(list(self.equivalence.values())).mean(),
            self.equivalence,
            torch.stack(self.penalties).mean() if self.penalties else 0.0,
        )


class EndToEnd(Objective):
    """The converted model on its own stream, gradient through all converted layers."""

    def _student(
        self, run: Callable[[], Tensor | None], keep_outputs: bool
    ) -> tuple[Any, dict[int, Tensor], list[Tensor]]:
        """Run the converted model; its result, layer outputs and per-layer penalties, as far as they are asked for."""
        outputs: dict[int, Tensor] = {}
        penalties: list[Tensor] = []
        if not keep_outputs and not self.regularization_weight:
            return run(), outputs, penalties

        def visit(layer: Any, h: Tensor, a: Tensor, y: Tensor) -> None:
            if keep_outputs:
                outputs[layer.npt_plan.index] = y
            if self.regularization_weight:
                penalties.append(vector_penalty(layer, h, a))

        with tapped_layers(self.model, visit):
            return run(), outputs, penalties

    def _finish(
        self, equivalence: Tensor, penalties: list[Tensor], share: float, backward: Backward, layers: dict[int, Tensor]
    ) -> Losses:
        loss = self.equivalence_weight * equivalence
        penalty = torch.stack(penalties).mean() if penalties else None
        if penalty is not None:
            loss = loss + self.regularization_weight * penalty
        backward(loss * share)
        return Losses(loss.detach(), equivalence.detach(), layers, 0.0 if penalty is None else penalty.detach())


class KLObjective(EndToEnd):
    """KL(original‖converted) of the next-token distributions, in nats, mean over all tokens.

    The original runs first without gradient; only its last hidden states are kept, and logits of both exist for a chunk of
    tokens at a time.
    """

    name = "kl"

    def __init__(self, model: nn.Module, **weights: float) -> None:
        super().__init__(model, **weights)
        self.head = OutputHead(model)

    def accumulate(self, ids: Tensor, share: float, backward: Backward) -> Losses:
        with torch.no_grad(), npt_disabled(self.model):
            teacher = self.head.states(ids)
        student, _, penalties = self._student(lambda: self.head.states(ids), keep_outputs=False)
        kl = kl_divergence(student, teacher, self.head.weight, self.head.bias)
        return self._finish(kl, penalties, share, backward, {})


class LayerObjective(EndToEnd):
    """Output of every converted layer on the converted stream against the original's hidden state there; mean over layers.

    Args:
        kind, variances: As in :class:`LocalObjective`.
    """

    name = "layer"

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: str = "relative_mse",
        variances: Mapping[int, Tensor] | None = None,
        **weights: float,
    ) -> None:
        super().__init__(model, **weights)
        self.kind, self.variances = kind, variances or {}

    def accumulate(self, ids: Tensor, share: float, backward: Backward) -> Losses:
        teacher: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(layer: Any, h: Tensor, a: Tensor, y: Tensor) -> None:
            variance = self.variances.get(layer.npt_plan.index)
            teacher[layer.npt_plan.index] = y, delta_variance(y, h) if variance is None else variance

        walk_layers(self.model, ids, keep)
        decoder = decoder_of(self.model)
        _, outputs, penalties = self._student(lambda: decoder(input_ids=ids, use_cache=False), keep_outputs=True)
        errors = {
            index: layer_loss(y, teacher[index][0], y, kind=self.kind, variance=teacher[index][1])
            for index, y in outputs.items()
        }
        equivalence = torch.stack(list(errors.values())).mean()
        return self._finish(
            equivalence, penalties, share, backward, {index: error.detach() for index, error in errors.items()}
        )


def enable_checkpointing(model: nn.Module, enabled: bool = True) -> None:
    """Recompute the activations of decoder layers in the backward pass. Raises ``ValueError`` if the model cannot.

    transformers does so only for layers in training mode; the mode is set on those modules alone, so no dropout wakes up.
    """
    if not enabled:
        # transformers' own property for this has another name in every major version, and warns under the old one.
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            model.gradient_checkpointing_disable()  # type: ignore[operator]
        return
    for layer in converted_layers(model).values():
        rate = getattr(layer, "dropout", 0)
        if isinstance(rate, float) and rate > 0:
            raise ValueError(
                f"gradient_checkpointing=True needs layers in training mode, in which a {type(layer).__name__} drops out "
                f"(dropout={rate}), for student and teacher each in its own way; set dropout=0 in the model's configuration"
            )
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"gradient_checkpointing=True, but {type(model).__name__} does not support it; set it to false"
        ) from error
    # transformers (5) also makes the embeddings' output need a gradient, and leaves that so when checkpointing is turned off:
    # the backward would run through every layer below the first converted one, for a gradient that nobody asked for.
    getattr(model, "disable_input_require_grads", lambda: None)()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
