"""The one place where this room touches the rest of the package and a model's modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.forward import cache_in, decoder_of, evaluating, first_output
from ..model.head import OutputHead
from ..model.install import converted_layers
from ..model.linears import linear_bias, linear_shape, linear_weight, weight_source
from ..model.select import find_layers
from ..model.shapes import LAYER_SHAPES
from ..model.shapes.base import LayerShape
from ..model.sharding import is_sharded

__all__ = [
    "OutputHead",
    "ReachedLayerError",
    "Sites",
    "converted_layers",
    "decoder_of",
    "evaluating",
    "first_output",
    "learned_positions",
    "linear_bias",
    "linear_weight",
    "watching_tokens",
]


class ReachedLayerError(Exception):
    """Ends a forward that has shown what it was run for."""


class _Skipped(nn.Module):
    """Stands in for a decoder layer whose result is known."""

    def __init__(self, layer: nn.Module, h: Tensor) -> None:
        super().__init__()
        # Not as submodules: whoever walks the model meets the layer where it is, or not at all.
        self.__dict__["stands_for"], self.__dict__["h"] = layer, h

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stands_for"], name)  # models read settings off their layers

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.__dict__["h"]  # type: ignore[no-any-return]


class Sites:
    """The places where a model can be edited: the last matrix of every decoder layer's MLP (``down_proj``, ``c_proj``).

    A change there adds a value to the residual stream when a key occurs among the MLP's neurons: linear associative memory
    (Meng et al. 2022, arXiv:2202.05262).

    Raises:
        TypeError, ValueError: Not a model with decoder layers that the package knows.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.path, self.layers = find_layers(model)

    def __len__(self) -> int:
        return len(self.layers)

    def shape(self, layer: int) -> LayerShape:
        """The shape of a layer. Raises ``ValueError`` for an index out of range or a layer of unknown shape."""
        self.check(layer)
        module = self.layers[layer]
        plan = getattr(module, "npt_plan", None)
        if plan is not None:
            return plan.shape  # type: ignore[no-any-return]
        reasons = []
        for shape in LAYER_SHAPES:
            reason = shape.mismatch(module)
            if reason is None:
                return shape
            reasons.append(reason)
        raise ValueError(f"layer {layer} cannot be edited: {'; '.join(reasons)}")

    def check(self, layer: int) -> None:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(self.layers):
            raise ValueError(
                f"layer={layer!r} is out of range: the model has {len(self.layers)} layers (0 … {len(self.layers) - 1})"
            )

    def target(self, layer: int) -> str:
        """Canonical name of the edited matrix: ``down`` or ``c_proj``."""
        return next(name for name, place in self.shape(layer).targets.items() if place.slot == "down")

    def module(self, layer: int) -> nn.Module:
        """The module that holds the edited matrix."""
        return self.shape(layer).linear(self.layers[layer], self.target(layer))

    def module_path(self, layer: int) -> str:
        """Its dotted name in the model, as PEFT and ``named_modules`` say it."""
        wanted = self.module(layer)
        return next(name for name, module in self.model.named_modules() if module is wanted)

    def size(self, layer: int) -> tuple[int, int]:
        """``(in, out)`` of the edited matrix."""
        return linear_shape(self.module(layer))

    def weight(self, layer: int) -> Tensor:
        """The matrix as ``[out, in]``: a view that may be written to."""
        return linear_weight(self.module(layer))

    def quantised(self, layer: int) -> bool:
        """Whether the stored numbers are not the weight itself, so that no small change can be added to them."""
        return weight_source(self.module(layer)) is not None

    def refuse_unless_plain(self) -> None:
        """Raise ``ValueError`` for a model that holds its weights in a way that edits cannot reach."""
        if is_sharded(self.model):
            raise ValueError("the model is sharded with fully_shard; edit it first, then shard it")
        if converted_layers(self.model):
            raise ValueError(
                "the model is converted to NPT layers, whose MLP does not run the module that an edit changes; edit the "
                "original, then convert it (or remove_npt first)"
            )
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise ValueError("the model has parameters without values (device 'meta'); load it whole before editing it")

    @contextmanager
    def reading_inputs(self, layers: list[int], read: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Inside the block every forward calls ``read(layer, k)`` with the matrix's input ``k [..., in]``."""
        handles = []
        for layer in layers:

            def hook(module: nn.Module, args: Any, layer: int = layer) -> None:
                read(layer, args[0])

            handles.append(self.module(layer).register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def changing_output(self, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside the block the matrix's output ``[..., out]`` of one layer is replaced by ``change(output)``."""
        handle = self.module(layer).register_forward_hook(lambda module, args, output: change(output))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def starting_at(self, layer: int, h: Tensor) -> Iterator[None]:
        """Inside the block the layers below ``layer`` are not computed; it gets ``h [..., d]``, which they gave to it."""
        below = list(self.layers[:layer])
        try:
            for index, module in enumerate(below):
                self.layers[index] = _Skipped(module, h)
            yield
        finally:
            for index, module in enumerate(below):
                self.layers[index] = module

    @contextmanager
    def reading_layer_outputs(self, layers: list[int], read: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Inside the block every forward calls ``read(layer, h)`` with the layer's output ``h [..., d]``."""
        handles = []
        for layer in layers:

            def hook(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                read(layer, first_output(output))

            handles.append(self.layers[layer].register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def watching_tokens(model: nn.Module, begin: Callable[[Tensor, int], None]) -> Iterator[None]:
    """Inside the block every forward first calls ``begin(ids [n, seq], past)``, ``past`` tokens being in the cache already.

    The forward raises ``ValueError`` if it was given no token ids.
    """

    def before(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise ValueError("tokens are told apart by their ids; pass input_ids, not inputs_embeds")
        cache = cache_in(kwargs)
        begin(ids, 0 if cache is None else int(cache.get_seq_length()))

    handle = decoder_of(model).register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def learned_positions(model: nn.Module) -> bool:
    """Whether a token's place is added to its embedding (GPT-2), so that the residual stream itself knows it."""
    return hasattr(decoder_of(model), "wpe")


def device_of(model: nn.Module) -> torch.device:
    """Where token ids go."""
    return next(model.parameters()).device


def vocabulary_of(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    return int(config.vocab_size)


def context_length(model: nn.Module) -> int | None:
    """Positions that the model takes, where its configuration says so."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def name_of(model: nn.Module) -> str:
    """What the model is called by whoever loaded it."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
