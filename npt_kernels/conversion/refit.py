"""Sequential refit: each layer fitted on the *converted* model's own stream, so that it also mends what earlier layers lost.

Below layer l the converted stream ``h_S`` has drifted from the original's ``h_T``. The layer must make up for it: its MLP
should see, and its output contain, ``h_T + a_T``, so what it has to predict from its own attention output ``a_S`` is not ``a_S``
but ``a_S + (h_T + a_T − h_S − a_S)``. A regression of the difference on ``a_S`` gives a matrix B, and the basis then encodes
``(I + B) a`` instead of ``a``. At r = d nothing has drifted, B is zero and the form stays exact.

B has d² numbers and few tokens to learn them from, so it is shrunk, direction by direction, by what held-out tokens confirm
of it (:func:`drift_map`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..component import NPComponent
from ..model.forward import first_output
from ..model.layer import student_output, teacher_output
from ..model.select import LayerChoice
from ..model.visits import record_calls
from .attention_moments import second_moment
from .bases import Metric, make_basis, symmetric_roots
from .closed_form import fill_closed_form

__all__ = ["drift_map", "refit_sequentially"]

#: Ridge, as a share of the mean diagonal; .02 and .2 are alike on SmolLM2.
_RIDGE = 0.02
#: Parts of the tokens; each is held out once from the regression that it judges.
_FOLDS = 4


def drift_map(grams: Tensor, crosses: Tensor, metric: Metric) -> Tensor:
    """``B [d, d]``, the shrunk regression of the drift on the attention output, ``drift ≈ B a``.

    In coordinates where ``a`` is white and an error counts by the metric, the regression is a matrix with singular triples
    (u, s, v). A triple found without a fold is worth keeping to the share by which it predicts that fold best,
    ``⟨u, X v⟩ / (s ⟨v, G v⟩)`` of its sums X and G. The folds' shares are averaged by s², made to descend with s (neighbours
    pooled) and lifted to the noise of all tokens, from which a share had ``(folds − 1)/folds``. This is James and Stein's
    shrinkage with the noise measured instead of assumed.

    Args:
        grams: Per fold, weighted ``Σ a aᵀ`` ``[folds, d, d]``, float64.
        crosses: Per fold, weighted ``Σ a driftᵀ`` ``[folds, d, d]``.
        metric: In which an error of the prediction counts.
    """
    folds, gram = len(grams), grams.sum(0)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    tiny = torch.finfo(gram.dtype).tiny
    _, whiten = symmetric_roots(gram + _RIDGE * gram.diagonal().mean().clamp_min(tiny) * eye)
    whites = whiten @ grams @ whiten
    sums = metric.root @ crosses.mT @ whiten
    total = sums.sum(0)
    if folds == 1:
        return metric.inverse_root @ total @ whiten
    confirmed, squares = torch.zeros_like(gram[0]), torch.zeros_like(gram[0])
    for white, fold in zip(whites, sums, strict=True):
        # The others' regression: their own Gram matrix, which few tokens leave far from white, and the same ridge.
        u, s, v = _triples(torch.linalg.solve(eye - white, total - fold, left=False))
        confirmed += s * (u * (fold @ v)).sum(0)
        squares += s.square() * (v * (white @ v)).sum(0)
    share = _descending(confirmed / squares.clamp_min(tiny), squares).clamp(0, 1)
    noise = (folds - 1) / folds * (1 - share)
    share = share / (share + noise).clamp_min(tiny)
    u, s, v = _triples(total)
    return metric.inverse_root @ (u * (share * s)) @ v.t() @ whiten


def _triples(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(U, s, V)``, s descending."""
    u, s, vh = torch.linalg.svd(matrix)
    return u, s, vh.t()


def _descending(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted least-squares fit to ``values [n]`` that nowhere rises (isotonic regression: neighbours are pooled)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.clamp_min(1e-300).tolist(), strict=True):
        mean, mass, count = value, weight, 1
        while blocks and blocks[-1][0] < mean:
            before, heavier, more = blocks.pop()
            mean, mass, count = (before * heavier + mean * mass) / (heavier + mass), heavier + mass, count + more
        blocks.append((mean, mass, count))
    return torch.cat([values.new_full((count,), mean) for mean, _, count in blocks])


