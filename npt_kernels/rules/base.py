"""What a *rule* is: the map from the bottleneck ``z`` (and the key product ``p``) to the coefficients ``c``.

Every form of the per-token weight change obeys ``ΔW_t u_t = c_t @ w_b_up`` with ``c [T, R]``. Forms differ only in ``c``;
everything after ``c`` is one shared kernel. A new rule is one file with one :class:`Rule` subclass and one line in
``rules/__init__.py``; ops, the backend ``eager``, saving and tests take it from there. Backends with kernels of their own for
the rules (``kernels/triton/support.py`` and ``kernels/cuda/__init__.py``: ``RULE_IDS``) give a reason until they have it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

__all__ = ["Key", "Rule", "split_ranks"]

#: What ``w_a_up`` is under a rule: a matrix ``[R, in]``, one vector ``[in]``, or absent.
Key = Literal["matrix", "vector", "none"]


def split_ranks(tensor: Tensor, num_ranks: int) -> Tensor:
    """View ``[T, k·r]`` as ``[T, k, r]``: block j of r columns belongs to rank-1 term j."""
    return tensor.unflatten(-1, (num_ranks, -1))


class Rule(ABC):
    """Forward, gradient, explicit vectors and penalty of one form of ΔW. Stateless: one instance serves the process.

    Shapes: ``z [T, R]`` the bottleneck, ``p [T, P]`` the key product (``u @ w_a_upᵀ``; P = R for a matrix key, 1 for a
    vector key; ``None`` without key), ``c``, ``dc [T, R]``.
    """

    name: ClassVar[str]
    key: ClassVar[Key]
    #: Whether its k terms are computed apart, each from its own r columns of z and p; else R columns are one term.
    separates_terms: ClassVar[bool] = False
    #: True when ``w_a_up`` of a target whose input is as wide as ``a`` is ``w_downᵀ`` itself (one matrix for both).
    ties_key_to_w_down: ClassVar[bool] = False
    #: One line for tables and ``--help``.
    summary: ClassVar[str]

    def term_widths(self, total_rank: int, num_ranks: int) -> tuple[int, int]:
        """(terms, columns of a term) of R columns, as kernels see them."""
        return (num_ranks, total_rank // num_ranks) if self.separates_terms else (1, total_rank)

    @abstractmethod
    def coefficients(self, z: Tensor, p: Tensor | None, num_ranks: int, scale: float) -> Tensor:
        """``c [T, R]`` from ``z`` and ``p``."""

    @abstractmethod
    def backward(
        self, dc: Tensor, z: Tensor, p: Tensor | None, num_ranks: int, scale: float, need_z: bool, need_p: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """``(dz, dp)`` from ``dc``; only those asked for, the other is ``None``."""

    @abstractmethod
    def vectors(
        self, z: Tensor, u: Tensor, w_a_up: Tensor | None, w_b_up: Tensor, num_ranks: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Explicit ``(v_a [T, n, in], v_b [T, n, out])`` with ``ΔW_t = Σ_n v_b ⊗ v_a``: the definition, for tests and plots."""

    @abstractmethod
    def vector_norms(
        self, z: Tensor, u: Tensor, w_a_up: Tensor | None, w_b_up: Tensor, num_ranks: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Per-token ``(|v_a|², |v_b|²)``, each ``[T]`` and summed over terms, through Gram matrices: no ``[T, in]`` is made."""


def gram_norm(z: Tensor, weight: Tensor, num_ranks: int) -> Tensor:
    """``Σ_j |z_j @ weight_j|²`` as ``Σ_j z_j G_j z_jᵀ`` with ``G_j = weight_j weight_jᵀ [r, r]``; returns ``[T]``."""
    blocks = weight.unflatten(0, (num_ranks, -1))
    gram = torch.bmm(blocks, blocks.transpose(1, 2))
    z_blocks = split_ranks(z, num_ranks).transpose(0, 1)
    return (torch.bmm(z_blocks, gram) * z_blocks).sum(dim=(0, 2))
