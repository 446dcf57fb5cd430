"""What the examples convert when no ``--model`` is given: a small language model over bytes, taught for some seconds.

The text is the language reference that comes with Python, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LENGTH = 64


def arguments(description: str | None) -> argparse.Namespace:
    """``--model``, ``--text``, ``--rank`` of every example."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a hub id; default: the tiny model of tiny_base.py")
    parser.add_argument("--text", help="a text file like what the model will read; needed with --model")
    parser.add_argument(
        "--rank", default="auto:8", help="number, fraction of the hidden size, or auto:MEAN (default %(default)s)"
    )
    parser.add_argument("--out", help="folder for what is saved; default: a temporary one")
    return parser.parse_args()


def base_and_text(model: str | None, text: str | None) -> tuple[Any, Tensor, Tensor]:
    """``(base model, ids to fit on [n, seq], ids to measure on [m, seq])``; the last eighth of the text is held out."""
    if model is None:
        return tiny_model(), *split(tiny_text())
    if text is None:
        raise SystemExit("--model needs --text FILE: text like what the model will read")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(Path(text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    length = min(512, ids.numel() // 16)
    return AutoModelForCausalLM.from_pretrained(model), *split(ids[: ids.numel() // length * length].view(-1, length))


def split(ids: Tensor) -> tuple[Tensor, Tensor]:
    held = max(1, len(ids) // 8)
    return ids[:-held], ids[-held:]


def tiny_text(sequences: int = 512) -> Tensor:
    """Bytes of Python's language reference, ``[sequences, 64]``."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    return torch.tensor(list(text[: sequences * LENGTH])).view(sequences, LENGTH)


def tiny_model() -> Any:
    """Llama with 2 layers of width 64, taught a little of the text: enough to have something that a conversion can lose."""
    return copy.deepcopy(taught(150))


@lru_cache(maxsize=1)
def taught(steps: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    model, text = LlamaForCausalLM(config), split(tiny_text())[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        batch = text[step * 16 % len(text) :][:16]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
