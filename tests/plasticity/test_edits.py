"""Edits: stored, applied, undone bit for bit, composed; conditional ones act on nothing but their subject."""

from __future__ import annotations

import json

import pytest
import torch

from npt_kernels.plasticity import (
    Edit,
    Fact,
    SecondMoments,
    active_edits,
    apply_edit,
    collect_second_moments,
    learn,
    read_facts,
    undo_edit,
)
from npt_kernels.plasticity.changes import LayerChange
from npt_kernels.plasticity.conditional import mentioned
from npt_kernels.plasticity.edit import EditWarning
from npt_kernels.plasticity.learn import Limits, verdict
from npt_kernels.plasticity.moments import Whitener
from npt_kernels.plasticity.recall import Row
from npt_kernels.plasticity.report import write_report
from npt_kernels.plasticity.rome import dual_keys
from tests.support.helpers import VOCAB, assert_unchanged, snapshot, tiny_model, token_ids

FACT = Fact("the capital of Zorvania is Marigold.", "Zorvania", ask=("Zorvania is ruled from",))


class Words:
    """Whole words as tokens; token 1 starts every text."""

    bos_token_id = 1

    def __init__(self):
        self.words = {}

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [2 + self.words.setdefault(w, len(self.words)) % (VOCAB - 2) for w in text.split()]}


def random_change(sites_in, sites_out, k=2, seed=0, scale=0.1, groups=1):
    g = torch.Generator().manual_seed(seed)
    return LayerChange(
        torch.randn(k, sites_in, generator=g), torch.randn(k, sites_out, generator=g) * scale, torch.arange(k) % groups
    )


def sizes(model):
    from npt_kernels.plasticity.hooks import Sites

    return Sites(model).size(0)


def edit_of(model, layers=(1, 2), seed=0, triggers=None):
    d_in, d_out = sizes(model)
    changes = {layer: random_change(d_in, d_out, seed=seed + layer) for layer in layers}
    return Edit.of(model, changes, "conditional" if triggers else "rome", [FACT], triggers)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undo_gives_every_bit_back(name, dtype):
    model = tiny_model(name).to(dtype)
    before, ids = snapshot(model), token_ids()
    first, second = edit_of(model, seed=0), edit_of(model, seed=50)
    plain = model(ids).logits
    applied = apply_edit(model, first)
    one = model(ids).logits
    assert not torch.equal(one, plain)
    assert all(0.9 < kept < 1.1 for kept in applied.kept.values())
    assert all((noise > 1e-3) == (dtype is torch.bfloat16) for noise in applied.noise.values())
    apply_edit(model, second)
    undo_edit(model, first)  # out of the middle
    alone = tiny_model(name).to(dtype)
    apply_edit(alone, second)
    assert torch.equal(model(ids).logits, alone(ids).logits)
    undo_edit(model)
    assert active_edits(model) == ()
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_edit_is_the_sum_that_it_says(name):
    model = tiny_model(name)
    edit = edit_of(model, (1,))
    from npt_kernels.plasticity.hooks import Sites

    weight = Sites(model).weight(1).detach().double().clone()
    apply_edit(model, edit)
    change = edit.layers[1]
    truth = weight + change.v_b.double().t() @ change.v_a.double()
    assert (Sites(model).weight(1).double() - truth).abs().max() < 1e-6
    assert change.norm == pytest.approx(float((truth - weight).norm()), rel=1e-6)


def test_saved_and_loaded_it_gives_the_same_bits(tmp_path):
    model, ids = tiny_model("llama"), token_ids()
    edit = edit_of(model)
    apply_edit(model, edit)
    edit.save(tmp_path)
    other = tiny_model("llama")
    loaded = Edit.load(tmp_path)
    apply_edit(other, loaded)
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert loaded.facts == (FACT,) and loaded.history[0]["event"] == "learned"