@torch.no_grad()
def refit_sequentially(
    model: nn.Module,
    layers: nn.ModuleList,
    choices: list[LayerChoice],
    components: list[NPComponent],
    metrics: list[Metric],
    covariances: list[Tensor],
    tokens: Tensor,
    *,
    batch_size: int = 4,
    advance: Callable[[int], None] | None = None,
) -> bool:
    """Refit ``components`` in place, in layer order, on ``tokens [n, seq]``; the model itself is read, not changed.

    ``False``: nothing was done, because the model works on the hidden states between its layers, so that running the layers
    one by one would not be its stream.

    Args:
        model, layers: The original model and its decoder layers.
        choices, components, metrics, covariances: Of the converted layers, in order; components keep their ranks.
        tokens: Token ids. Three streams of them are held: ``3 × n × seq × d`` numbers.
        batch_size: Sequences at a time.
        advance: Called with 1 after every layer.
    """
    device = next(model.parameters()).device
    # Equal batches, whose masks and rotary embeddings are held once; a rest of them would be one more of each.
    batch_size = min(batch_size, len(tokens))
    recorded = record_calls(model, tokens[: len(tokens) // batch_size * batch_size].to(device).split(batch_size))
    if recorded is None:
        return False
    calls = [calls for _, calls in recorded]
    teacher = [h for h, _ in recorded]
    student = [h.clone() for h in teacher]
    del recorded
    fits = {choice.plan.index: position for position, choice in enumerate(choices)}
    # Until a rank is cut nothing has drifted: the two streams are one, and a regression would fit rounding errors.
    lossy_below = False
    for index, layer in enumerate(layers):
        given = [(call[index].args, call[index].kwargs) for call in calls]
        if index not in fits:
            for b, (args, kwargs) in enumerate(given):
                teacher[b] = first_output(layer(teacher[b], *args, **kwargs))
                student[b] = first_output(layer(student[b], *args, **kwargs)) if lossy_below else teacher[b]
        else:
            position = fits[index]
            choice, component = choices[position], components[position]
            plan, metric = choice.plan, metrics[position].to(device)
            attention, sums = [], _Sums()
            for b, (args, kwargs) in enumerate(given):
                a_s = plan.shape.attention(layer, student[b], *args, **kwargs)
                a_t = plan.shape.attention(layer, teacher[b], *args, **kwargs) if lossy_below else a_s
                if lossy_below:
                    sums.add(b % _FOLDS, teacher[b] + a_t, student[b], a_s)
                # The original's part of this batch is done with; the converted one waits for the fit.
                teacher[b] = teacher_output(layer, plan.shape, teacher[b], a_t)
                attention.append(a_s)
            if lossy_below:
                covariance = covariances[position].to(device)
                fill_closed_form(component, choice, make_basis(metric, covariance, sums.target(metric)))
                del covariance
            del sums, metric
            lossy_below |= component.total_rank < choice.hidden_size
            for b in range(len(calls)):
                student[b] = student_output(layer, plan, component, student[b], attention[b])
        if advance is not None:
            advance(1)
    return True


class _Sums:
    """Weighted sums of one layer's regression, per fold."""

    def __init__(self) -> None:
        self.grams: dict[int, Tensor] = {}
        self.crosses: dict[int, Tensor] = {}

    def add(self, fold: int, total: Tensor, h_s: Tensor, a_s: Tensor) -> None:
        """One batch: ``total = h_T + a_T``, ``h_S`` and ``a_S``, each ``[..., d]``."""
        total, own = total.flatten(0, -2).float(), a_s.flatten(0, -2).float()
        drift = total - h_s.flatten(0, -2).float() - own
        # In units of the norm that follows, so that a few tokens with huge states (attention sinks) do not decide alone.
        weighted = own / total.square().mean(1, keepdim=True).clamp_min(torch.finfo(total.dtype).tiny)
        gram, cross = second_moment(weighted, own), second_moment(weighted, drift)
        if fold in self.grams:
            self.grams[fold] += gram
            self.crosses[fold] += cross
        else:
            self.grams[fold], self.crosses[fold] = gram, cross

    def target(self, metric: Metric) -> Tensor:
        """``M = I + B``."""
        grams = torch.stack(list(self.grams.values()))
        drift = drift_map(grams, torch.stack(list(self.crosses.values())), metric)
        return torch.eye(len(drift), dtype=drift.dtype, device=drift.device) + drift
