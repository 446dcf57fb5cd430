"""Bases of the attention output: which r directions the bottleneck keeps, and what every one is worth.

A basis is a pair (encoder ``E [d, r]``, decoder ``D [r, d]``) with ``a ≈ a E D``; at r = d the product is the identity. It
minimises the error of ``a`` in a *metric*: plain (PCA), or the Fisher, in which an error counts by what the loss feels of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_moments import Moments

__all__ = ["Basis", "Metric", "make_basis", "make_metric"]

#: Share of the mean diagonal added to the Fisher. Measured on SmolLM2 (16k tokens): .02 to .3 differ by .0004 nats of KL.
_FISHER_DAMPING = 0.1


@dataclass(frozen=True)
class Metric:
    """``root = F^½`` and ``inverse_root = F^-½`` ``[d, d]``; ``unit`` of the squared error."""

    root: Tensor
    inverse_root: Tensor
    unit: str

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Metric:
        """The same metric there."""
        root = self.root.to(device, dtype)
        # The plain metric is one matrix, twice.
        inverse = root if self.inverse_root is self.root else self.inverse_root.to(device, dtype)
        return Metric(root, inverse, self.unit)


@dataclass(frozen=True)
class Basis:
    """Directions in order of worth.

    Attributes:
        encoder: ``[d, d]``; its first r columns are the encoder of rank r.
        decoder: ``[d, d]``; its first r rows are the decoder. Rows have unit norm: raw Fisher pairs have a tiny encoder and a
            huge decoder, on which Adam diverged (perplexity ratio 1.027 → 1.46).
        worth: ``[d]``, what keeping a direction saves, descending: nats per token in the Fisher metric, energy in the plain.

    Made in float64 (:func:`make_basis`).
    """

    encoder: Tensor
    decoder: Tensor
    worth: Tensor


def symmetric_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``(M^½, M^-½)`` of a positive semidefinite matrix; eigenvalues below 1e-12 of the largest count as that."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(1e-12 * values.max().clamp_min(torch.finfo(values.dtype).tiny))
    return vectors * values.sqrt() @ vectors.t(), vectors * values.rsqrt() @ vectors.t()


def make_metric(name: str, moments: Moments) -> Metric:
    """The metric behind ``NPTConfig.basis``: ``pca`` or ``fisher`` (damped, so that directions unfelt in the sample count)."""
    eye = torch.eye(len(moments.covariance), dtype=torch.float64, device=moments.covariance.device)
    if name == "pca":
        return Metric(eye, eye, "energy")
    assert moments.fisher is not None
    fisher = moments.fisher / moments.fisher_tokens
    return Metric(*symmetric_roots(fisher + _FISHER_DAMPING * fisher.diagonal().mean() * eye), "nats/token")


def make_basis(metric: Metric, covariance: Tensor, target: Tensor | None = None) -> Basis:
    """Best rank-r prediction of ``M a`` from ``a`` in the metric, for every r at once (reduced-rank regression).

    With U, s the left singular vectors and values of ``F^½ M C^½``: encoder ``Mᵀ F^½ U_r``, decoder ``U_rᵀ F^-½``. With labels
    sampled from the model, ``s²/2`` is to second order the KL divergence in nats per token that dropping a direction costs.

    Args:
        metric: ``F``.
        covariance: ``C = E[a aᵀ] [d, d]``.
        target: ``M [d, d]``; ``None`` is the identity.
    """
    root = metric.root if target is None else metric.root @ target
    # Eigenvectors of G Gᵀ = root C rootᵀ are the left singular vectors of G = root C^½, without forming C^½.
    worth, directions = torch.linalg.eigh(root @ covariance @ root.t())
    directions = directions.flip(1)
    encoder, decoder = root.t() @ directions, directions.t() @ metric.inverse_root
    norms = decoder.norm(dim=1)
    return Basis(encoder * norms, decoder / norms.unsqueeze(1), worth.flip(0).clamp_min(0) / 2)
