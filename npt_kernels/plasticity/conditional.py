"""Weight changes that act only once their subject has been mentioned, token by token.

``y_t = (W + s_t Σ_j v_b[j] ⊗ v_a[j]) k_t``, ``s_t ∈ {0, 1}`` per token and fact, computed by the package's own op: rule
``diagonal``, whose coefficient is ``c_t = tanh(z_t) ⊙ (k_t v_aᵀ)``. Tokens with ``s_t = 0`` keep the output of the original
module, so they are equal to it bit for bit on every backend.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..functional import npt_factored_linear
from ..model.forward import cache_in
from .changes import LayerChange, Trigger
from .hooks import Sites, decoder_of, linear_weight

__all__ = ["Conditional", "Gate", "mentioned"]

#: tanh of it is 1 in every floating dtype.
_ON = 20.0


class Conditional(Protocol):
    """What a gate needs of an edit."""

    @property
    def layers(self) -> dict[int, LayerChange]: ...

    @property
    def triggers(self) -> tuple[Trigger, ...] | None: ...


def mentioned(ids: Tensor, trigger: Trigger) -> Tensor:
    """``[n, seq]`` bool for ``ids [n, seq]``: from the last token of the first mention on."""
    seen = torch.zeros_like(ids, dtype=torch.bool)
    for run in trigger:
        length = len(run)
        if length > ids.shape[1]:
            continue
        pattern = torch.tensor(run, dtype=ids.dtype, device=ids.device)
        seen[:, length - 1 :] |= (ids.unfold(1, length, 1) == pattern).all(-1)
    return seen.cumsum(1) > 0


class Gate:
    """All conditional edits of one model at work: watches the token ids, patches the edited modules' instances.

    With a key-value cache the ids that went before are remembered per cache, so ``generate`` works, beam search too.
    """

    def __init__(self, sites: Sites, edits: Sequence[Conditional]) -> None:
        self.edits = list(edits)
        self.triggers = tuple(trigger for edit in edits for trigger in edit.triggers or ())
        self._seen: Tensor | None = None  # [n, seq, facts] of the forward that is running
        self._ids: Tensor | None = None
        self._histories: weakref.WeakKeyDictionary[Any, list[Tensor]] = weakref.WeakKeyDictionary()
        decoder = decoder_of(sites.model)
        self._handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, always_call=True),
        ]
        self._patched: list[tuple[nn.Module, Any]] = []
        for layer in sorted({layer for edit in edits for layer in edit.layers}):
            self._patch(sites.module(layer), *_joined(edits, layer))

    def remove(self) -> None:
        """The modules as they were."""
        for handle in self._handles:
            handle.remove()
        for module, own in reversed(self._patched):
            if own is None:
                del module.forward
            else:
                module.forward = own
        self._patched.clear()

    # ---- which tokens ------------------------------------------------------------------------------------------------

    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise ValueError("a conditional edit finds its subject in the token ids; pass input_ids, not inputs_embeds")
        history, cache = ids, cache_in(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        if past:
            before = self._histories.get(cache)
            if before is None:
                raise ValueError(
                    "the key-value cache was filled before this edit was applied, so it is not known what was said; start anew"
                )
            history = torch.cat([before[0][:, :past], ids], dim=1)
        self._ids = history
        seen = torch.stack([mentioned(history, trigger) for trigger in self.triggers], dim=-1)
        self._seen = seen[:, history.shape[1] - ids.shape[1] :]

    def _after(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        cache = cache_in(output)
        if cache is not None and self._ids is not None:
            self._remember(cache, self._ids)
        self._seen = self._ids = None

    def _remember(self, cache: Any, ids: Tensor) -> None:
        held = self._histories.get(cache)
        if held is not None:
            held[0] = ids
            return
        held = self._histories[cache] = [ids]
        reorder = getattr(cache, "reorder_cache", None)
        if reorder is not None:  # beam search: rows change places, and so must what was said in them

            def reordered(beams: Tensor) -> Any:
                held[0] = held[0].index_select(0, beams.to(held[0].device))
                return reorder(beams)

            cache.reorder_cache = reordered

    # ---- what they get -----------------------------------------------------------------------------------------------

    def _patch(self, module: nn.Module, v_a: Tensor, v_b: Tensor, group: Tensor) -> None:
        own = module.__dict__.get("forward")
        original = module.forward

        def forward(x: Tensor) -> Tensor:
            y: Tensor = original(x)
            if self._seen is None:
                return y
            if self._seen.shape[:-1] != x.shape[:-1]:
                raise RuntimeError(
                    f"the edited module got {list(x.shape[:-1])} tokens where the model got {list(self._seen.shape[:-1])} ids; "
                    "a conditional edit needs the MLP to see all tokens in their order"
                )
            seen = self._seen.to(x.device)
            rows = seen.any(-1)
            if not bool(rows.any()):
                return y
            weight = linear_weight(module, x.dtype)
            z = seen[rows][:, group.to(x.device)].to(weight.dtype) * _ON
            key, value = (v.to(x.device, weight.dtype) for v in (v_a, v_b))
            bias = getattr(module, "bias", None)
            changed = npt_factored_linear(x[rows].to(weight.dtype), z, weight, key, value, bias, rule="diagonal")
            return y.index_put((rows,), changed.to(y.dtype))

        module.forward = forward
        self._patched.append((module, own))


def _joined(edits: Sequence[Conditional], layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(v_a, v_b, group)`` of a layer, all edits' terms below one another; groups count through all edits' triggers."""
    keys, values, groups, offset = [], [], [], 0
    for edit in edits:
        if layer in edit.layers:
            change = edit.layers[layer]
            keys.append(change.v_a)
            values.append(change.v_b)
            groups.append(change.group + offset)
        offset += len(edit.triggers or ())
    return torch.cat(keys), torch.cat(values), torch.cat(groups)
