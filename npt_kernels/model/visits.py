"""Running the *original* model over tokens and meeting its layers on the way, with the attention computed once.

:func:`walk_layers` runs the model's own forward. :func:`walk_group` visits layer after layer for several batches at a time, so
that a layer whose weights have to come from somewhere (host memory, other ranks) comes once for all of them. Underneath are
:func:`tapped_outputs`, which sees what modules return in a run, and :func:`record_calls`, which finds out what the model passes
to each of its layers without computing one: a conversion uses both by themselves.

All of them see what their own thread runs. Others may use the model meanwhile, and neither notices the other.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..thread_locks import ThreadLock
from .forward import decoder_of, first_output
from .install import converted_layers, npt_disabled
from .own_thread import OwnThread
from .select import find_layers
from .sharding import forget_broken_forward
from .weight_location import resident

__all__ = ["LayerCall", "record_calls", "tapped_layers", "tapped_outputs", "walk_group", "walk_layers"]


class _WalkedFarEnoughError(Exception):
    """Ends a forward behind the last converted layer."""


@contextmanager
def tapped_outputs(modules: Sequence[nn.Module], see: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Inside the block every forward of ``modules[i]`` ends with ``see(i, output)``, the first of its outputs.

    What ``see`` returns takes the output's place; ``None`` leaves it.
    """

    def hook(position: int) -> Callable[..., Any]:
        def forward_hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            replaced = see(position, first_output(output))
            if replaced is None:
                return None
            return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

        return forward_hook

    handles = [module.register_forward_hook(OwnThread(hook(position))) for position, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def tapped_layers(model: nn.Module, visit: Callable[[Any, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside the block every forward of a converted layer ends with ``visit(layer, h, a, y)``: its input, its attention's
    output (taken from the run itself, not computed again) and its output, each ``[..., d]``.
    """
    layers = list(converted_layers(model).values())
    attention: dict[int, Tensor] = {}

    def hook(position: int) -> Callable[..., None]:
        def layer_hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            h = args[0] if args else kwargs["hidden_states"]
            visit(layers[position], h, attention.pop(position), first_output(output))

        return layer_hook

    # Before every other hook: FSDP2's, registered earlier, frees the layer's weights, and a visit still needs them.
    handles = [
        layer.register_forward_hook(OwnThread(hook(position)), with_kwargs=True, prepend=True)
        for position, layer in enumerate(layers)
    ]
    modules = [layer.npt_plan.shape.attention_module(layer) for layer in layers]
    try:
        with tapped_outputs(modules, attention.__setitem__):
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
        except (_WalkedFarEnoughError, RuntimeError) as error:
            # torch looks through a module's hooks once more on the way out, and stumbles where another thread's come or go.
            if not isinstance(error, _WalkedFarEnoughError) and not isinstance(
                error.__context__, _WalkedFarEnoughError
            ):
                raise
            forget_broken_forward(model)


@dataclass(frozen=True)
class LayerCall:
    """What the model passes to one layer beside the hidden states: masks, positions, rotary embeddings, flags."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(nn.Module):
    """Stands in for a decoder layer: records its call and returns the hidden states as they came.

    To other threads, and to whoever copies the model, it is the layer.
    """

    def __init__(self, layer: nn.Module, calls: list[tuple[Tensor, LayerCall]], returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        # A submodule, so that whoever looks for its layers during this forward (FSDP2 does so in its first) finds them all.
        self.recorded = layer
        self.calls = calls
        self.thread = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Models read settings off their layers.
            return getattr(super().__getattr__("recorded"), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self.recorded, memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _itself, (self.recorded,)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        return self.recorded.named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.recorded.state_dict(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return self.recorded(*args, **kwargs)
        hidden_states: Tensor = args[0] if args else kwargs.pop("hidden_states")
        self.calls.append((hidden_states, LayerCall(args[1:], kwargs)))
        return (hidden_states, None) if self.returns_tuple else hidden_states


def _itself(layer: nn.Module) -> nn.Module:
    return layer


#: One thread's recorders at a time: two would each put back what they found, the other's among it.
_recording = ThreadLock()


def _record_batch(model: nn.Module, ids: Tensor) -> tuple[Tensor, list[LayerCall]] | None:
    """:func:`record_calls` of one batch, of a model whose layers return hidden states alone or as the first of a pair."""
    try:
        found = _record_as(model, ids, returns_tuple=False)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        found = _record_pairs(model, ids)
        if found is None:
            raise error
    return found or _record_pairs(model, ids)


def _record_pairs(model: nn.Module, ids: Tensor) -> tuple[Tensor, list[LayerCall]] | None:
    with contextlib.suppress(TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return _record_as(model, ids, returns_tuple=True)
    return None


def _record_as(model: nn.Module, ids: Tensor, *, returns_tuple: bool) -> tuple[Tensor, list[LayerCall]] | None:
    _, layers = find_layers(model)
    calls: list[tuple[Tensor, LayerCall]] = []
    with _recording:
        originals = list(layers)
        try:
            for index, layer in enumerate(originals):
                layers[index] = _Recorder(layer, calls, returns_tuple)
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


def _share_calls(calls: list[LayerCall], known: list[LayerCall]) -> list[LayerCall]:
    return [
        LayerCall(
            _shared(call.args, other.args),
            {name: _shared(value, other.kwargs.get(name)) for name, value in call.kwargs.items()},
        )
        for call, other in zip(calls, known, strict=True)
    ]


@torch.no_grad()
def record_calls(model: nn.Module, batches: Sequence[Tensor]) -> list[tuple[Tensor, list[LayerCall]]] | None:
    """What the first layer gets (embeddings ``[n, seq, d]``) and the call of every layer, for each batch of ids ``[n, seq]``.

    No layer is computed: the model's own forward runs with its layers swapped for recorders, and thus makes masks and
    positions as it always does. Arguments that are equal in several batches are held once. ``None`` if the model does anything
    to the hidden states between two layers: then only its own forward knows how to walk.
    """
    recorded: list[tuple[Tensor, list[LayerCall]]] = []
    for ids in batches:
        record = _record_batch(model, ids)
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
    recorded = record_calls(model, batches)
    if recorded is None:
        for position, ids in enumerate(batches):
            walk_layers(model, ids, lambda layer, h, a, y, position=position: visit(position, layer, h, a, y))  # type: ignore[misc]
        return
    states: list[Tensor | None] = [h for h, _ in recorded]
    calls_of = [calls for _, calls in recorded]
    # A hidden state lives until its layer has returned.
    del recorded
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
