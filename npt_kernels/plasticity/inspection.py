"""What attention changed in the MLPs of one run, by layer and token: how much, in which neurons, and from which tokens.

A layer's weight change is met as in :mod:`.deltas`: a converted layer computes it through its bottleneck, a layer that was not
converted is one of full rank. With ``u = norm(h)``, the MLP's input if attention had said nothing, and ``y`` its
pre-activations (gate and up) as they are:

    size    ‖ΔW_t‖_F ÷ ‖W‖_F       of gate and up together; full rank: ΔW_t = (y − W u) ⊗ u/‖u‖²
    share   ⟨y − W u, y⟩ ÷ ‖y‖²     what ΔW_t adds along y; W u adds the rest, so the two sum to 1
    output  the same of what the layer adds to the residual stream, ΔW_t of the last matrix
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..config import resolve_layers
from ..evaluation.fidelity import changed_linear, delta_norms
from .facts import encode, require_tokenizer, start_ids
from .hooks import Sites, converted_layers, device_of, evaluating, first_output, linear_weight, name_of
from .recall import fits
from .sources import SourceTap, eager_attention
from .token_maps import GridMap, draw_maps, write_json, write_page

__all__ = ["HEADINGS", "Inspected", "Neuron", "inspect", "table", "write_inspection"]

#: Tokens at most: a page of more is slow to draw, and nobody reads a grid that wide.
MAX_TOKENS = 400
#: Neurons and source tokens kept of every layer and token.
_NEURONS, _SOURCES = 4, 5
#: Source tokens with a smaller share are left out.
_SMALLEST = 0.02


@dataclass(frozen=True)
class Neuron:
    """One neuron of an MLP at one token: its activation (the last matrix' input) without the weight change and with it."""

    index: int
    without: float
    with_change: float


@dataclass(frozen=True, eq=False)
class Inspected:
    """What :func:`inspect` returns. Tensors are ``[layers, tokens]`` float32 on the CPU.

    Attributes:
        tokens: Texts of the tokens, the start token among them.
        layers: Which layers the rows are.
        size, share, output: See the module.
        norms: Target (``gate`` …) → ``‖ΔW_t‖_F``.
        neurons: ``[layers][tokens]``: those whose change moves the MLP's output most, largest first.
        sources: ``[layers][tokens]``: ``(token, share of the attention output)``, largest first; empty where the model gives
            no attention weights.
        by_values: Whether shares come from attention's values (they sum to 1), not from its weights alone.
        report: All of it as plain JSON types.
    """

    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    size: Tensor
    share: Tensor
    output: Tensor
    norms: dict[str, Tensor]
    neurons: tuple[tuple[tuple[Neuron, ...], ...], ...]
    sources: tuple[tuple[tuple[tuple[int, float], ...], ...], ...]
    by_values: bool
    report: dict[str, Any]


@torch.no_grad()
def inspect(model: nn.Module, tokenizer: Any, text: str, *, layers: str | Sequence[int] = "all") -> Inspected:
    """Run ``text`` and measure every token's weight change in every layer.

    Args:
        model: Causal language model; its layers may be converted, original or some of each.
        tokenizer: Its tokenizer. The text is begun with the start token, as in pre-training.
        text: At most ``MAX_TOKENS`` tokens.
        layers: ``all``, ``upper_half``, ``15:30`` or indices.

    Raises:
        ValueError: An empty text or one that is too long, a layer that is not there, or one whose MLP computes more than its
            shape says (an adapter or a hook on it), so that the parts would not add up.
    """
    started = time.perf_counter()
    require_tokenizer(tokenizer)
    sites = Sites(model)
    chosen = resolve_layers(layers, len(sites))
    if not text.strip():
        raise ValueError("the text is empty; give one to look at")
    ids = encode(tokenizer, text)
    fits(model, ids, "the text")
    if len(ids) > MAX_TOKENS:
        raise ValueError(f"the text has {len(ids)} tokens, and at most {MAX_TOKENS} can be shown; shorten it")
    views: dict[int, _View] = {}
    with evaluating(model), eager_attention(model):
        taps = [_Tap(sites, layer, views) for layer in chosen]
        try:
            model(input_ids=torch.tensor([ids], device=device_of(model)), use_cache=False)
        finally:
            for tap in taps:
                tap.remove()
    rows = [views[layer] for layer in chosen]
    found = Inspected(
        tuple(tokenizer.decode([i]) for i in ids),
        tuple(chosen),
        torch.stack([view.size for view in rows]),
        torch.stack([view.share for view in rows]),
        torch.stack([view.output for view in rows]),
        {target: torch.stack([view.norms[target] for view in rows]) for target in rows[0].norms},
        tuple(view.neurons for view in rows),
        tuple(view.sources for view in rows),
        all(view.by_values for view in rows),
        {},
    )
    found.report.update(_report(found, model, text, len(start_ids(tokenizer)), time.perf_counter() - started))
    return found


# ---- one layer ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """A layer's row."""

    size: Tensor
    share: Tensor
    output: Tensor
    norms: dict[str, Tensor]
    neurons: tuple[tuple[Neuron, ...], ...]
    sources: tuple[tuple[tuple[int, float], ...], ...]
    by_values: bool


@dataclass(frozen=True)
class _Parts:
    """An MLP taken apart; tensors ``[T, …]``. Lists are over its first matrices, in the shape's order."""

    without: list[Tensor]  # W norm(h)
    pre: list[Tensor]  # with the change
    inter_without: Tensor
    inter: Tensor
    change: Tensor  # what the last matrix' change adds
    added: Tensor  # what the layer adds to h
    norms: dict[str, Tensor]


class _Tap:
    """Measures one layer while the model runs."""

    def __init__(self, sites: Sites, index: int, views: dict[int, _View]) -> None:
        self.layer, self.shape, self.index, self.views = sites.layers[index], sites.shape(index), index, views
        self.sources = SourceTap(self.layer)
        self.a: Tensor | None = None
        self._handles = [
            self.shape.attention_module(self.layer).register_forward_hook(self._attention),
            self.layer.register_forward_hook(self._measure, with_kwargs=True),
        ]

    def remove(self) -> None:
        self.sources.remove()
        for handle in self._handles:
            handle.remove()

    def _attention(self, module: nn.Module, args: Any, output: Any) -> None:
        self.a = first_output(output)

    def _measure(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        assert self.a is not None
        h, a, y = (args[0] if args else kwargs["hidden_states"])[0], self.a[0], first_output(output)[0]
        component = getattr(self.layer, "np_component", None)
        converted = component is not None and component.enabled
        parts = self._converted(h, a) if converted else self._original(h, a)
        # The sum y has been rounded, and may be a hundred times what one layer adds.
        wanted, rounding = (y - h).float(), 4 * torch.finfo(y.dtype).eps * _norm(y)
        if not bool((_norm(parts.added.float() - wanted) <= 0.05 * _norm(wanted) + rounding).all()):
            raise ValueError(
                f"layer {self.index} computes more than its shape says (an adapter or a hook on its MLP?), so its parts do not "
                "add up; remove what was added, or leave the layer out of layers"
            )
        self.views[self.index] = self._view(parts)

    def _view(self, parts: _Parts) -> _View:
        pre, without = torch.cat(parts.pre, -1).float(), torch.cat(parts.without, -1).float()
        added = parts.added.float()
        firsts = [target for target, place in self.shape.targets.items() if place.slot != "down"]
        weights = {
            target: linear_weight(self.shape.linear(self.layer, target)).float() for target in self.shape.targets
        }
        size = torch.stack([parts.norms[target] for target in firsts]).norm(dim=0)
        size = size / torch.stack([weights[target].norm() for target in firsts]).norm()
        shares, by_values = self.sources.take()
        last = next(target for target in self.shape.targets if target not in firsts)
        return _View(
            size.cpu(),
            _share(pre - without, pre).cpu(),
            _share(parts.change.float(), added).cpu(),
            {target: norm.cpu() for target, norm in parts.norms.items()},
            _neurons(parts, weights[last].norm(dim=0)),
            ((),) * len(pre) if shares is None else _sources(shares),
            by_values,
        )

    def _original(self, h: Tensor, a: Tensor) -> _Parts:
        shape, layer = self.shape, self.layer
        mlp, norm = shape.mlp(layer), shape.norm(layer)
        u = norm(h)
        full = u if shape.parallel else norm(h + a)
        firsts = {t: shape.linear(layer, t) for t, place in shape.targets.items() if place.slot != "down"}
        without, pre = ({t: linear(x) for t, linear in firsts.items()} for x in (u, full))
        inter_without, inter = self._inter(without), self._inter(pre)
        last = next(t for t, place in shape.targets.items() if place.slot == "down")
        out = shape.after_down(mlp, shape.linear(layer, last)(inter))
        norms = {t: _norm(pre[t] - without[t]) / _norm(u).clamp_min(1e-30) for t in firsts}
        norms[last] = _norm(a) / _norm(inter).clamp_min(1e-30)
        added = shape.output(layer, h + a, out) - h
        return _Parts([*without.values()], [*pre.values()], inter_without, inter, a, added, norms)

    def _converted(self, h: Tensor, a: Tensor) -> _Parts:
        layer: Any = self.layer  # a converted one
        shape, component = self.shape, layer.np_component
        mlp = shape.mlp(layer)
        u, key_scale = layer.npt_mlp_input(h, a)
        plain = shape.norm(layer)(h)
        z = component(a)
        matched = z if key_scale is None else z * key_scale.unsqueeze(-1)
        adapter = component.tensors(z.dtype)
        without, pre = {}, {}
        for target, place in shape.targets.items():
            if place.slot != "down":
                linear = shape.linear(layer, target)
                without[target] = linear(plain)
                pre[target] = changed_linear(component, adapter, target, u, matched, linear)
        inter_without, inter = self._inter(without), self._inter(pre)
        last = next(t for t, place in shape.targets.items() if place.slot == "down")
        linear = shape.linear(layer, last)
        out = shape.after_down(mlp, changed_linear(component, adapter, last, inter, z, linear))
        change = out - shape.after_down(mlp, linear(inter))
        norms = delta_norms(layer, h, a)
        for target in pre:
            if target not in norms:  # no target of the conversion: what the norm match moves is all
                norms[target] = _norm(pre[target] - without[target]) / _norm(plain).clamp_min(1e-30)
        norms.setdefault(last, torch.zeros(len(h), device=h.device))
        ordered = {target: norms[target].float() for target in shape.targets}
        added = shape.output(layer, h, out) - h
        return _Parts([*without.values()], [*pre.values()], inter_without, inter, change, added, ordered)

    def _inter(self, pre: dict[str, Tensor]) -> Tensor:
        act = self.shape.activation(self.layer)
        slots = {self.shape.targets[target].slot: y for target, y in pre.items()}
        return act(slots["gate"]) * slots["up"] if "gate" in slots else act(slots["up"])  # type: ignore[no-any-return]


def _norm(x: Tensor) -> Tensor:
    return x.float().norm(dim=-1)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """``⟨part, whole⟩/‖whole‖²`` per token."""
    return (part * whole).sum(-1) / whole.square().sum(-1).clamp_min(1e-30)


def _neurons(parts: _Parts, columns: Tensor) -> tuple[tuple[Neuron, ...], ...]:
    before, after = parts.inter_without.float(), parts.inter.float()
    weight = (after - before).abs() * columns
    top = weight.topk(min(_NEURONS, weight.shape[-1]), dim=-1).indices
    rows = zip(top.tolist(), before.gather(-1, top).tolist(), after.gather(-1, top).tolist(), strict=True)
    return tuple(tuple(Neuron(*entry) for entry in zip(*row, strict=True)) for row in rows)


def _sources(share: Tensor) -> tuple[tuple[tuple[int, float], ...], ...]:
    found = []
    for row in share.cpu():
        top = row.abs().topk(min(_SOURCES, len(row))).indices.tolist()
        found.append(tuple((i, float(row[i])) for i in top if abs(float(row[i])) >= _SMALLEST))
    return tuple(found)


# ---- the report --------------------------------------------------------------------------------------------------------

HEADINGS = ("layer", "‖ΔW‖ ÷ ‖W‖", "share: gate, up", "share: output", "strongest at")


def table(found: Inspected) -> list[tuple[str, ...]]:
    """One row a layer, upper ones first: means over tokens (the start token, which hears of nobody, left out)."""
    front = found.report["start_tokens"]
    rows: list[tuple[str, ...]] = []
    for i in reversed(range(len(found.layers))):
        size, share, output = (values[i, front:] for values in (found.size, found.share, found.output))
        at = front + int(size.argmax())
        rows.append(
            (
                str(found.layers[i]),
                f"{float(size.mean()):.4f}",
                f"{float(share.mean()):.3f}",
                f"{float(output.mean()):.3f}",
                f"{found.tokens[at].strip() or found.tokens[at]!r} ({at + 1})",
            )
        )
    return rows


def _report(found: Inspected, model: nn.Module, text: str, front: int, seconds: float) -> dict[str, Any]:
    def rounded(values: Tensor) -> list[list[float]]:
        return [[float(f"{v:.5g}") for v in row] for row in values.tolist()]

    return {
        "text": text,
        "tokens": list(found.tokens),
        "start_tokens": min(front, max(0, len(found.tokens) - 1)),
        "layers": list(found.layers),
        "size": rounded(found.size),
        "share": rounded(found.share),
        "output": rounded(found.output),
        "norms": {target: rounded(values) for target, values in found.norms.items()},
        "neurons": [
            [[[n.index, round(n.without, 4), round(n.with_change, 4)] for n in cell] for cell in row]
            for row in found.neurons
        ],
        "sources": [[[[i, round(v, 4)] for i, v in cell] for cell in row] for row in found.sources],
        "sources_by": "values" if found.by_values else "attention weights" if any(map(any, found.sources)) else None,
        "converted_layers": sorted(converted_layers(model)),
        "model": name_of(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(device_of(model)),
        "seconds": round(seconds, 2),
        "versions": {"npt_kernels": __version__, "torch": torch.__version__},
    }


def write_inspection(found: Inspected, directory: Path | str) -> list[Path]:
    """Write ``inspect.json``, ``inspect.png`` and ``inspect.html`` into ``directory``; the JSON comes last."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    report, maps = found.report, _maps(found)
    title = f"What attention changed in the MLPs: {report['model']}"
    by = "their share of the attention output" if found.by_values else "their mean attention weight"
    lead = [
        "Every token of a text has weights of its own in every layer. Choose a cell, or a token and a layer: the tokens that its "
        f"change came from are underlined, by {by}."
    ]
    shown = [token.replace("\n", "⏎") for token in found.tokens]
    details = [
        [_detail(found, row, column, shown) for column in range(len(found.tokens))] for row in range(len(found.layers))
    ]
    figure = draw_maps(directory / "inspect.png", title, found.tokens, maps)
    page = write_page(
        directory / "inspect.html", title, lead, (), (), found.tokens, maps, details,
        footer=f"npt_kernels {__version__}, {report['device']}, {report['dtype']}", links=found.sources,
    )  # fmt: skip
    return [write_json(directory / "inspect.json", report, indent=None), figure, page]


def _detail(found: Inspected, row: int, column: int, shown: Sequence[str]) -> str:
    norms = ", ".join(f"{target} {float(values[row, column]):.3g}" for target, values in found.norms.items())
    neurons = ", ".join(f"{n.index}: {n.without:.2f} → {n.with_change:.2f}" for n in found.neurons[row][column])
    sources = ", ".join(f'"{shown[i]}" ({i + 1}) {v:.2f}' for i, v in found.sources[row][column])
    return "\n".join(
        [f"‖ΔW‖: {norms}", f"neurons, without → with: {neurons}", *([f"came from: {sources}"] if sources else [])]
    )


def _maps(found: Inspected) -> list[GridMap]:
    rows = tuple(f"layer {layer}" for layer in found.layers)
    front = found.report["start_tokens"]

    def values(tensor: Tensor) -> tuple[tuple[float, ...], ...]:
        return tuple(map(tuple, tensor.tolist()))

    return [
        GridMap(
            "share of gate and up",
            "What the weight change adds to the MLP's pre-activations, of 1; W itself adds the rest. Below 0: it takes away.",
            rows,
            values(found.share),
            signed=True,
        ),
        GridMap(
            "‖ΔW‖ ÷ ‖W‖",
            "Size of the token's weight change of gate and up against the weights (Frobenius norms).",
            rows,
            values(found.size),
            # The start token's residual stream is like no other's, and would leave all others pale.
            top=float(found.size[:, front:].max()),
        ),
        GridMap(
            "share of the output",
            "What the last matrix' weight change adds to what the layer gives to the residual stream, of 1.",
            rows,
            values(found.output),
            signed=True,
        ),
    ]
