"""The language-model head apart from the decoder: logits for a chunk of tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .forward import decoder_of

__all__ = ["CHUNK_ELEMENTS", "OutputHead"]

#: Logits exist for so many (token, vocabulary entry) pairs at a time; 32 MiB in float32.
CHUNK_ELEMENTS = 2**23


class OutputHead:
    """The language-model head apart from the decoder, so that logits need only exist for a chunk of tokens.

    ``states(ids)`` gives ``[n, seq, d]`` and ``logits(states)`` their logits. Models whose logits are more than a linear of
    the decoder's output (soft-capping, scaling) are found by running them; for them the states *are* the logits and
    ``weight`` is ``None``.

    Raises:
        ValueError: The model has no language-model head.
    """

    def __init__(self, model: nn.Module) -> None:
        get_head = getattr(model, "get_output_embeddings", None)
        head = None if get_head is None else get_head()
        if head is None:
            raise ValueError(
                f"{type(model).__name__} has no language-model head, which KL and perplexity need; load it as a causal "
                "language model (AutoModelForCausalLM)"
            )
        self.model, self.decoder = model, decoder_of(model)
        self.weight: Tensor | None = getattr(head, "weight", None)
        self.bias: Tensor | None = getattr(head, "bias", None)
        if self.weight is None or self.weight.is_meta or not self._is_linear():
            self.weight = self.bias = None

    @torch.no_grad()
    def _is_linear(self) -> bool:
        assert self.weight is not None
        ids = torch.arange(min(4, len(self.weight)), device=self.weight.device).unsqueeze(0)
        expected = self.model(input_ids=ids, use_cache=False).logits
        states = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        if expected.shape[-1] != len(self.weight):
            return False
        difference = (self.logits(states).float() - expected.float()).abs().max()
        return bool(difference <= 64 * torch.finfo(states.dtype).eps * expected.float().abs().max().clamp_min(1e-3))

    def states(self, ids: Tensor, **inputs: Any) -> Tensor:
        """``[n, seq, d]``, or the logits ``[n, seq, vocab]`` where ``weight`` is ``None``. ``inputs``: a mask, positions …"""
        if self.weight is None:
            return self.model(input_ids=ids, use_cache=False, **inputs).logits  # type: ignore[no-any-return]
        return self.decoder(input_ids=ids, use_cache=False, **inputs).last_hidden_state  # type: ignore[no-any-return]

    def logits(self, states: Tensor) -> Tensor:
        """``[..., vocab]`` from ``states`` of :meth:`states`."""
        return states if self.weight is None else nn.functional.linear(states, self.weight, self.bias)

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        if self.weight is not None:
            return len(self.weight)
        config: Any = self.model.config
        return int(config.vocab_size)
