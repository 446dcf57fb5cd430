"""Which earlier tokens a token's attention output came from, and so its weight change.

Attention's output is a sum over tokens, ``a_t = Σ_s Σ_h α_h,ts W_o,h v_h,s (+ bias)``, so token ``s`` has the share
``⟨Σ_h α_h,ts W_o,h v_h,s , a_t⟩/‖a_t‖²`` of it; the shares of a token sum to 1 (without bias). Weights alone mislead: most of
them fall on the first token, whose values are small (Kobayashi et al. 2020, arXiv:2004.10102). Where the projections have other
names than those here, or the sum is not what the module returned, the mean weight over heads is all there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import first_output, linear_bias, linear_weight

__all__ = ["SourceTap", "eager_attention"]

_VALUES, _FUSED, _OUTPUTS = ("v_proj",), ("c_attn",), ("o_proj", "out_proj", "c_proj", "dense")
#: Relative difference of the sum from the module's output in bf16; another layout of the heads is off by its own size.
_TOLERANCE = 0.05


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Inside the block attention modules return their weights, if the model can; afterwards it computes as before."""
    switch = getattr(model, "set_attn_implementation", None)
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if switch is None or before in (None, "eager"):
        yield
        return
    try:
        switch("eager")
    except (ValueError, ImportError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        switch(before)


class SourceTap:
    """Hooks on one decoder layer. After its forward :meth:`take` says where attention's output came from."""

    def __init__(self, layer: nn.Module) -> None:
        self.weights: Tensor | None = None  # [heads, T, T]
        self.module: nn.Module | None = None
        self.output: Tensor | None = None  # [T, d]
        self.values: dict[str, Tensor] = {}
        self._handles = [child.register_forward_hook(self._see) for child in layer.children()]
        for child in layer.children():
            for name, module in child.named_children():
                if name in _VALUES + _FUSED:
                    self._handles.append(
                        module.register_forward_hook(lambda _, args, out, name=name: self.values.update({name: out[0]}))
                    )

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor) and output[1].dim() == 4:
            self.module, self.output, self.weights = module, first_output(output)[0].detach(), output[1][0].detach()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> tuple[Tensor | None, bool]:
        """``(share [T, T], exact)``: of token s in the output of token t, and whether by values or by weights alone."""
        weights, output, module, values = self.weights, self.output, self.module, self.values
        self.weights = self.output = self.module = None
        self.values = {}
        if weights is None or output is None or module is None:
            return None, False
        found = _shares(module, weights.float(), output.float(), values)
        return (weights.float().mean(0), False) if found is None else (found, True)


def _shares(module: nn.Module, weights: Tensor, output: Tensor, values: dict[str, Tensor]) -> Tensor | None:
    children = dict(module.named_children())
    out = next((children[name] for name in _OUTPUTS if name in children), None)
    if out is None or not values or len(weights) == 0:
        return None
    weight = linear_weight(out).detach().float()
    width, heads = weight.shape[1], len(weights)
    name, v = next(iter(values.items()))
    v = v.detach().float()
    if name in _FUSED:
        v = v[..., 2 * v.shape[-1] // 3 :]
    size = width // heads
    if width % heads or v.shape[-1] % size or heads % (v.shape[-1] // size):
        return None
    v = v.unflatten(-1, (-1, size)).transpose(0, 1)  # [key heads, T, size]
    v = v.repeat_interleave(heads // len(v), 0)
    rebuilt = (weights @ v).transpose(0, 1).flatten(1) @ weight.t()
    bias = linear_bias(out)
    if bias is not None:
        rebuilt = rebuilt + bias.detach().float()
    if not bool((rebuilt - output).norm() <= _TOLERANCE * output.norm()):
        return None
    along = (output @ weight).unflatten(-1, (heads, size)).transpose(0, 1)  # [heads, T, size]
    share = torch.zeros(weights.shape[1:], device=weights.device)
    for head in range(heads):
        share += weights[head] * (along[head] @ v[head].t())
    return share / output.square().sum(-1, keepdim=True).clamp_min(1e-30)
