"""What of a context is in the weight changes: those of the run with it, put into the run without it, by layer and token.

The run with the context (the *donor*) reads ``context ⏎ prompt``, the other ``prompt``. Both are then asked for the same answer:
the user's, or what the donor itself writes. A replay of everything gives the donor's logits (exact at full rank); how far one
layer, some layers or one token get is the measurement. The distance is ``KL(donor‖run)`` of the next token, and *carried* is
``1 − KL(donor‖replayed)/KL(donor‖without context)``: 1 is the context's whole effect, 0 none of it; below 0, the replay moved
the prediction away from both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..config import resolve_layers
from ..progress import progress_bar
from .deltas import Deltas, capture, replay
from .facts import encode, encode_answer, require_tokenizer, start_ids
from .hooks import Sites, converted_layers, device_of, evaluating, learned_positions, name_of
from .recall import fits, next_token_kl
from .token_maps import GridMap, draw_maps, write_json, write_page

__all__ = ["HEADINGS", "Carried", "Transferred", "cells", "transfer", "write_transfer"]

#: Rows (first layers) and columns (last tokens of the prompt) of the map at most.
_MAP_ROWS, _MAP_TOKENS = 32, 32
#: Tokens of one forward of the map.
_BATCH_TOKENS = 512


@dataclass(frozen=True)
class Carried:
    """One row of the table.

    Attributes:
        name: What was replayed, in words.
        p: Probability of the answer (product over its tokens).
        exact: Every token of it is the first choice.
        kl: ``KL(donor‖this run)`` in nats, mean over the tokens that predict the answer.
        carried: ``1 − kl/kl(nothing)``.
        largest_difference: Of the logits from the donor's.
    """

    name: str
    p: float
    exact: bool
    kl: float
    carried: float
    largest_difference: float


@dataclass(frozen=True, eq=False)
class Transferred:
    """What :func:`transfer` returns.

    Attributes:
        rows: Nothing, in context, and the replays.
        texts: Who → greedy continuation: ``in context``, ``nothing``, ``replayed``.
        tokens: The prompt's tokens that the maps have as columns.
        starts: First replayed layer of every row of ``carried``; from there on upwards all are.
        carried: ``[starts, tokens]``: the deltas of one token alone, layers from ``starts`` upwards.
        changed: ``[layers, tokens]``: ``‖a with − a without‖/‖a without‖``, how much the context moved a delta.
        deltas: Of the donor, prompt and answer.
        report: All of it as plain JSON types.
    """

    rows: tuple[Carried, ...]
    texts: dict[str, str]
    tokens: tuple[str, ...]
    starts: tuple[int, ...]
    carried: Tensor
    changed: Tensor
    deltas: Deltas
    report: dict[str, Any]


@dataclass(frozen=True)
class _Runs:
    """Token ids of both runs. Their last ``len(prompt) + len(answer)`` tokens are the same."""

    front: list[int]  # the start token
    context: list[int]
    prompt: list[int]
    answer: list[int]

    @property
    def asked(self) -> list[int]:
        """What is read behind the context: all but the answer's last token, which nothing is predicted from."""
        return self.prompt + self.answer[:-1]

    @property
    def donor(self) -> list[int]:
        return self.front + self.context + self.asked

    @property
    def plain(self) -> list[int]:
        return self.front + self.asked


