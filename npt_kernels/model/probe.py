"""Does a layer compute what its shape says? Run on a few tokens before anything is changed.

Layers are recognised by the names of their children, which say nothing of their forward: multipliers on the residual, dropout
between attention and residual, a norm inside the MLP, a tuple as the result. So the layer's own forward is compared with the
shape's ``h + a + MLP(norm(h + a))``, with the arguments that the model itself passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..component import NPComponent
from ..quantised.foreign import made_by_library
from ..thread_locks import ThreadLock
from .fold import NPTOutputProjection, heads_output
from .forward import decoder_of, evaluating
from .layer import LayerPlan, is_converted, teacher_output
from .mlp import Change, changed_mlp, mlp_input, plain_forward
from .select import LayerChoice, find_layers
from .swap import restore_class, swap_class
from .visits import LayerCall, record_calls, tapped_outputs
from .weight_location import compute_device, resident

__all__ = ["check_forwards"]

#: Rows × tokens of the probe. Few: a layer of Llama-3.1-8B reads its 440 MB of weights for them, whatever their number.
_ROWS, _TOKENS = 2, 5
#: Largest tensors that are perturbed: what could hide behind a fresh 1 or 0 is a vector (norm weights, biases, layer scales).
_SMALL = 2**20
#: Probes take turns: they set modes and weights of a model and the random numbers of the process.
_one_at_a_time = ThreadLock()


@torch.no_grad()
def check_forwards(model: nn.Module, choices: Sequence[LayerChoice]) -> list[LayerChoice]:
    """Raise ``ValueError`` for the first layer whose own forward is not what its shape describes. The model is left as it was.

    Returns the choices with what was found out of their output projections: one that is not the last thing that the attention
    computes, or was not tried, is not left out.

    Layers of one class with equal settings are tried once. Not tried: models whose layers get no token ids (a decoder that is
    called with embeddings alone), and layers that are converted already, but for a projection that is to be left out now and was
    not. Vectors are perturbed for the time of the probe, so that a fresh weight of 1 or bias of 0 hides nothing; so is the mode
    (evaluation; training with equal random numbers, where there is dropout). Random numbers outside go on as if nothing had been
    drawn.
    """
    first_of: dict[Any, LayerChoice] = {}
    for choice in choices:
        if not is_converted(choice.layer) or _to_be_folded(choice):
            first_of.setdefault(_kind(choice), choice)
    # Kind → (the projection that can be left out, whether in training too).
    folds: dict[Any, tuple[str | None, bool]] = {}
    tuples: set[Any] = set()
    device = compute_device(choices[0].layer)
    # Without autocast: it rounds parts of a float32 sum to bf16, and the layer may add them up in another order.
    with (
        _one_at_a_time, _random_numbers_restored(device), evaluating(model), torch.autocast(device.type, enabled=False)
    ):  # fmt: skip
        calls = (_calls(model) if first_of else None) or {}
        for kind, choice in first_of.items() if calls else ():
            h, call = calls[choice.plan.index]
            reason, in_tuple = (None, False) if is_converted(choice.layer) else _mismatch(choice, h, call)
            if in_tuple:
                tuples.add(kind)
            if reason is not None:
                raise ValueError(f"layer {choice.plan.index} cannot be converted: {reason}")
            folds[kind] = _folding(choice, h, call)
    return [_with_findings(choice, folds, tuples) for choice in choices]


def _to_be_folded(choice: LayerChoice) -> bool:
    """Whether a converted layer whose projection is called is to be converted anew without it."""
    return is_converted(choice.layer) and choice.plan.fold and not choice.layer.npt_plan.fold  # type: ignore[union-attr]


def _with_findings(choice: LayerChoice, folds: dict[Any, tuple[str | None, bool]], tuples: set[Any]) -> LayerChoice:
    plan = choice.plan
    returns_tuple = choice.layer.npt_plan.returns_tuple if is_converted(choice.layer) else _kind(choice) in tuples  # type: ignore[union-attr]
    if is_converted(choice.layer) and not _to_be_folded(choice):
        known: LayerPlan = choice.layer.npt_plan  # type: ignore[assignment]
        found = (known.projection, known.folds_in_training)
    else:
        found = folds.get(_kind(choice), (None, False))
    projection, in_training = found if plan.fold else (None, False)
    plan = replace(plan, projection=projection, folds_in_training=in_training, returns_tuple=bool(returns_tuple))
    return replace(choice, plan=plan)


def _folding(choice: LayerChoice, h: Tensor, call: LayerCall) -> tuple[str | None, bool]:
    """The output projection, if the attention's output is its result and nothing else, and whether it is so in training."""
    layer, plan = choice.layer, choice.plan
    projection = None if plan.projection is None else getattr(plan.shape.attention_module(layer), plan.projection)
    if projection is None or made_by_library(projection) or not plain_forward(projection):
        return None, False
    h = h.to(compute_device(layer))

    def last(training: bool) -> bool:
        layer.train(training)
        with _own_numbers(training):
            a = plan.shape.attention(layer, h, *call.args, **dict(call.kwargs))
        try:
            with _own_numbers(training):
                o = heads_output(layer, plan, projection, h, *call.args, **dict(call.kwargs))
                again = projection(o)
        except (
            TypeError,
            ValueError,
            RuntimeError,
            AttributeError,
        ):  # heads of another width than the code behind expects
            return False
        return a.shape == again.shape and bool(torch.allclose(a, again, rtol=0, atol=16 * torch.finfo(a.dtype).eps))

    with resident(layer), _perturbed(layer):
        swap_class(projection, NPTOutputProjection)
        try:
            return (plan.projection, last(True)) if last(False) else (None, False)
        finally:
            restore_class(projection)
            layer.train(False)


