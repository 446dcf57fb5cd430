"""What one micro-batch teaches: the training modes behind one interface.

An objective runs its forward *and* its backward, because local training has one backward per layer. The loop gives it the
token ids, the micro-batch's share of the step and accelerate's ``backward``; gradients land in the NP components.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models.patching import converted_layers, npt_disabled
from ..models.running import decoder_of
from ..models.walk import OutputHead, tapped_layers, walk_layers
from .losses import delta_variance, kl_divergence, layer_loss, vector_penalty

__all__ = [
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
        self.layers = converted_layers(model)
        if not self.layers:
            raise ValueError("the model has no NPT layers; convert it with apply_npt or load_npt first")
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

    The original model runs once without gradient. As each converted layer returns, its input, attention output and output
    are at hand: the converted form is computed from the first two, compared with the third, and its backward runs on the
    spot, so the activations of one layer are alive at a time and attention is computed once. The language-model head never
    runs. The loss is the mean over layers.

    Args:
        kind: ``relative_mse`` or ``mse``.
        variances: Of :func:`delta_variances`; missing layers measure theirs on each micro-batch.
    """

    name = "local"

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
        equivalence: dict[int, Tensor] = {}
        penalties: list[Tensor] = []
        losses: list[Tensor] = []

        def visit(layer: Any, h: Tensor, a: Tensor, y: Tensor) -> None:
            index = layer.npt_plan.index
            h, a = h.detach(), a.detach()
            with torch.enable_grad():
                error = layer_loss(layer.npt_student(h, a), y, h, kind=self.kind, variance=self.variances.get(index))
                loss = self.equivalence_weight * error
                if self.regularization_weight:
                    penalty = vector_penalty(layer, h, a)
                    loss = loss + self.regularization_weight * penalty
                    penalties.append(penalty.detach())
                backward(loss * (share / len(self.layers)))
            equivalence[index] = error.detach()
            losses.append(loss.detach())

        walk_layers(self.model, ids, visit)
        return Losses(
            torch.stack(losses).mean(),
            torch.stack(list(equivalence.values())).mean(),
            equivalence,
            torch.stack(penalties).mean() if penalties else 0.0,
        )


class _EndToEnd(Objective):
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


class KLObjective(_EndToEnd):
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


class LayerObjective(_EndToEnd):
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
        if getattr(model, "is_gradient_checkpointing", False):
            model.gradient_checkpointing_disable()  # type: ignore[operator]
        return
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
