"""Running the *original* model over tokens and meeting every converted layer on the way, with the attention computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.patching import converted_layers, npt_disabled
from ..models.running import decoder_of, first_output
from .sharding import forget_broken_forward

__all__ = ["CHUNK_ELEMENTS", "OutputHead", "tapped_layers", "walk_layers"]

#: Logits exist for so many (token, vocabulary entry) pairs at a time; 32 MiB in float32.
CHUNK_ELEMENTS = 2**23


class _WalkedFarEnoughError(Exception):
    """Ends a forward behind the last converted layer."""


@contextmanager
def tapped_layers(model: nn.Module, visit: Callable[[Any, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside the block every forward of a converted layer ends with ``visit(layer, h, a, y)``: its input, its attention's
    output (taken from the run itself, not computed again) and its output, each ``[..., d]``.
    """
    handles = []
    attention: dict[int, Tensor] = {}

    def tap(index: int, layer: Any) -> None:
        def attention_hook(module: nn.Module, inputs: Any, output: Any) -> None:
            attention[index] = first_output(output)

        def layer_hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            h = args[0] if args else kwargs["hidden_states"]
            visit(layer, h, attention.pop(index), first_output(output))

        handles.append(layer.npt_plan.shape.attention_module(layer).register_forward_hook(attention_hook))
        # Before every other hook: FSDP2's, registered earlier, frees the layer's weights, and a visit still needs them.
        handles.append(layer.register_forward_hook(layer_hook, with_kwargs=True, prepend=True))

    for index, layer in converted_layers(model).items():
        tap(index, layer)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def walk_layers(model: nn.Module, ids: Tensor, visit: Callable[[Any, Tensor, Tensor, Tensor], None]) -> None:
    """Run the original model over ``ids [n, seq]`` without gradient and call ``visit(layer, h, a, y)`` at converted layers.

    Masks, position ids and rotary embeddings are the model's own, since its own forward runs. It stops behind the last
    converted layer: neither the layers above nor the language-model head are computed. Raises ``ValueError`` if the model is
    not converted.
    """
    last = max(converted_layers(model), default=-1)

    def visit_and_stop(layer: Any, h: Tensor, a: Tensor, y: Tensor) -> None:
        visit(layer, h, a, y)
        if layer.npt_plan.index == last:
            raise _WalkedFarEnoughError

    with torch.no_grad(), npt_disabled(model), tapped_layers(model, visit_and_stop):
        try:
            decoder_of(model)(input_ids=ids, use_cache=False)
        except _WalkedFarEnoughError:
            forget_broken_forward(model)


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

    def states(self, ids: Tensor) -> Tensor:
        """``[n, seq, d]``, or the logits ``[n, seq, vocab]`` where ``weight`` is ``None``."""
        if self.weight is None:
            return self.model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
        return self.decoder(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

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
