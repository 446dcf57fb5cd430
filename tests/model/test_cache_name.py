"""The key-value cache under both its names: transformers renamed ``past_key_values`` to ``cache`` in 5.24."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from npt_kernels.model.documents import isolated_documents
from npt_kernels.model.forward import cache_in, decoder_of
from npt_kernels.plasticity.hooks import watching_tokens
from tests.support.helpers import tiny_model, token_ids


class Cache:
    def get_seq_length(self):
        return 7


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_both_names_are_read(name):
    cache = Cache()
    assert cache_in({name: cache, "use_cache": True}) is cache
    assert cache_in({name: None}) is cache_in({}) is cache_in((1, 2)) is None
    output = BaseModelOutputWithPast(last_hidden_state=torch.zeros(1))
    output[name] = cache
    assert cache_in(output) is cache


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_tokens_in_the_cache_are_counted_and_such_calls_have_no_documents(name):
    model, seen, given = tiny_model("llama"), [], {}
    decoder = decoder_of(model)
    # In the place of a forward that may know one name only.
    decoder.forward = lambda **kwargs: given.update(kwargs)
    with watching_tokens(model, lambda ids, past: seen.append(past)):
        decoder(input_ids=token_ids())
        decoder(input_ids=token_ids(), **{name: Cache()})
    assert seen == [0, 7]
    with isolated_documents(model, separator=2):
        given.clear()
        decoder(input_ids=token_ids(), **{name: Cache()})
        assert "position_ids" not in given
        decoder(input_ids=token_ids())
        assert "position_ids" in given