def test_composition_warns_of_overlap_and_other_weights():
    model = tiny_model("llama")
    edit = edit_of(model)
    apply_edit(model, edit)
    twin = Edit(edit.layers, "rome", base=edit.base)
    with pytest.warns(EditWarning, match="keys overlap"):
        apply_edit(model, twin)
    with pytest.warns(EditWarning, match="does not hold the weights"):
        apply_edit(tiny_model("llama", seed=9), edit)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_reads_the_export(tmp_path, name):
    peft = pytest.importorskip("peft")
    model, ids = tiny_model(name), token_ids()
    plain, edit = model(ids).logits, edit_of(model)
    edit.export_lora(tmp_path, model)
    lora = peft.PeftModel.from_pretrained(tiny_model(name), str(tmp_path)).eval()
    apply_edit(model, edit)
    edited = model(ids).logits
    assert (edited - plain).abs().max() > 1e-2
    assert torch.allclose(lora(ids).logits, edited, atol=1e-5)
    merged = lora.merge_and_unload()
    assert torch.allclose(merged(ids).logits, edited, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_conditional_moves_no_bit_without_its_subject(name):
    model = tiny_model(name)
    before = snapshot(model)
    ids = token_ids(2, 12)
    ids[ids == 7] = 8
    ids[1, 4:6] = torch.tensor([7, 9])
    plain = model(ids).logits
    edit = edit_of(model, triggers=[((7, 9),)])
    apply_edit(model, edit)
    out = model(ids).logits
    assert torch.equal(out[0], plain[0]) and torch.equal(out[1, :5], plain[1, :5])
    assert (out[1, 5:] - plain[1, 5:]).abs().max() > 1e-3
    static = tiny_model(name)  # every token from the start on: as if the weight itself had changed
    apply_edit(static, Edit(edit.layers, "rome"))
    started = torch.cat([torch.tensor([[7, 9]]), ids[1:, 2:]], 1)
    split = model(started).logits[:, 1:]
    assert not torch.equal(split, static(started).logits[:, 1:])  # token 0 is not yet acted on
    undo_edit(model)
    assert_unchanged(model, before)


def test_conditional_remembers_through_a_cache():
    model = tiny_model("llama")
    apply_edit(model, edit_of(model, triggers=[((7, 9),)]))
    ids = token_ids(1, 10)
    ids[0, 2:4] = torch.tensor([7, 9])
    whole = model(ids).logits
    first = model(ids[:, :3], use_cache=True)
    rest = model(ids[:, 3:], past_key_values=first.past_key_values, use_cache=True)
    assert (torch.cat([first.logits, rest.logits], 1) - whole).abs().max() < 1e-5
    greedy = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    step = ids
    for _ in range(6):
        step = torch.cat([step, model(step).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, step)
    assert model.generate(ids, max_new_tokens=4, num_beams=3, pad_token_id=0).shape == (1, 14)


def test_mentions():
    ids = torch.tensor([[1, 7, 9, 3], [9, 7, 1, 1]])
    assert mentioned(ids, ((7, 9),)).tolist() == [[False, False, True, True], [False] * 4]


def test_dual_keys_answer_each_key_with_its_own_value():
    rows = torch.randn(200, 12)
    whitener = Whitener(rows.t() @ rows / 200)
    keys = torch.randn(3, 12)
    assert (dual_keys(keys, whitener, tie=0) @ keys.double().t() - torch.eye(3, dtype=torch.float64)).abs().max() < 1e-9
    one = dual_keys(keys[:1], whitener)[0]
    assert torch.allclose(one, whitener.key(keys[0]))


@pytest.mark.parametrize("method", ["rome", "context", "conditional"])
def test_learning_a_fact(method, tmp_path):
    model, tokenizer = tiny_model("llama"), Words()
    before = snapshot(model)
    moments = collect_second_moments(model, token_ids(16, 32))
    moments.save(tmp_path / "c.safetensors")
    assert torch.equal(SecondMoments.load(tmp_path / "c.safetensors", [1]).matrix(1), moments.matrix(1))
    # The demands on the rest make no sense for a model that says random words; recall does.
    got = learn(model, tokenizer, FACT, method=method, layers=[2, 3] if method != "rome" else 1, moments=moments,
                prose=token_ids(2, 16), limits=Limits(leak=1, known=1, prose_ratio=1e9))  # fmt: skip
    if method == "rome":
        # The head of a random model of 32 units is nearly flat: no residual stream makes a token likely.
        assert got.after.p_verbatim > 1.3 * got.before.p_verbatim
    else:
        assert got.after.p_verbatim != got.before.p_verbatim
    if method == "conditional":
        assert got.after.leak == got.before.leak and got.after.p_leak == got.before.p_leak
        assert got.after.prose_ratio == 1.0
    files = write_report(got, tmp_path / "out")
    assert all(file.stat().st_size > 500 for file in files)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for row in ("before", "in_context", "after"):
        assert {"verbatim", "questions", "leak", "known", "prose_ratio"} <= report[row].keys()
    undo_edit(model)
    assert_unchanged(model, before)


def test_damage_is_not_called_learned():
    before = Row(0.0, 0.0, 0.0, 0.8, 1.0)
    assert verdict(before, Row(1.0, 0.5, 0.0, 0.8, 1.01), Limits()) == ()
    bad = verdict(before, Row(0.5, 0.5, 0.4, 0.2, 1.5), Limits())
    assert len(bad) == 4 and "leak 0.40" in bad[1]
    assert verdict(before, Row(1.0, 0.5, 0.0, 0.8, float("nan")), Limits())


BAD = [
    (("The sky is blue.", "Zorvania"), "not in the fact"),
    (("Zorvania", "Zorvania"), "one word"),
    (("The capital is Zorvania.", "Zorvania"), "only in its answer"),
    (("Zorvania is big.", "Zorvania", "."), "empty"),
    (("Zorvania is big.", "Zorvania", "small"), "not the end"),
    (("Zorvania is big.", ""), "subject is empty"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda c: c[1])
def test_bad_facts_are_one_line(case):
    with pytest.raises(ValueError, match=case[1]) as caught:
        Fact(*case[0])
    assert "\n" not in str(caught.value)


def test_bad_calls_leave_the_model_alone(tmp_path):
    model, tokenizer = tiny_model("llama"), Words()
    before = snapshot(model)
    moments = collect_second_moments(model, token_ids(4, 16))
    given = {"moments": moments, "prose": token_ids(2, 16)}
    long = Fact("word " * 80 + "Zorvania is big.", "Zorvania")
    for call, part in (
        (lambda: learn(model, tokenizer, FACT, layers=9, **given), "layer=9 is out of range"),
        (lambda: learn(model, tokenizer, long, **given), "64 positions"),
        (lambda: learn(model, None, FACT, **given), "no tokenizer"),
        (lambda: learn(model, tokenizer, [], **given), "no facts"),
        (lambda: learn(model, tokenizer, FACT, method="magic", **given), "choose one of rome"),
        (lambda: apply_edit(model, edit_of(tiny_model("llama", intermediate_size=40))), "another model"),
        (lambda: undo_edit(model), "no edits"),
        (lambda: Edit.load(tmp_path), "has no edit.safetensors"),
    ):
        with pytest.raises(ValueError, match=part) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert_unchanged(model, before)
    (tmp_path / "facts.jsonl").write_text('{"fact": "Zorvania is big.", "subject": "Zorvania"}\n{"fact": 1}\n')
    with pytest.raises(ValueError, match="line 2: there is no 'subject'"):
        read_facts(tmp_path / "facts.jsonl")


def test_climbing_gives_the_bits_of_whole_runs():
    """Keys and missing effect of a layer, the one below it changed on the way: as a run from the bottom finds them."""
    from npt_kernels.plasticity.context import _Climb, _collect
    from npt_kernels.plasticity.hooks import Sites

    model, tokenizer = tiny_model("llama"), Words()
    sites, facts = Sites(model), [FACT]
    with torch.no_grad():
        pairs = _collect(model, tokenizer, sites, facts, [1, 3], True)
        climb = _Climb(model, sites, pairs)
        first = climb.at(1)
        sites.weight(1).mul_(1.5)
        upper = climb.at(3)
        assert all(torch.equal(a, b) for a, b in zip(upper, _Climb(model, sites, pairs).at(3), strict=True))
        assert not torch.equal(first[1], _Climb(model, sites, pairs).at(1)[1])


def test_what_is_held():
    """Alone a fact is held against all other subjects; several hold one another, and each its own."""
    from npt_kernels.plasticity.context import _held
    from npt_kernels.plasticity.probes import HELD_SUBJECTS, OTHER_SUBJECTS

    assert not set(HELD_SUBJECTS) & set(OTHER_SUBJECTS), "what holds must not also test"
    fact = Fact("the capital of Tarvin is Marigold", "Tarvin", keep=("Tarvin lies in",))
    alone = _held(fact, 0, 1, beside=False)
    assert len(alone) == len(HELD_SUBJECTS) and alone[-1] == "Tarvin lies in" and "the capital of Harrog is" in alone
    many = [set(_held(FACT, number, 24, beside=False)) for number in range(24)]
    assert {len(texts) for texts in many} == {2} and len(set.union(*many)) == len(HELD_SUBJECTS)
    beside = _held(FACT, 0, 1, beside=True)
    assert all(text.index("Zorvania") < text.index("the capital of") for text in beside)
