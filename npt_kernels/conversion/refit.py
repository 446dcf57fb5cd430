"""Sequential refit: each layer fitted on the *converted* model's own stream, so that it also mends what earlier layers lost.

Below layer l the converted stream ``h_S`` has drifted from the original's ``h_T``. The layer must make up for it: its MLP
should see, and its output contain, ``h_T + a_T``, so what it has to predict from its own attention output ``a_S`` is not ``a_S``
but ``a_S + (h_T + a_T − h_S − a_S)``. A ridge regression of the difference on ``a_S`` gives a matrix B, and the basis then
encodes ``(I + shrink·B) a`` instead of ``a``. At r = d nothing has drifted, B is zero and the form stays exact.

Measured (SmolLM2, all layers, mean rank 128, without training): KL .122 → .112 nats per token on 4,096 tokens of Alice and of
lcet10, .082 → .075 on 5,120 of Shakespeare's prose.
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
from .bases import Metric, make_basis
from .closed_form import fill_closed_form

__all__ = ["refit_sequentially"]

#: Ridge (share of the mean diagonal) and how much of B to believe. Swept on SmolLM2: shrink 0 / .5 / .7 / 1 gave KL
#: .126 / .113 / .112 / .119; ridge .02 and .2 are alike.
_RIDGE = 0.02
_SHRINK = 0.7


def _target_map(a_s: Tensor, drift: Tensor, weight: Tensor) -> Tensor:
    """``M = I + shrink·B`` with B the weighted ridge regression of ``drift [N, d]`` on ``a_s [N, d]``."""
    weighted = a_s * weight
    gram = second_moment(weighted, a_s) / len(a_s)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    cross = second_moment(weighted, drift) / len(a_s)
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny) * eye
    return eye + _SHRINK * torch.linalg.solve(gram + ridge, cross).t()


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
        tokens: Token ids; whole batches of ``batch_size`` sequences are used (all of them if there are fewer).
        advance: Called with 1 after every layer.
    """
    device = next(model.parameters()).device
    batch_size = min(batch_size, len(tokens))
    recorded = record_calls(model, tokens[: len(tokens) // batch_size * batch_size].to(device).split(batch_size))
    if recorded is None:
        return False
    calls = [calls for _, calls in recorded]
    teacher = [h for h, _ in recorded]
    student = [h.clone() for h in teacher]
    del recorded
    fits = {choice.plan.index: position for position, choice in enumerate(choices)}
    # Until a rank is cut nothing has drifted, and a regression would fit rounding errors.
    lossy_below = False
    for index, layer in enumerate(layers):
        given = [(call[index].args, call[index].kwargs) for call in calls]
        if index not in fits:
            teacher = [first_output(layer(h, *a, **k)) for h, (a, k) in zip(teacher, given, strict=True)]
            student = [first_output(layer(h, *a, **k)) for h, (a, k) in zip(student, given, strict=True)]
        else:
            position = fits[index]
            choice, component = choices[position], components[position]
            shape = choice.plan.shape
            a_t = [shape.attention(layer, h, *a, **k) for h, (a, k) in zip(teacher, given, strict=True)]
            a_s = [shape.attention(layer, h, *a, **k) for h, (a, k) in zip(student, given, strict=True)]
            if lossy_below:
                target = _fit_target(teacher, student, a_t, a_s)
                metric = metrics[position].to(device, torch.float64)
                covariance = covariances[position].to(device, torch.float64)
                fill_closed_form(component, choice, make_basis(metric, covariance, target))
            lossy_below |= component.total_rank < choice.hidden_size
            for b in range(len(calls)):
                teacher[b] = teacher_output(layer, shape, teacher[b], a_t[b])
                student[b] = student_output(layer, choice.plan, component, student[b], a_s[b])
        if advance is not None:
            advance(1)
    return True


def _fit_target(h_t: list[Tensor], h_s: list[Tensor], a_t: list[Tensor], a_s: list[Tensor]) -> Tensor:
    def flat(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.flatten(0, -2) for part in parts]).float()

    total, own = flat(h_t) + flat(a_t), flat(a_s)
    drift = total - flat(h_s) - own
    # In units of the norm that follows, so that a few tokens with huge states (attention sinks) do not decide alone.
    weight = 1 / total.square().mean(1, keepdim=True).clamp_min(torch.finfo(total.dtype).tiny)
    return _target_map(own, drift, weight / weight.mean())