@torch.no_grad()
def transfer(
    model: nn.Module,
    tokenizer: Any,
    context: str,
    prompt: str,
    *,
    answer: str | None = None,
    layers: str | Sequence[int] = "upper_half",
    tokens: str | Sequence[int] = "last",
    max_new_tokens: int = 8,
    with_map: bool = True,
    progress: bool = False,
) -> Transferred:
    """Run ``prompt`` behind ``context``, keep the deltas, replay them in ``prompt`` alone, and measure what came over.

    Args:
        model: Causal language model; its layers may be converted, original or some of each. An original layer is what an
            NPT layer of full rank computes.
        tokenizer: Its tokenizer.
        context: What only the donor reads.
        prompt: What both read.
        answer: What should follow; default: what the donor writes, ``max_new_tokens`` of it.
        layers: For the row ``chosen`` and the replayed text: ``all``, ``upper_half``, ``15:30`` or indices.
        tokens: ``last`` (those that predict the answer), ``all``, or indices of the prompt's tokens, negative from its end.
        max_new_tokens: Length of the texts.
        with_map: Also measure every token alone, from every layer upwards.
        progress: Show bars.

    Raises:
        ValueError: An empty text, one that does not fit the model, layers or tokens that are not there.
    """
    started = time.perf_counter()
    require_tokenizer(tokenizer)
    sites = Sites(model)
    chosen = resolve_layers(layers, len(sites))
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    with evaluating(model):
        runs = _encode(model, tokenizer, context, prompt, answer, max_new_tokens)
        places = _places(tokens, runs)
        with capture(model) as deltas:
            donor = _logits(model, runs.donor, runs)
        with capture(model) as without:
            plain = _logits(model, runs.plain, runs, **_positions(model, runs, len(runs.plain)))
        rows = _table(model, runs, deltas, donor, plain, chosen, places, len(sites))
        changed = _changed(deltas, without, len(runs.asked))[:, : len(runs.prompt)][:, -_MAP_TOKENS:]
        starts, carried = (
            _map(model, runs, deltas, donor[:1], plain[:1], len(sites), progress) if with_map else ([], None)
        )
        texts = _texts(model, tokenizer, runs, chosen, tokens, max_new_tokens)
    shown = tuple(tokenizer.decode([i]) for i in runs.prompt[-_MAP_TOKENS:])
    report = {
        "context": context,
        "prompt": prompt,
        "answer": tokenizer.decode(runs.answer),
        "answer_from": "the run with the context" if answer is None else "given",
        "layers": chosen,
        "tokens": tokens if isinstance(tokens, str) else list(tokens),
        "rows": [asdict(row) for row in rows],
        "texts": texts,
        "map": {
            "tokens": list(shown),
            "changed": [[round(v, 4) for v in row] for row in changed.tolist()],
            "starts": starts,
            "carried": None if carried is None else [[round(v, 4) for v in row] for row in carried.tolist()],
        },
        "converted_layers": sorted(converted_layers(model)),
        "model": name_of(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(device_of(model)),
        "seconds": round(time.perf_counter() - started, 2),
        "versions": {"npt_kernels": __version__, "torch": torch.__version__},
    }
    empty = torch.zeros(0, len(shown))
    return Transferred(
        rows, texts, shown, tuple(starts), empty if carried is None else carried, changed, deltas, report
    )


# ---- the two runs ------------------------------------------------------------------------------------------------------


def _encode(model: nn.Module, tokenizer: Any, context: str, prompt: str, answer: str | None, new: int) -> _Runs:
    for name, text in (("context", context), ("prompt", prompt)):
        if not text.strip():
            raise ValueError(f"the {name} is empty; give a text")
    front = start_ids(tokenizer)
    before = encode(tokenizer, context.rstrip() + "\n")[len(front) :]
    if answer is None:
        asked = encode(tokenizer, prompt)[len(front) :]
        fits(model, [*front, *before, *asked, *[0] * new], "context, prompt and what follows")
        written = _generate(model, tokenizer, [*front, *before, *asked], new)
        if not written:
            raise ValueError("behind the context the model ends its text at once; give the answer to look for")
        return _Runs(front, before, asked, written)
    if not answer.strip():
        raise ValueError("the answer is empty; give the words that should follow, or leave it out")
    pair = encode_answer(tokenizer, prompt.rstrip(), answer.strip())
    fits(model, [*front, *before, *pair.ids], "context, prompt and answer")
    return _Runs(front, before, list(pair.ids[len(front) : pair.start]), list(pair.answer))


def _places(tokens: str | Sequence[int], runs: _Runs) -> tuple[int, ...]:
    """Indices, from the end of what both runs read, of the tokens that the user chose."""
    behind = len(runs.answer) - 1
    if tokens == "last":
        return tuple(range(-behind - 1, 0))
    if tokens == "all":
        return tuple(range(-len(runs.asked), 0))
    if isinstance(tokens, str):
        raise ValueError(f"tokens={tokens!r} is not known; use 'all', 'last' or a list of indices")
    count = len(runs.prompt)
    for index in tokens:
        if isinstance(index, bool) or not isinstance(index, int) or not -count <= index < count:
            raise ValueError(f"token {index!r} is out of range: the prompt has {count} tokens")
    return tuple(sorted(index % count - count - behind for index in tokens))


def _positions(model: nn.Module, runs: _Runs, length: int, rows: int = 1) -> dict[str, Tensor]:
    """With learned positions the tokens behind the start keep the places that they have behind the context."""
    if not learned_positions(model):
        return {}
    front = len(runs.front)
    places = torch.arange(length, device=device_of(model))
    places[front:] += len(runs.context)
    return {"position_ids": places.expand(rows, -1)}


def _logits(model: nn.Module, ids: list[int], runs: _Runs, **places: Any) -> Tensor:
    """``[answer, vocab]`` float32 at the tokens that predict the answer."""
    tensor = torch.tensor([ids], device=device_of(model))
    logits = model(input_ids=tensor, use_cache=False, **places).logits[0, -len(runs.answer) :]
    return logits.float()  # type: ignore[no-any-return]


def _generate(model: nn.Module, tokenizer: Any, ids: list[int], new: int, **places: Any) -> list[int]:
    """Greedy continuation without a closing end token."""
    generate: Any = model.generate
    tensor = torch.tensor([ids], device=device_of(model))
    ends = getattr(tokenizer, "eos_token_id", None)
    out = generate(
        input_ids=tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=new, do_sample=False, num_beams=1,
        pad_token_id=ends if isinstance(ends, int) else 0, **places,
    )[0, len(ids) :].tolist()  # fmt: skip
    special = {*start_ids(tokenizer), *([ends] if isinstance(ends, int) else [])}
    while out and out[-1] in special:
        out.pop()
    return out  # type: ignore[no-any-return]


# ---- what comes over ---------------------------------------------------------------------------------------------------


def _table(
    model: nn.Module,
    runs: _Runs,
    deltas: Deltas,
    donor: Tensor,
    plain: Tensor,
    chosen: list[int],
    places: tuple[int, ...],
    total: int,
) -> tuple[Carried, ...]:
    nothing = next_token_kl(donor.log_softmax(-1), plain.log_softmax(-1))

    def row(name: str, logits: Tensor) -> Carried:
        log_p = logits.log_softmax(-1)
        wanted = torch.tensor(runs.answer, device=logits.device)
        kl = next_token_kl(donor.log_softmax(-1), log_p)
        return Carried(
            name,
            float(log_p.gather(-1, wanted.unsqueeze(-1)).sum().exp()),
            bool((logits.argmax(-1) == wanted).all()),
            kl,
            1 - kl / nothing if nothing > 0 else 0.0,
            float((logits - donor).abs().max()),
        )

    def replayed(name: str, layers: Sequence[int], at: tuple[int, ...]) -> Carried:
        with replay(model, deltas, layers=layers, tokens=at):
            return row(name, _logits(model, runs.plain, runs, **_positions(model, runs, len(runs.plain))))

    everything, last = _places("all", runs), _places("last", runs)
    rows = [
        row("nothing", plain),
        row("in context", donor),
        replayed("all layers, all tokens", range(total), everything),
        replayed("all layers, last token", range(total), last),
        replayed(f"chosen: layers {_spans(chosen)}, {_named(places, runs)}", chosen, places),
    ]
    for layer in dict.fromkeys((chosen[0], chosen[-1])):
        rows.append(replayed(f"layer {layer} alone, {_named(places, runs)}", [layer], places))
    return tuple(rows)


def _spans(layers: Sequence[int]) -> str:
    """``0–3, 5``."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)


def _named(places: tuple[int, ...], runs: _Runs) -> str:
    if places == _places("last", runs):
        return "last token"
    if places == _places("all", runs):
        return "all tokens"
    first = len(runs.asked)
    return "token " + ", ".join(str(place + first) for place in places)


def _changed(deltas: Deltas, without: Deltas, count: int) -> Tensor:
    """``[layers, count]``: ``‖a with − a without‖/‖a without‖`` of the last ``count`` tokens."""
    rows = []
    for layer in sorted(deltas.attention):
        with_, plain = (d.attention[layer][0, -count:].float() for d in (deltas, without))
        rows.append(((with_ - plain).norm(dim=-1) / plain.norm(dim=-1).clamp_min(1e-12)).cpu())
    return torch.stack(rows)


def _map(
    model: nn.Module, runs: _Runs, deltas: Deltas, donor: Tensor, plain: Tensor, total: int, progress: bool
) -> tuple[list[int], Tensor]:
    """``carried [starts, tokens]`` of the first answer token, each token of the prompt alone, layers from a start upwards."""
    step = -(-total // _MAP_ROWS)
    starts = list(range(0, total, step))
    ids = runs.front + runs.prompt
    shown = min(len(runs.prompt), _MAP_TOKENS)
    cells = [(start, len(ids) - shown + column) for start in starts for column in range(shown)]
    reference, distance = donor.log_softmax(-1), next_token_kl(donor.log_softmax(-1), plain.log_softmax(-1))
    prompt = _cut(deltas, len(runs.front) + len(runs.context) + len(runs.prompt))
    found: list[float] = []
    with progress_bar("map", len(cells), "cells", enabled=progress) as advance:
        size = max(1, _BATCH_TOKENS // len(ids))
        for batch in (cells[i : i + size] for i in range(0, len(cells), size)):
            at = torch.zeros(len(batch), len(ids), dtype=torch.bool, device=device_of(model))
            at[range(len(batch)), [column for _, column in batch]] = True
            first = torch.tensor([start for start, _ in batch], device=at.device)
            where = {layer: at & (first <= layer).unsqueeze(1) for layer in range(total)}
            with replay(model, prompt, where=where):
                tokens = torch.tensor([ids] * len(batch), device=at.device)
                logits = model(
                    input_ids=tokens, use_cache=False, logits_to_keep=1, **_positions(model, runs, len(ids), len(batch))
                ).logits[:, -1]
            for log_p in logits.float().log_softmax(-1):
                kl = next_token_kl(reference, log_p.unsqueeze(0))
                found.append(1 - kl / distance if distance > 0 else 0.0)
            advance(len(batch))
    return starts, torch.tensor(found).reshape(len(starts), shown)


def _cut(deltas: Deltas, count: int) -> Deltas:
    """Their first ``count`` tokens, all in one forward."""
    assert deltas.ids is not None
    return Deltas({layer: a[:, :count] for layer, a in deltas.attention.items()}, deltas.ids[:, :count], count)


def _texts(
    model: nn.Module, tokenizer: Any, runs: _Runs, chosen: list[int], tokens: str | Sequence[int], new: int
) -> dict[str, str]:
    """Greedy continuations, the deltas of the donor's own generation replayed while both write the same."""
    ids = runs.front + runs.prompt
    with capture(model, chosen) as deltas:
        donor = _generate(model, tokenizer, runs.front + runs.context + runs.prompt, new)
    places: dict[str, Any] = _positions(model, runs, len(ids))
    texts = {"in context": donor, "nothing": _generate(model, tokenizer, ids, new)}
    at = tokens if isinstance(tokens, str) else [i % len(runs.prompt) - len(runs.prompt) for i in tokens]
    with replay(model, deltas, tokens=at):
        texts["replayed"] = _generate(model, tokenizer, ids, new, **places)
    return {who: tokenizer.decode(written) for who, written in texts.items()}


# ---- the report as files -----------------------------------------------------------------------------------------------

HEADINGS = ("replayed", "p(answer)", "first choice", "KL from in context", "carried")


def cells(row: Carried) -> tuple[str, ...]:
    """A row of the table as text, under :data:`HEADINGS`."""
    return (row.name, f"{row.p:.4f}", "yes" if row.exact else "no", f"{row.kl:.4f}", f"{row.carried:.3f}")


def write_transfer(transferred: Transferred, directory: Path | str) -> list[Path]:
    """Write ``transfer.json``, ``transfer.png`` and ``transfer.html`` into ``directory``; the JSON comes last."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    report, maps = transferred.report, _maps(transferred)
    title = f"Weight changes of one run in another: {report['model']}"
    lead = [
        f"Context: {report['context']}",
        f"Prompt: {report['prompt']}",
        f"Answer ({report['answer_from']}): {report['answer']}",
        *(f"{who}: {text}" for who, text in transferred.texts.items()),
    ]
    figure = draw_maps(directory / "transfer.png", title, transferred.tokens, maps)
    page = write_page(
        directory / "transfer.html", title, lead, HEADINGS, [cells(row) for row in transferred.rows], transferred.tokens,
        maps, footer=f"npt_kernels {__version__}, {report['device']}, {report['dtype']}",
    )  # fmt: skip
    record = directory / "transfer.json"
    write_json(record, report)
    return [record, figure, page]


def _maps(transferred: Transferred) -> list[GridMap]:
    changed = GridMap(
        "moved by the context",
        "How far the context moved what this token's weight change is made of: ‖a with − a without‖/‖a without‖.",
        tuple(f"layer {i}" for i in range(len(transferred.changed))),
        _rows(transferred.changed),
    )
    if not transferred.starts:
        return [changed]
    carried = GridMap(
        "carried by this token",
        "Share of the context's effect on the next token that comes over when this token's deltas alone are replayed, from "
        "this layer upwards. 1: all of it; 0: nothing; below 0: the prediction moved elsewhere.",
        tuple(f"layers {start} and up" for start in transferred.starts),
        _rows(transferred.carried),
        signed=True,
    )
    return [carried, changed]


def _rows(values: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in values.tolist())