def _kind(choice: LayerChoice) -> tuple[Any, ...]:
    """Layers that compute the same way: class, and every plain attribute but its number."""
    layer = choice.layer
    settings = []
    for path, module in layer.named_modules():
        plain = {
            name: value
            for name, value in module.__dict__.items()
            if isinstance(value, int | float | str | bool)
            and "idx" not in name
            and "index" not in name
            and name != "training"
        }
        settings.append((path, type(module), tuple(sorted(plain.items(), key=lambda item: item[0]))))
    return type(layer), choice.plan.shape.name, tuple(settings)


def _calls(model: nn.Module) -> dict[int, tuple[Tensor, LayerCall]] | None:
    """Index → hidden states of the right shape and what the model passes beside them; ``None`` if it takes no token ids."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is None or getattr(embedding, "weight", None) is None:
        return None
    weight = embedding.weight
    ids = torch.arange(_ROWS * _TOKENS, device=weight.device).remainder(max(1, weight.shape[0])).reshape(_ROWS, _TOKENS)
    try:
        recorded = record_calls(model, [ids])
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot run with layers that return hidden states [batch, seq, d], alone or first of a pair "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]})"
        ) from error
    # A model that does something between its layers is run as it is, all of it.
    found = _calls_of_a_run(model, ids) if recorded is None else [(recorded[0][0], call) for call in recorded[0][1]]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(found[0][0].shape, generator=generator)
    # Of the size of a residual stream after some layers, whatever the embeddings are.
    return {index: (noise.to(hidden.device, hidden.dtype), call) for index, (hidden, call) in enumerate(found)}


def _calls_of_a_run(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, LayerCall]]:
    found: dict[int, tuple[Tensor, LayerCall]] = {}
    _, layers = find_layers(model)

    def see(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        found[index] = (hidden, LayerCall(rest, kwargs))

    handles = [
        layer.register_forward_pre_hook(lambda _, args, kwargs, i=i: see(i, args, kwargs), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    try:
        decoder_of(model)(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [found[index] for index in sorted(found)]


def _mismatch(choice: LayerChoice, h: Tensor, call: LayerCall) -> tuple[str | None, bool]:
    """Why the layer is not what its shape says, or ``None``; and whether its hidden states are the first of a pair."""
    layer, shape = choice.layer, choice.plan.shape
    device = compute_device(layer)
    h = h.to(device)
    attention: list[Tensor] = []
    pairs: list[bool] = []

    def run(training: bool) -> str | None:
        layer.train(training)
        attention.clear()
        seen = tapped_outputs([shape.attention_module(layer)], lambda _, a: attention.append(a))
        with _own_numbers(training), seen:
            own = layer(h, *call.args, **call.kwargs)
        if isinstance(own, tuple) and len(own) == 2 and isinstance(own[0], Tensor) and _weights_or_none(own[1], own[0]):
            pairs.append(True)
            own = own[0]
        if not isinstance(own, Tensor):
            return f"its forward returns a {type(own).__name__}, not hidden states [batch, seq, d]"
        if len(attention) != 1:
            return f"its forward calls the attention {len(attention)} times"
        with _own_numbers(training):
            try:
                a = shape.attention(layer, h, *call.args, **dict(call.kwargs))
            except (TypeError, ValueError, RuntimeError, AttributeError) as error:
                why = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
                return f"its attention is called in another way ({why})"
            described = teacher_output(layer, shape, h, a)
        if own.shape != described.shape:
            return f"its forward returns {list(own.shape)} for hidden states {list(h.shape)}"
        difference = float((own.float() - described.float()).abs().max())
        size = float(own.float().abs().max())
        if not difference <= 16 * torch.finfo(own.dtype).eps * max(size, 1e-6):
            mode = "with dropout on" if training else "its forward"
            return (
                f"{mode} is not h + a + MLP(norm(h + a)) (relative difference {difference / max(size, 1e-30):.2g}): "
                f"{type(layer).__name__} does more than a {shape.name} layer"
            )
        return None

    with resident(layer), _perturbed(layer):
        reason = run(False) or _mlp_mismatch(choice, h)
        if reason is None and any(isinstance(m, nn.Dropout) and m.p for m in layer.modules()):
            reason = run(True)
        layer.train(False)
    return reason, bool(pairs)


def _weights_or_none(second: Any, hidden: Tensor) -> bool:
    """Whether it is nothing, or attention weights ``[batch, heads, seq, seq]``, which a model only reports."""
    if second is None:
        return True
    return isinstance(second, Tensor) and second.dim() == 4 and second.shape[2:] == (hidden.shape[1],) * 2


class _OwnNumbers(TorchDispatchMode):
    """In this thread, what draws random numbers draws them from a generator of its own, the same each time.

    The process's generator is everybody's: where another thread draws from it, two runs under one seed are no longer alike, and
    layers with dropout were refused. A GPU's fused dropout takes no generator, so there the seed is all that is left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        takes = any(argument.name == "generator" and argument.kwarg_only for argument in func._schema.arguments)
        if takes and kwargs.get("generator") is None and args and isinstance(args[0], Tensor):
            device = args[0].device
            if device not in self.generators:
                self.generators[device] = torch.Generator(device).manual_seed(1)
            kwargs["generator"] = self.generators[device]
        return func(*args, **kwargs)


