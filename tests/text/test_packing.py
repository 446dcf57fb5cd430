"""Mixing by weight; packing itself is tested with the blocks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from npt_kernels.text.packing import derived_seed, mixed_order, next_source, pack

weights_of = st.lists(st.floats(0.05, 20), min_size=1, max_size=5)


@given(weights_of, st.integers(1, 400))
def test_shares_hold_at_every_point(weights: list[float], draws: int) -> None:
    counts = [0] * len(weights)
    for done in range(1, draws + 1):
        counts[next_source(counts, weights)] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - done * weight / sum(weights)) < len(weights)


@given(weights_of, st.data())
def test_a_pass_reads_every_text_once_and_no_longer(weights: list[float], data: st.DataObject) -> None:
    lengths = [data.draw(st.integers(1, 30)) for _ in weights]
    order = mixed_order(lengths, weights, None)
    for text, length in enumerate(lengths):
        mine = [sequence for chosen, sequence in order if chosen == text]
        assert mine == [i % length for i in range(len(mine))] and len(mine) >= length
    last = order[-1][0]  # with its last sequence the pass ends
    assert sum(chosen == last for chosen, _ in order) == lengths[last]
    assert mixed_order(lengths, weights, 7) == order[:7] if len(order) >= 7 else True


def test_one_text_in_its_own_order() -> None:
    assert mixed_order([4], [3.0], None) == [(0, i) for i in range(4)]
    assert mixed_order([2], [3.0], 5) == [(0, 0), (0, 1)]


def test_seeds_are_the_same_on_every_machine_and_unrelated() -> None:
    assert derived_seed("order", 0, 0) == 7453028512061360496
    assert len({derived_seed(1, 2), derived_seed(2, 1), derived_seed(12), derived_seed("1", "2", "")}) == 4


def test_an_end_token_that_is_spelled_out_does_not_end_a_document(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate("<>eos ab")}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    end = tokenizer.eos_token_id
    plain = pack(["a<eos>b", "b"], tokenizer, 1, None).flatten().tolist()
    assert plain.count(end) == 2 and plain[0] == letters["a"] and plain.index(end) == 7
    parsed = pack(["a<eos>b", "b"], tokenizer, 1, None, special_tokens=True).flatten().tolist()
    assert parsed == [letters["a"], end, letters["b"], end, letters["b"], end]


def test_a_tokenizer_without_an_end_token_is_said(tmp_path):
    from npt_kernels.configs.schema import RunConfig
    from npt_kernels.text.blocks import load_token_blocks
    from tests.support.texts import Words, numbered

    path = tmp_path / "x.txt"
    path.write_text(numbered("w", 3000))
    config = RunConfig.from_mapping(
        {"data": {"train_files": [str(path)], "max_length": 16}, "evaluation": {"tokens": 30}}
    )
    said = "no end-of-text token"
    assert any(said in note for note in load_token_blocks(config, Words(eos=None)).sources)
    assert not any(said in note for note in load_token_blocks(config, Words()).sources)
