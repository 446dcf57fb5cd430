"""Bytes of one decoder layer at work: what autograd keeps of it, and what exists besides at its worst moments.

Every line was read off :class:`npt_kernels.live_bytes.LiveBytes` on real steps and is checked against it
(``tests/planning/test_memory.py``). Letters as in the literature: T tokens of a micro-batch, d hidden size, f MLP width, R the
bottleneck's width; s bytes of a number of the residual stream, c of one in a product.
"""

from __future__ import annotations

from dataclasses import dataclass

from .numbers import Adapter, ModelNumbers
from .storage import Precision

__all__ = ["LayerBytes"]

_WIDE = 4  # norms, losses and softmax work in float32


@dataclass(frozen=True)
class LayerBytes:
    """Byte counts of one layer for one micro-batch.

    Attributes:
        model, adapter, precision: The run.
        sequences, length: Of the micro-batch.
        tensor: Degree of tensor parallelism: heads and f are divided by it, d-wide tensors are not.
    """

    model: ModelNumbers
    adapter: Adapter
    precision: Precision
    sequences: int
    length: int
    tensor: int = 1

    # ---- pieces ------------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def stream(self) -> int:
        """``[T, d]`` of the residual stream."""
        return self.tokens * self.model.hidden_size * self.precision.stream

    @property
    def narrow(self) -> int:
        """``[T, d]`` in a product's dtype."""
        return self.tokens * self.model.hidden_size * self.precision.width

    @property
    def wide(self) -> int:
        """``[T, d]`` in float32."""
        return self.tokens * self.model.hidden_size * _WIDE

    @property
    def inner(self) -> int:
        """``[T, f]`` in a product's dtype: gate, up, what the activation returns."""
        return self.tokens * self.model.intermediate_size // self.tensor * self.precision.width

    @property
    def bottleneck(self) -> int:
        """``[T, R]``: z, a key product p, the coefficients c."""
        return self.tokens * self.adapter.rank * self.precision.width

    @property
    def adapter_casts(self) -> int:
        """The layer's NP parameters in the products' dtype."""
        return self.adapter.largest * self.precision.width if self.precision.casts_adapter else 0

    @property
    def _gated(self) -> int:
        return 1 if self.model.gated else 0

    @property
    def norm_copy(self) -> int:
        """A norm works on a float32 copy of its input, unless the input is that already. LayerNorm converts within."""
        return self.wide if self.precision.stream != _WIDE and not self.model.layer_norm else 0

    def casts(self, shapes: tuple[tuple[int, int], ...]) -> int:
        """Low-precision copies of frozen weights under autocast."""
        return sum(a * b for a, b in shapes) // self.tensor * self.precision.width if self.precision.casts else 0

    @property
    def largest_cast(self) -> int:
        """Of the linear at work, where nothing is kept for a backward pass."""
        return max(self.casts((shape,)) for shape in self.model.linears)

    @property
    def _key_products(self) -> int:
        """p of every target."""
        targets = len(self.adapter.targets)
        width = {"matrix": self.bottleneck, "vector": self.tokens * self.precision.width, "none": 0}
        return targets * width[self.adapter.key]

    # ---- kept for the backward pass ----------------------------------------------------------------------------------

    @property
    def attention_kept(self) -> int:
        """q, k, v and what attention returns, the log-sum-exp of every row; the norm's float32 input and its scale."""
        m, width = self.model, self.precision.width
        rows = self.tokens * (2 * m.heads_width + 2 * m.kv_width) * width // self.tensor
        if m.eager_attention:
            rows += self._scores * (_WIDE + (width if width != _WIDE else 0))
            rows += 2 * self.tokens * (m.heads_width - m.kv_width) * width  # k and v repeated for every head
        return rows + self.tokens * m.num_heads * _WIDE // self.tensor + self.norm_copy + self.tokens * _WIDE

    @property
    def _scores(self) -> int:
        return self.tokens * self.length * self.model.num_heads // self.tensor

    @property
    def mlp_kept(self) -> int:
        """What the NPT MLP keeps: gate, up, z, p, the attention output, 1/ρ; its input too for rules with a key."""
        a = self.narrow
        u = self.narrow if self.adapter.key != "none" else 0
        scale = self.tokens * (self.precision.stream + self.precision.width)
        return (1 + self._gated) * self.inner + self.bottleneck + self._key_products + a + u + scale + self.adapter_casts

    def kept(self, first: bool) -> int:
        """By a converted layer; ``first``: below it nothing trains, so only its NP component gets a gradient."""
        down = self.casts(self.model.mlp_linears[-1:])
        if first:
            return self.mlp_kept + down
        # Autocast's second copy of the attention output: the norm keeps the one, the MLP the other.
        twice = self.narrow if self.precision.casts else 0
        return self.stream + self.attention_kept + self.mlp_kept + twice + self.casts(self.model.linears)

    @property
    def kept_unconverted(self) -> int:
        """By a layer that stays as it was but through which a gradient flows: all its norms, products and activations."""
        m = self.model
        norms = 2 * self.stream + self.norm_copy + 2 * self.tokens * _WIDE
        activation = (m.activation_copies if m.activation_copies != 2 else 1) * self.inner
        return norms + self.attention_kept + activation + self.casts(m.linears)

    # ---- moments -----------------------------------------------------------------------------------------------------

    @property
    def forward_original(self) -> int:
        """The original layer without gradient, beside its input: the sum, the normed sum, the activation."""
        normed = self.stream + (self.narrow if self.precision.casts else 0)
        mlp = self.stream + normed + self.model.activation_copies * self.inner
        m, width = self.model, self.precision.width
        attention = normed + self.tokens * (3 * m.heads_width + 2 * m.kv_width) * width // self.tensor
        if m.eager_attention:
            attention += self._scores * (2 * _WIDE + width)
        return max(mlp, attention) + self.largest_cast

    @property
    def forward_converted(self) -> int:
        """The NPT MLP's forward beside h and a, its kept tensors included: normed input, casts, intermediate, output."""
        casts = self.casts(self.model.mlp_linears)
        copies = (self.wide + 2 * self.narrow) if self.precision.casts else 0  # a and u once more in both dtypes
        return self.mlp_kept - self.narrow + self.inner + self.stream + self.narrow + copies + casts

    @property
    def backward_mlp(self) -> int:
        """Beside what the layer kept: gradients of the intermediate, of up and of gate; small ones of the bottleneck."""
        grads = 4 * self.bottleneck + self.adapter_grads
        return (2 + self._gated) * self.inner + self.narrow + grads

    @property
    def adapter_grads(self) -> int:
        """Gradients of the layer's NP parameters in the products' dtype before they become float32."""
        return self.adapter_casts

    @property
    def backward_norm(self) -> int:
        """Beside what the layer kept, the MLP's part of which is free by now: the matched norm's float32 tensors."""
        return (6 if self.precision.stream != _WIDE else 4) * self.wide
