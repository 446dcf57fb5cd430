"""Bytes of one decoder layer at work: what autograd keeps of it, and what exists besides at its worst moments.

Every line was read off :class:`npt_kernels.measure.live_bytes.LiveBytes` on real steps and is checked against it
(``test_byte_count.py``). Letters as in the literature: T tokens of a micro-batch, d hidden size, f MLP width, R the
bottleneck's width; s bytes of a number of the residual stream, c of one in a product.
"""

from __future__ import annotations

from dataclasses import dataclass

from .model_sizes import Adapter, ModelNumbers
from .storage import Precision

__all__ = ["LayerBytes"]

_WIDE = 4  # norms, losses and softmax work in float32


@dataclass(frozen=True)
class LayerBytes:
    """Byte counts of one layer for one micro-batch.

    Attributes:
        model, adapter, precision: The run.
        sequences, length: Of the micro-batch.
    """

    model: ModelNumbers
    adapter: Adapter
    precision: Precision
    sequences: int
    length: int

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
        return self.tokens * self.model.intermediate_size * self.precision.width

    @property
    def bottleneck(self) -> int:
        """``[T, R]``: z, a key product p, the coefficients c."""
        return self.tokens * self.adapter.rank * self.precision.width

    @property
    def adapter_casts(self) -> int:
        """The layer's NP parameters in the products' dtype."""
        return self.adapter.largest * self.precision.width if self.precision.casts_adapter else 0

    @property
    def moved(self) -> int:
        """m, the change of the MLP's output to which the norm is matched (``NPTConfig.fold``)."""
        return self.narrow if self.adapter.fold and self.adapter.norm_match else 0

    @property
    def folded_weight(self) -> int:
        """``w_downᵀ W_o``, in whose place the product with W_o is not computed."""
        return self.adapter.rank * self.model.heads_width * self.precision.width if self.adapter.no_projection else 0

    @property
    def _gated(self) -> int:
        return 1 if self.model.gated else 0

    @property
    def norm_copy(self) -> int:
        """A norm works on a float32 copy of its input, unless the input is that already. LayerNorm converts within."""
        return self.wide if self.precision.stream != _WIDE and not self.model.layer_norm else 0

    def casts(self, shapes: tuple[tuple[int, int], ...]) -> int:
        """Low-precision copies of frozen weights that a call makes; a quantised weight is made dense anew instead."""
        if not self.precision.casts or self.precision.keeps_casts or self.precision.format is not None:
            return 0
        return sum(a * b for a, b in shapes) * self.precision.width

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
        rows = self.tokens * (2 * m.heads_width + 2 * m.kv_width) * width
        if m.eager_attention:
            rows += self._scores * (_WIDE + (width if width != _WIDE else 0))
            rows += 2 * self.tokens * (m.heads_width - m.kv_width) * width  # k and v repeated for every head
        return rows + self.tokens * m.num_heads * _WIDE + self.norm_copy + self.tokens * _WIDE

    @property
    def penalty(self) -> int:
        """What the vector penalty keeps of a layer: z, two ``[T, R]`` per target, Gram matrices, NP casts once per target."""
        targets = len(self.adapter.targets)
        gram = 2 * self.adapter.rank**2 * self.precision.width
        return (2 + 2 * targets) * self.bottleneck + targets * (gram + self.adapter_casts) + self.moved

    @property
    def _scores(self) -> int:
        return self.tokens * self.length * self.model.num_heads

    @property
    def _slots(self) -> set[str]:
        return set(self.adapter.slots.values())

    @property
    def _wide_gradients(self) -> int:
        """``[T, f]`` gradients of the NPT MLP in local training, where its input needs none: of the intermediate, and of gate
        and up as far as they are targets."""
        into = len(self._slots & {"gate", "up"})
        return 1 + into if into else 0

    def mlp_kept(self, through: bool = True) -> int:
        """What the NPT MLP keeps: gate, up, z, p, the attention output, 1/ρ; its input too for rules with a key.

        ``through``: whether its input needs a gradient; if not, gate and up are only kept for targets that lie before them.
        """
        a = self.narrow
        u = self.narrow if self.adapter.key != "none" and self._slots & {"gate", "up"} else 0
        wide = through or self._wide_gradients or self.adapter.key != "none"
        scale = self.tokens * (self.precision.stream + self.precision.width)
        inner = (1 + self._gated) * self.inner if wide else 0
        return inner + self.bottleneck + self._key_products + a + u + scale + self.adapter_casts

    def kept(self, first: bool) -> int:
        """By a converted layer; ``first``: below it nothing trains, so only its NP component gets a gradient."""
        down = self.casts(self.model.mlp_linears[-1:])
        if first:
            return self.mlp_kept(False) + self.moved + self.folded_weight + down
        # Autocast's second copy of the attention output: the norm keeps the one, the MLP the other.
        twice = self.narrow if self.precision.casts and self.adapter.norm_match else 0
        # The matched norm keeps h itself; a plain one the float32 copy it makes, if it makes one.
        h = self.norm_copy if self.norm_copy and not self.adapter.norm_match else self.stream
        if self.adapter.norms_sum and not self.norm_copy:
            h += self.stream  # each norm keeps its own input
        # Where the projection is left out, m is kept in the place of the attention's output.
        changed = self.folded_weight if self.adapter.no_projection else self.moved
        return h + self.attention_kept + self.mlp_kept() + changed + twice + self.casts(self.model.linears)

    @property
    def kept_unconverted(self) -> int:
        """By a layer that stays as it was but through which a gradient flows: all its norms, products and activations."""
        m = self.model
        # attention_kept has the first norm's copy; a norm that copies its input keeps the copy alone.
        norms = (self.norm_copy if self.norm_copy else 2 * self.stream) + self.tokens * _WIDE
        activation = (m.activation_copies if m.activation_copies != 2 else 1) * self.inner
        return norms + self.attention_kept + activation + self.casts(m.linears)

    # ---- moments -----------------------------------------------------------------------------------------------------

    @property
    def forward_original(self) -> int:
        """The original layer without gradient, beside its input: the sum, the normed sum, the activation."""
        normed = self.stream + (self.narrow if self.precision.casts else 0)
        mlp = self.stream + normed + self.model.activation_copies * self.inner
        m, width = self.model, self.precision.width
        attention = normed + self.tokens * (3 * m.heads_width + 2 * m.kv_width) * width
        if m.eager_attention:
            # scores and their softmax; k and v repeated for every head
            attention += self._scores * 2 * _WIDE + 2 * self.tokens * m.heads_width * width
        return max(mlp, attention) + self.largest_cast

    @property
    def forward_inference(self) -> int:
        """The converted layer without gradient, beside its input: attention output, normed input, gate, up, intermediate."""
        casts = self.casts(self.model.mlp_linears) + self.adapter_casts
        mlp = (2 + self._gated) * self.inner + 2 * self.bottleneck + self._key_products
        return max(mlp + self.stream + self.narrow + casts, self.forward_original)

    @property
    def kept_first_unconverted(self) -> int:
        """As :attr:`kept_unconverted` where the gradient begins at the attention's output."""
        return self.kept_unconverted - self.attention_kept - self.stream - self.casts(self.model.attention_linears)

    @property
    def backward_unconverted(self) -> int:
        """Beside what the layer kept: gradients of the intermediate and of its factors."""
        return (3 if self._gated else 2) * self.inner + self.stream + self.largest_cast

    @property
    def forward_converted(self) -> int:
        """The NPT MLP's forward beside h and a, its kept tensors included: normed input, casts, intermediate, output."""
        casts = self.casts(self.model.mlp_linears)
        copies = (self.wide + 2 * self.narrow) if self.precision.casts else 0  # a and u once more in both dtypes
        return self.mlp_kept() - self.narrow + self.inner + self.stream + self.narrow + copies + casts

    def backward_mlp(self, through: bool = True) -> int:
        """Beside what the layer kept: gradients of the intermediate, of up and of gate; small ones of the bottleneck.

        The NP component's own gradients come one by one: at first only that of down's values, at the end, when one ``[T, f]``
        is gone, all of them, in the products' dtype and as float32.
        """
        wide = ((2 + self._gated) if through else self._wide_gradients) * self.inner
        early = wide + self.adapter.rank * self.model.hidden_size * self.precision.width
        late = wide - (self.inner if wide else 0) + self.adapter.largest * _WIDE
        return max(early, late) + 2 * self.bottleneck + self.narrow

    @property
    def backward_attention(self) -> int:
        """Beside what the layer kept, the MLP's part of which is free by now: gradients of q, k, v and, written out, of the
        scores (of the softmax's result, of its input)."""
        m, width = self.model, self.precision.width
        rows = self.tokens * (2 * m.heads_width + 2 * m.kv_width) * width
        return rows + (self._scores * (_WIDE + width) if m.eager_attention else 0)

    @property
    def backward_norm(self) -> int:
        """Beside what the layer kept, the MLP's part of which is free by now: the matched norm's float32 tensors."""
        copies = 6 if self.precision.stream != _WIDE else 4
        if self.model.layer_norm:  # two more differences from the mean, of which conversion makes one anyway
            copies += 1 if self.precision.stream != _WIDE else 2
        return copies * self.wide
