"""Second moments of the attention output ``a`` and of the loss gradient at it, from one pass over calibration tokens.

``C = E[a aᵀ]`` says which directions of ``a`` are large; the Fisher ``F = E[g gᵀ]`` (g the gradient of the log-likelihood of
labels *sampled from the model* with respect to ``a``) says which the predictions feel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.forward import decoder_of, evaluating
from ..model.visits import tapped_outputs

__all__ = ["FISHER_TOKENS", "Moments", "check_tokens", "collect_moments", "second_moment"]

#: Tokens of the Fisher's backward passes. Measured on SmolLM2: it saturates at 16 to 32 thousand, the covariance still gains
#: at 98 thousand.
FISHER_TOKENS = 24576


@dataclass
class Moments:
    """Sums over tokens at one layer, float64 ``[d, d]``: ``covariance`` over ``tokens``, ``fisher`` over ``fisher_tokens``."""

    covariance: Tensor
    fisher: Tensor | None
    tokens: int = 0
    fisher_tokens: int = 0


def check_tokens(tokens: Tensor, vocab_size: int | None) -> Tensor:
    """Token ids ``[n, seq]``, non-empty, in range. Raises ``TypeError`` or ``ValueError``."""
    if (
        not isinstance(tokens, Tensor)
        or tokens.is_floating_point()
        or tokens.is_complex()
        or tokens.dtype == torch.bool
    ):
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"calibration must be a tensor of token ids [n, seq], got {kind}")
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"calibration has shape {list(tokens.shape)}, expected token ids [n, seq] with n, seq ≥ 1")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise ValueError(
            f"calibration contains token id {low if low < 0 else high}, outside 0 … {(vocab_size or 0) - 1}"
        )
    return tokens


def second_moment(rows: Tensor, other: Tensor | None = None) -> Tensor:
    """``rowsᵀ @ other`` (``other`` defaults to ``rows``) ``[d, d]`` as float64, in float32 also under autocast.

    Under autocast the product would be rounded to bf16, and a relative error of 1/256 buries every direction whose energy is
    less than that: measured, the converted SmolLM2 then lost .20 nats per token instead of .075.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return (rows.t() @ (rows if other is None else other)).double()


def collect_moments(
    model: nn.Module,
    attention_modules: list[nn.Module],
    tokens: Tensor,
    *,
    fisher: bool,
    fisher_tokens: int = FISHER_TOKENS,
    batch_tokens: int = 512,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> list[Moments]:
    """One pass (forward, and backward if ``fisher``) of the *original* model over ``tokens [n, seq]``.

    Args:
        model: Causal language model; called as ``model(input_ids=..., use_cache=False)``, returning ``logits`` or, without a
            language-model head, hidden states (then no Fisher).
        attention_modules: One per layer of interest; the first output of each is ``a [batch, seq, d]``.
        tokens: Token ids on any device.
        fisher: Also collect the Fisher; needs ``logits``.
        fisher_tokens: Tokens of the backward passes at most; the rest run forward only, through the decoder alone.
        batch_tokens: Tokens per forward.
        seed: Seed of the sampled labels.
        advance: Called with the number of tokens done, for a progress bar.
    """
    device = next(model.parameters()).device
    moments: list[Moments | None] = [None] * len(attention_modules)
    decoder = decoder_of(model)
    backward = fisher
    generator = torch.Generator(device=device).manual_seed(seed)

    def see(position: int, a: Tensor) -> Tensor:
        width = a.shape[-1]
        flat = a.detach().reshape(-1, width).float()
        entry = moments[position]
        if entry is None:
            zeros = torch.zeros(width, width, dtype=torch.float64, device=a.device)
            entry = moments[position] = Moments(zeros, torch.zeros_like(zeros) if fisher else None)
        entry.covariance += second_moment(flat)
        entry.tokens += flat.shape[0]
        if backward:
            entry.fisher_tokens += flat.shape[0]
            if not a.requires_grad:
                a = a.detach().requires_grad_()

            def accumulate(grad: Tensor, entry: Moments = entry) -> None:
                g = grad.detach().reshape(-1, width).float()
                assert entry.fisher is not None
                entry.fisher += second_moment(g)

            a.register_hook(accumulate)
        return a

    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        done = 0
        with evaluating(model), tapped_outputs(attention_modules, see):
            for batch in tokens.split(max(1, batch_tokens // tokens.shape[1])):
                ids = batch.to(device)
                backward = fisher and done < fisher_tokens
                with torch.set_grad_enabled(backward):
                    if backward:
                        logits = getattr(model(input_ids=ids, use_cache=False), "logits", None)
                        if logits is None:
                            raise ValueError(f"{type(model).__name__} returns no logits; use basis='pca'")
                        logits.backward(_sampled_gradient(logits.detach(), generator))
                    else:
                        decoder(input_ids=ids, use_cache=False)
                done += ids.numel()
                if advance is not None:
                    advance(ids.numel())
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    assert all(entry is not None for entry in moments)
    return [entry for entry in moments if entry is not None]


def _sampled_gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient at ``logits [..., vocab]`` of the sum of −log p(y), y drawn from p itself.

    Its second moment is the Fisher, in nats². Written down, ``p − e_y``, not taken by autograd.
    """
    p = logits.flatten(0, -2).float().softmax(-1)
    labels = _draw(p, generator)
    p.scatter_add_(1, labels, p.new_full((1, 1), -1.0).expand_as(labels))
    return p.view(logits.shape).to(logits.dtype)


def _draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """One label ``[N, 1]`` for each row of probabilities ``[N, vocab]``.

    ``multinomial`` draws an exponential for every entry, on a CPU in one thread: .80 of the 2.34 s that 512 tokens of SmolLM2
    took (bf16, two cores, 2026-11-27). There y is where p's running sum passes a uniform number; a GPU's sums may differ from
    run to run.
    """
    if p.device.type != "cpu":
        return torch.multinomial(p, 1, generator=generator)
    total = p.cumsum(-1)
    # Times the last sum: float32 does not add up to one, and behind the last entry there is none.
    drawn = torch.rand(len(p), 1, generator=generator) * total[:, -1:]
    return torch.searchsorted(total, drawn, right=True).clamp_max_(p.shape[-1] - 1)
