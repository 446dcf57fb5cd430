"""Running the *original* model over tokens and meeting every converted layer on the way, with the attention computed once.

:func:`walk_layers` runs the model's own forward. :func:`walk_group` visits layer after layer for several batches at a time, so
that a layer whose weights have to come from somewhere (host memory, other ranks) comes once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .forward import decoder_of, first_output
from .install import converted_layers, npt_disabled
from .select import find_layers
from .sharding import forget_broken_forward
from .weight_location import resident

__all__ = ["CHUNK_ELEMENTS", "OutputHead", "tapped_layers", "walk_group", "walk_layers"]

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


@dataclass(frozen=True)
class _Call:
    """What the model passes to one layer beside the hidden states: masks, positions, rotary embeddings, flags."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(nn.Module):
    """Stands in for a decoder layer: records its call and returns the hidden states as they came."""

    def __init__(self, layer: nn.Module, calls: list[tuple[Tensor, _Call]]) -> None:
        super().__init__()
        # A submodule, so that whoever looks for its layers during this forward (FSDP2 does so in its first) finds them all.
        self.recorded = layer
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("recorded"), name)  # models read settings off their layers

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden_states: Tensor = args[0] if args else kwargs.pop("hidden_states")
        self.calls.append((hidden_states, _Call(args[1:], kwargs)))
        return hidden_states


def _record_calls(model: nn.Module, ids: Tensor) -> tuple[Tensor, list[_Call]] | None:
    """Embeddings ``[n, seq, d]`` and the call of every layer for ``ids [n, seq]``; no layer is computed.

    The model's own forward runs with its layers swapped for recorders, and thus makes masks and positions as it always does.
    ``None`` if the model does anything to the hidden states between two layers: then only its own forward knows how to walk.
    """
    _, layers = find_layers(model)
    originals = list(layers)
    calls: list[tuple[Tensor, _Call]] = []
    try:
        for index, layer in enumerate(originals):
            layers[index] = _Recorder(layer, calls)
        decoder_of(model)(input_ids=ids, use_cache=False)
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer
    if len(calls) != len(originals) or any(hidden is not calls[0][0] for hidden, _ in calls):
        return None
    return calls[0][0], [call for _, call in calls]


def _shared(value: Any, known: Any) -> Any:
    """``known`` where it equals ``value``: a group of batches of one shape holds masks and rotary embeddings once."""
    if isinstance(value, Tensor) and isinstance(known, Tensor):
        same = value.shape == known.shape and value.dtype == known.dtype and torch.equal(value, known)
        return known if same else value
    if type(value) is type(known) and isinstance(value, tuple | list) and len(value) == len(known):
        return type(value)(_shared(v, k) for v, k in zip(value, known, strict=True))
    return value


def _share_calls(calls: list[_Call], known: list[_Call]) -> list[_Call]:
    return [
        _Call(
            _shared(call.args, other.args),
            {name: _shared(value, other.kwargs.get(name)) for name, value in call.kwargs.items()},
        )
        for call, other in zip(calls, known, strict=True)
    ]


@torch.no_grad()
def _record_group(model: nn.Module, batches: Sequence[Tensor]) -> list[tuple[Tensor, list[_Call]]] | None:
    """:func:`_record_calls` of every batch, equal arguments held once; ``None`` if the model cannot be walked so."""
    recorded: list[tuple[Tensor, list[_Call]]] = []
    for ids in batches:
        record = _record_calls(model, ids)
        if record is None:
            return None
        # One batch has nothing to share with, and is spared the comparison, which waits for the GPU.
        calls = _share_calls(record[1], recorded[0][1]) if recorded else record[1]
        recorded.append((record[0], calls))
    return recorded


def walk_group(
    model: nn.Module, batches: Sequence[Tensor], visit: Callable[[int, Any, Tensor, Tensor, Tensor], None]
) -> None:
    """Run the original model over ``batches`` (token ids ``[n, seq]`` each) layer by layer, all batches at a layer.

    Calls ``visit(position, layer, h, a, y)`` at every converted layer for every batch in turn; ``position`` is that of the
    batch. Between two layers only the hidden states of the batches are kept: the sum of their ``n × seq × d``. What each layer
    gets beside them (masks, which may differ from layer to layer, position ids, rotary embeddings) is what the model passes.

    No gradient; stops behind the last converted layer. A model that works on the hidden states between its layers is walked
    batch by batch instead, by its own forward. Raises ``ValueError`` if the model is not converted.
    """
    recorded = _record_group(model, batches)
    if recorded is None:
        for position, ids in enumerate(batches):
            walk_layers(model, ids, lambda layer, h, a, y, position=position: visit(position, layer, h, a, y))  # type: ignore[misc]
        return
    states: list[Tensor | None] = [h for h, _ in recorded]
    calls_of = [calls for _, calls in recorded]
    del recorded  # a hidden state lives until its layer has returned
    last = max(converted_layers(model), default=-1)
    position = 0

    def tap(layer: Any, h: Tensor, a: Tensor, y: Tensor) -> None:
        visit(position, layer, h, a, y)

    with torch.no_grad(), npt_disabled(model), tapped_layers(model, tap):
        for index, layer in enumerate(find_layers(model)[1][: last + 1]):
            with resident(layer):
                for position in range(len(batches)):
                    call = calls_of[position][index]
                    y = first_output(layer(states[position], *call.args, **call.kwargs))
                    states[position] = y if index < last else None
                    del y


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