@contextmanager
def _own_numbers(training: bool) -> Iterator[None]:
    """Inside the block the same random numbers each time, if there can be any."""
    if not training:
        yield
        return
    torch.manual_seed(1)
    with _OwnNumbers():
        yield


def _mlp_mismatch(choice: LayerChoice, h: Tensor) -> str | None:
    """Why the op with a change of zero is not the layer's own norm and MLP, or ``None``."""
    layer, plan = choice.layer, choice.plan
    nothing = NPComponent(choice.hidden_size, choice.targets, rank=1, device=h.device)
    own = plan.shape.norm(layer)(h)
    u, _ = mlp_input(layer, plan, h, torch.zeros_like(h), "eager")
    pairs = [(f"norm {type(plan.shape.norm(layer)).__name__}", u, own)]
    mlp = plan.shape.mlp(layer)
    if any(made_by_library(plan.shape.called(layer, target)[0]) for target in plan.shape.targets):
        return None  # a library's own product rounds the activations too, ours does not
    pairs.append(
        (
            f"{type(mlp).__name__}",
            changed_mlp(Change(layer, plan, nothing, torch.zeros_like(h), None, "eager"), own),
            plan.shape.mlp_output(layer, own),
        )
    )
    for name, ours, theirs in pairs:
        if not isinstance(theirs, Tensor) or ours.shape != theirs.shape:
            return f"its {name} returns something else than hidden states"
        size = float(theirs.float().abs().max())
        difference = float((ours.float() - theirs.float()).abs().max())
        # float32 at best: norms compute in it whatever they are given.
        eps = max(torch.finfo(theirs.dtype).eps, torch.finfo(torch.float32).eps)
        if not difference <= 64 * eps * max(size, 1e-6):
            relative = difference / max(size, 1e-30)
            return f"its {name} does more than a {plan.shape.name} layer's (relative difference {relative:.2g})"
    return None


@contextmanager
def _perturbed(layer: nn.Module) -> Iterator[None]:
    """Inside the block every small floating vector of the layer is another; afterwards it has the bits that it had."""
    small = [
        tensor
        for tensor in (*layer.parameters(), *layer.buffers())
        if tensor.dim() <= 1
        and tensor.is_floating_point()
        and 0 < tensor.numel() <= _SMALL
        and type(tensor) in (Tensor, nn.Parameter)
    ]
    saved = [tensor.detach().clone() for tensor in small]
    generator = torch.Generator().manual_seed(2)
    try:
        for tensor in small:
            noise = torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
            tensor.add_(noise.mul_(0.25).add_(0.1))
        yield
    finally:
        for tensor, before in zip(small, saved, strict=True):
            tensor.copy_(before)


@contextmanager
def _random_numbers_restored(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
