"""Bases of the attention output: which r directions the bottleneck keeps, and what every one is worth.

A basis is a pair (encoder ``E [d, r]``, decoder ``D [r, d]``) with ``a ≈ a E D``; at r = d it is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import Moments

__all__ = ["Basis", "fisher_basis", "make_basis", "pca_basis"]


@dataclass(frozen=True)
class Basis:
    """Directions in order of worth.

    Attributes:
        encoder: ``[d, d]``; its first r columns are the encoder of rank r.
        decoder: ``[d, d]``; its first r rows are the decoder. Rows have unit norm, so Adam's step means the same everywhere.
        worth: ``[d]``, what keeping a direction saves: nats per token (``fisher``) or energy (``pca``); descending.
    """

    encoder: Tensor
    decoder: Tensor
    worth: Tensor


def pca_basis(moments: Moments) -> Basis:
    """Eigenvectors of ``C = E[a aᵀ]``: least squared error of ``a``."""
    values, vectors = torch.linalg.eigh(moments.covariance / moments.tokens)
    vectors = vectors.flip(1)
    return Basis(vectors, vectors.t().contiguous(), values.flip(0).clamp_min(0))


def fisher_basis(moments: Moments, damping: float = 0.1) -> Basis:
    """Least expected loss increase to second order: eigenvectors V of ``F^½ C F^½``, encoder ``F^½ V``, decoder ``Vᵀ F^-½``.

    ``F`` gets ``damping · mean(diag F)`` on its diagonal, so directions the sample did not feel keep a weight. With labels
    sampled from the model, half an eigenvalue is the KL divergence in nats per token that dropping the direction costs.
    """
    assert moments.fisher is not None
    fisher = moments.fisher / moments.tokens
    fisher = fisher + damping * fisher.diagonal().mean() * torch.eye(
        len(fisher), dtype=fisher.dtype, device=fisher.device
    )
    values, vectors = torch.linalg.eigh(fisher)
    root = vectors * values.clamp_min(torch.finfo(values.dtype).tiny).sqrt() @ vectors.t()
    inverse_root = vectors * values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt() @ vectors.t()
    worth, directions = torch.linalg.eigh(root @ (moments.covariance / moments.tokens) @ root)
    directions = directions.flip(1)
    encoder, decoder = root @ directions, directions.t() @ inverse_root
    # Raw pairs have a tiny encoder and a huge decoder, on which Adam diverged (1.027 -> 1.46, equivalence §0).
    norms = decoder.norm(dim=1)
    return Basis(encoder * norms, decoder / norms.unsqueeze(1), worth.flip(0).clamp_min(0) / 2)


def make_basis(name: str, moments: Moments) -> Basis:
    """The basis of that name (``NPTConfig.basis``)."""
    return pca_basis(moments) if name == "pca" else fisher_basis(moments)
