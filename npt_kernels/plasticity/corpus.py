"""Ordinary text for two uses: which inputs a weight usually gets (second moments), and whether an edit hurts prose (held out)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .facts import start_ids
from .hooks import context_length, device_of, evaluating

__all__ = ["Corpus", "demo_corpus", "file_corpus", "sample_own_text", "windows"]


@dataclass(frozen=True)
class Corpus:
    """Text in two parts that share nothing.

    Attributes:
        calibration, heldout: Running texts.
        source: What they are, for reports.
    """

    calibration: tuple[str, ...]
    heldout: tuple[str, ...]
    source: str


def demo_corpus(cache_dir: Path | None = None) -> Corpus:
    """The demo's plays: four to calibrate on, the fifth held out. Raises ``AssetError`` if they cannot be had."""
    from ..configs.schema import RunConfig
    from ..text.demo_text import demo_sources

    config = RunConfig()
    if cache_dir is not None:
        config.paths.cache_dir = str(cache_dir)
    sources = demo_sources(config)
    texts = ["".join(source.documents) for source in sources]
    return Corpus(
        tuple(texts[:-1]), (texts[-1],), f"{len(texts) - 1} plays of Shakespeare (held out: {sources[-1].origin})"
    )


def file_corpus(files: Sequence[Path | str]) -> Corpus:
    """Text files of the user: the first four fifths of each to calibrate on, the rest held out. Raises ``ValueError``."""
    calibration, heldout = [], []
    for file in files:
        path = Path(file).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as text: {getattr(error, 'strerror', None) or error}") from error
        cut = len(text) * 4 // 5
        if len(text[cut:].split()) < 50:
            raise ValueError(
                f"{path} has {len(text.split())} words; a few thousand are needed, a fifth of them held out"
            )
        calibration.append(text[:cut])
        heldout.append(text[cut:])
    return Corpus(tuple(calibration), tuple(heldout), ", ".join(Path(f).name for f in files) + " (last fifth held out)")


def windows(tokenizer: Any, texts: Sequence[str], count: int, length: int) -> Tensor:
    """``[≤ count, length]`` token ids cut evenly out of the texts, every row begun with the start token.

    Raises ``ValueError`` if the texts hold less than one row.
    """
    first = start_ids(tokenizer)
    body = length - len(first)
    rows: list[list[int]] = []
    for i, text in enumerate(texts):
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        wanted = count // len(texts) + (i < count % len(texts))
        possible = len(ids) // body
        for j in range(min(wanted, possible)):
            at = j * (len(ids) - body) // max(1, min(wanted, possible) - 1) if wanted > 1 else 0
            rows.append(first + ids[at : at + body])
    if not rows:
        raise ValueError(f"the text has less than {length} tokens; give more")
    return torch.tensor(rows, dtype=torch.long)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generator at a seed inside the block, as it was afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def sample_own_text(model: nn.Module, tokenizer: Any, count: int, length: int, seed: int = 0) -> Tensor:
    """``[count, length]`` tokens that the model writes by itself from the start token, sampled at temperature 1.

    Keys of the facts to be written look like the model's own language, which plays of 1600 cover badly.
    """
    first = start_ids(tokenizer) or [0]
    device = device_of(model)
    ids = torch.tensor([first] * count, dtype=torch.long, device=device)
    generate: Any = model.generate
    with torch.no_grad(), evaluating(model), _seeded(seed, device):
        out = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length - len(first),
            max_new_tokens=length - len(first),
            pad_token_id=first[0],
        )
    return out[:, :length].cpu()  # type: ignore[no-any-return]


def fitting_length(model: nn.Module, length: int) -> int:
    """``length``, or the model's context where that is shorter."""
    limit = context_length(model)
    return length if limit is None else min(length, limit)
