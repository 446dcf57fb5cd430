"""Attention that stays within the documents of a packed sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .forward import cache_in, decoder_of
from .own_thread import OwnThread

__all__ = ["isolated_documents", "packed_position_ids"]


def packed_position_ids(ids: Tensor, separator: int) -> Tensor:
    """Position of every token in its document, ``[n, seq]``, int64, for packed ``ids [n, seq]``.

    A document ends with the token ``separator``; the first one of a sequence counts from the sequence's start.
    """
    index = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    starts = torch.zeros_like(index)
    starts[..., 1:] = index[..., 1:] * (ids[..., :-1] == separator)
    return index - starts.cummax(-1).values


class _DocumentPositions:
    """Forward pre-hook of a decoder: adds ``position_ids`` to calls that say nothing about positions, masks or a cache."""

    def __init__(self, separator: int) -> None:
        self.separator = separator

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        ids = args[0] if args else kwargs.get("input_ids")
        own = [*(kwargs.get(name) for name in ("position_ids", "attention_mask", "use_cache")), cache_in(kwargs)]
        if len(args) > 1 or not isinstance(ids, Tensor) or any(x is not None and x is not False for x in own):
            return None
        # With a cache, transformers takes the sequence for one text.
        return args, {**kwargs, "position_ids": packed_position_ids(ids, self.separator), "use_cache": False}


@contextmanager
def isolated_documents(model: nn.Module, separator: int | None) -> Iterator[None]:
    """Inside the block attention stays within the documents of packed sequences, and positions count from their starts.

    It holds for every forward of this thread on ``input_ids`` alone: calibration, training, evaluation. Calls with a mask,
    positions or a cache (``generate``) are left as they are. The decoder gets ``position_ids`` that start anew behind each
    ``separator``, from which transformers makes the mask, in each layer's own kind (sliding windows too). Verified with its
    ``sdpa`` and ``eager`` attention; its flash attention reads the same ``position_ids`` (*unverified*).

    Args:
        model: A causal language model or decoder of transformers.
        separator: The end-of-text token; ``None``: nothing happens.
    """
    if separator is None:
        yield
        return
    # Whoever answers requests with the model meanwhile, in another thread, has no documents.
    hook = OwnThread(_DocumentPositions(separator))
    handle = decoder_of(model).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
