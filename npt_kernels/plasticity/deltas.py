"""Weight changes of one run, kept and put into another: what a context did to the MLPs, without the context.

A layer's weight change ``ΔW_t`` of a token is a function of the token's attention output ``a_t``. In a converted layer it goes
through the bottleneck, ``z_t = a_t @ w_down``; at full rank that loses nothing, and ``h + MLP_Δ(u; a)`` equals
``h + a + MLP(norm(h + a))``, the layer that was not converted. So both kinds of layer are met at one place, the output of their
attention module: :func:`capture` reads it, :func:`replay` replaces it. Everything behind it is the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import Sites, converted_layers, first_output, watching_tokens

__all__ = ["Deltas", "capture", "replay"]


@dataclass(eq=False)
class Deltas:
    """What attention gave to the MLPs of a run. Filled by :func:`capture`; of several runs in its block, the last.

    Attributes:
        attention: Layer → ``a [n, tokens, d]``, in the model's dtype, on the layer's device.
        ids: Token ids ``[n, tokens]``; a token that was generated but never read by the model is not there.
        prompt: How many of them came in the first forward.
    """

    attention: dict[int, Tensor] = field(default_factory=dict)
    ids: Tensor | None = None
    prompt: int = 0

    def __len__(self) -> int:
        return 0 if self.ids is None else self.ids.shape[1]

    def bottleneck(self, model: nn.Module) -> dict[int, Tensor]:
        """Layer → ``z [n, tokens, R] = a @ w_down`` of the layers that are converted in ``model``."""
        layers = converted_layers(model)
        return {layer: layers[layer].np_component(a) for layer, a in self.attention.items() if layer in layers}


@contextmanager
def capture(model: nn.Module, layers: Sequence[int] | None = None) -> Iterator[Deltas]:
    """Inside the block the deltas of a run are recorded, token by token through ``generate`` too.

    Args:
        model: Causal language model, converted or not.
        layers: Which; default: all.

    Yields:
        :class:`Deltas`, complete after each forward.

    Raises:
        ValueError: A layer out of range or of unknown shape; a forward without ``input_ids``.
    """
    sites = Sites(model)
    chosen = _chosen(sites, layers)
    found = Deltas()

    def begin(ids: Tensor, past: int) -> None:
        if past > len(found):
            raise ValueError("the key-value cache was filled before capture() began; start the run inside its block")
        if not past:
            found.prompt, found.ids = ids.shape[1], ids.clone()
            found.attention.clear()
            return
        assert found.ids is not None
        found.ids = torch.cat([found.ids[:, :past], ids.to(found.ids)], 1)
        for layer, a in found.attention.items():
            found.attention[layer] = a[:, :past]

    def read(layer: int, output: Any) -> None:
        a = first_output(output).detach()
        before = found.attention.get(layer)
        found.attention[layer] = a if before is None else torch.cat([before, a], 1)

    with _attention_hooks(sites, chosen, read, begin):
        yield found


@contextmanager
def replay(
    model: nn.Module,
    deltas: Deltas,
    *,
    layers: Sequence[int] | None = None,
    tokens: str | Sequence[int] = "all",
    where: Mapping[int, Tensor] | None = None,
) -> Iterator[None]:
    """Inside the block the tokens of a run get the deltas that another run's tokens had.

    Runs are laid end to end: the last token of the first forward gets what the last token of the captured run's first forward
    had, and so on to the left; tokens that are generated go on from there. Nothing is replayed where the captured run has
    no token.

    Args:
        model: The model that the deltas are of.
        deltas: Of one sequence, which then serves every row, or of as many as there are rows.
        layers: Which; default: all that were captured.
        tokens: ``"all"``: those that the two runs' texts have in common at the end of the prompt, and on from there as long as
            both write the same. ``"last"``: the last of the prompt, and on. A list of indices: these tokens of the first
            forward, negative from its end, *whatever they are*: one prompt's deltas put into another.
        where: Layer → bool ``[n, tokens of the first forward]``: exactly these, in place of ``layers`` and ``tokens``.

    Raises:
        ValueError: Deltas that are empty or of another model, a layer or a token that is not there.
    """
    sites = Sites(model)
    if deltas.ids is None or not deltas.attention:
        raise ValueError("the deltas are empty; run the model inside capture() first")
    if isinstance(tokens, str) and tokens not in ("all", "last"):
        raise ValueError(f"tokens={tokens!r} is not known; use 'all', 'last' or a list of indices")
    chosen = _chosen(sites, where if where is not None else sorted(deltas.attention) if layers is None else layers)
    for layer in chosen:
        if layer not in deltas.attention:
            raise ValueError(f"layer {layer} was not captured; the deltas have {sorted(deltas.attention)}")
    run = _Run(deltas, tokens, where)

    def change(layer: int, output: Any) -> Any:
        a = first_output(output)
        new = run.replaced(layer, a)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with _attention_hooks(sites, chosen, change, run.begin):
        yield


class _Run:
    """The run that gets the deltas: where it is, and which of its tokens have a counterpart."""

    def __init__(self, deltas: Deltas, tokens: str | Sequence[int], where: Mapping[int, Tensor] | None) -> None:
        self.deltas, self.tokens, self.where = deltas, tokens, where
        self.offset = self.prompt = self.past = 0
        self.alike: Tensor | None = None  # [n]: rows whose generated text is the captured one so far
        self.mask: Tensor | None = None  # [n, tokens of the forward]

    def begin(self, ids: Tensor, past: int) -> None:
        donor = self.deltas.ids
        assert donor is not None
        if len(donor) not in (1, len(ids)):
            raise ValueError(f"the deltas are of {len(donor)} sequences, this run has {len(ids)}; give one, or as many")
        count = ids.shape[1]
        self.past = past
        if not past:
            self.offset, self.prompt = self.deltas.prompt - count, count
        elif not self.prompt:
            raise ValueError("the key-value cache was filled before replay() began; start the run inside its block")
        theirs = torch.arange(past, past + count, device=ids.device) + self.offset
        there = (theirs >= 0) & (theirs < donor.shape[1])
        same = there & (donor.to(ids.device)[:, theirs.clamp(0, donor.shape[1] - 1)] == ids)
        if past:
            # "all" and "last" go on while both runs have written the same.
            assert self.alike is not None
            same = same & self.alike.unsqueeze(1) & (same.long().cumprod(1) > 0)
            self.alike = same[:, -1]
            self.mask = same if isinstance(self.tokens, str) else torch.zeros_like(same)
            return
        self.alike = same[:, -1]
        if self.tokens == "all":
            self.mask = same.flip(1).long().cumprod(1).flip(1) > 0
        else:
            indices = [-1] if isinstance(self.tokens, str) else list(self.tokens)
            self.mask = torch.zeros_like(same)
            for index in indices:
                if isinstance(index, bool) or not isinstance(index, int) or not -count <= index < count:
                    raise ValueError(f"token {index!r} is out of range: the first forward has {count} tokens")
                if not bool(there[index]):
                    raise ValueError(f"the captured run has no token to lay beside token {index} of this one")
                self.mask[:, index] = True

    def replaced(self, layer: int, a: Tensor) -> Tensor:
        mask = self.mask
        if self.where is not None:
            mask = self.where[layer] if not self.past else None
        if mask is None or not bool(mask.any()):
            return a
        start, donor = self.past + self.offset, self.deltas.attention[layer]
        if donor.shape[-1] != a.shape[-1]:
            raise ValueError(
                f"the deltas of layer {layer} have width {donor.shape[-1]}, the model's {a.shape[-1]}; other model"
            )
        index = torch.arange(start, start + a.shape[1], device=donor.device).clamp(0, donor.shape[1] - 1)
        return torch.where(mask.unsqueeze(-1).to(a.device), donor[:, index].to(a), a)


def _chosen(sites: Sites, layers: Sequence[int] | Mapping[int, Any] | None) -> list[int]:
    chosen = list(range(len(sites)) if layers is None else layers)
    for layer in chosen:
        sites.shape(layer)
    if not chosen:
        raise ValueError("no layer is chosen; name at least one")
    return chosen


@contextmanager
def _attention_hooks(
    sites: Sites, layers: list[int], see: Callable[[int, Any], Any], begin: Callable[[Tensor, int], None]
) -> Iterator[None]:
    """``begin(ids, past)`` before every forward, ``see(layer, output)`` behind every attention; what it returns replaces."""
    with ExitStack() as stack:
        stack.enter_context(watching_tokens(sites.model, begin))
        for layer in layers:
            module = sites.shape(layer).attention_module(sites.layers[layer])
            handle = module.register_forward_hook(lambda module, args, output, layer=layer: see(layer, output))
            stack.callback(handle.remove)
        yield
