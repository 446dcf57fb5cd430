"""A tiny converted model, its logits, and the one way in which a bad adapter is refused."""

from __future__ import annotations

import re

import pytest
import torch

from npt_kernels import NPTConfig, apply_npt, load_npt
from tests.support.helpers import assert_unchanged, randomise, snapshot, tiny_model, token_ids

IDS = token_ids()
D, F = 32, 48


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def converted(name="llama", **kwargs):
    model = tiny_model(name)
    apply_npt(model, NPTConfig(**({"layers": "all", "rank": 4} | kwargs)))
    randomise(model)
    return model


def check_refused(source, *parts, error=ValueError, name="llama"):

    model = tiny_model(name)
    before = snapshot(model)
    with pytest.raises(error) as caught:
        load_npt(model, source)
    for part in parts:
        assert re.search(part, str(caught.value)), f"{part!r} not in: {caught.value}"
    assert_unchanged(model, before)
