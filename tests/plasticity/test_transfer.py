"""Deltas of one run in another: exact at full rank, only where they are wanted, and through ``generate``."""

from __future__ import annotations

import json

import pytest
import torch

from npt_kernels import NPTConfig, apply_npt
from npt_kernels.plasticity import capture, replay, transfer
from npt_kernels.plasticity.token_maps import GridMap, draw_maps, write_page
from npt_kernels.plasticity.transfer import write_transfer
from tests.plasticity.test_edits import Words
from tests.support.browser import CHROMIUM, used_in_chromium
from tests.support.helpers import assert_unchanged, snapshot, tiny_model, token_ids

#: Of token ids whose greedy continuations with and without the context differ.
SEED = {"llama": 4, "gpt2": 1}


class Texts(Words):
    def decode(self, ids):
        names = {2 + n: word for word, n in self.words.items()}
        return " ".join(names.get(i, f"<{i}>") for i in (ids if isinstance(ids, list) else [ids]))


def converted(name, rank):
    model = tiny_model(name)
    apply_npt(
        model, NPTConfig(layers="all", rule="self_key", rank=rank, init="closed_form"), calibration=token_ids(8, 32)
    )
    return model


def start_and_prompt(context=5, prompt=6, seed=4):
    """``(donor [1, 1 + context + prompt], plain [1, 1 + prompt])``: the same start and the same end."""
    ids = token_ids(1, 1 + context + prompt, seed=seed)
    return ids, torch.cat([ids[:, :1], ids[:, 1 + context :]], 1)


def positions(name, plain, context=5):
    if name != "gpt2":
        return {}
    return {"position_ids": torch.tensor([[0, *range(1 + context, plain.shape[1] + context)]])}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [None, 32, 8], ids=["original", "full rank", "rank 8"])
def test_a_replay_of_everything_is_the_run_with_the_context(name, rank):
    model = tiny_model(name) if rank is None else converted(name, rank)
    donor, plain = start_and_prompt()
    before = snapshot(model)
    with capture(model) as deltas:
        wanted = model(donor).logits[:, -6:]
    places = positions(name, plain)
    without = model(plain, **places).logits[:, -6:]
    with replay(model, deltas):
        got = model(plain, **places).logits[:, -6:]
    assert (got - wanted).abs().max() < 1e-5 < 0.05 < (without - wanted).abs().max()
    with replay(model, deltas, tokens="last"):
        last = model(plain, **places).logits
    # Its residual stream hears of other tokens through attention only.
    assert (last[:, -1] - wanted[:, -1]).abs().max() < 1e-5
    assert torch.equal(last[:, :-1], model(plain, **places).logits[:, :-1])
    assert_unchanged(model, before)
    if rank is not None:
        z = deltas.bottleneck(model)
        assert z[1].shape == (1, 12, rank) and len(z) == 4


def test_full_rank_is_the_original_layer():
    """What a converted layer of full rank does with foreign deltas, the original does with the same attention output."""
    npt, original = converted("llama", 32), tiny_model("llama")
    donor, plain = start_and_prompt()
    with capture(original) as deltas:
        original(donor)
    logits = []
    for model in (npt, original):
        with replay(model, deltas, layers=[1, 3], tokens=[-1, -3]):
            logits.append(model(plain).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert (logits[1] - original(plain).logits).abs().max() > 0.05


def test_only_what_both_runs_have_is_replayed():
    model = tiny_model("llama")
    donor, plain = start_and_prompt()
    with capture(model) as deltas:
        model(donor)
    other = plain.clone()
    other[0, -1] = (other[0, -1] + 1) % 90
    unchanged, before = model(other).logits, model(plain).logits
    with replay(model, deltas):
        assert torch.equal(model(other).logits, unchanged)  # the texts end differently: nothing in common
        assert torch.equal(model(plain).logits[:, 0], before[:, 0])  # the start lies beside a word of the context
    with replay(model, deltas, tokens=[-1]):
        assert not torch.equal(model(other).logits, unchanged)  # asked for, whatever the token
    with replay(model, deltas, layers=[2], tokens=[2]):
        moved = (model(plain).logits != before).any(-1)
    assert not moved[0, :2].any() and moved[0, 2]
    assert torch.equal(model(plain).logits, before)


def test_rows_get_what_their_mask_says():
    model = tiny_model("llama")
    donor, plain = start_and_prompt()
    with capture(model) as deltas:
        model(donor)
    alone = []
    for layers, tokens in (([1, 2], [-1]), ([3], [-2, -1])):
        with replay(model, deltas, layers=layers, tokens=tokens):
            alone.append(model(plain).logits)
    where = {layer: torch.zeros(2, plain.shape[1], dtype=torch.bool) for layer in (1, 2, 3)}
    where[1][0, -1] = where[2][0, -1] = True
    where[3][1, -2:] = True
    with replay(model, deltas, where=where):
        both = model(plain.expand(2, -1)).logits
    assert (both - torch.cat(alone)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation(name):
    model = converted(name, 32)
    donor, plain = start_and_prompt(seed=SEED[name])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with capture(model) as deltas:
        written = model.generate(donor, **settings)[:, donor.shape[1] :]
    assert deltas.prompt == donor.shape[1] and len(deltas) == donor.shape[1] + 4  # the last token was never read
    with capture(model) as whole:
        model(torch.cat([donor, written[:, :4]], 1))
    assert torch.equal(whole.ids, deltas.ids)
    assert all((whole.attention[i] - deltas.attention[i]).abs().max() < 1e-5 for i in range(4))
    places = positions(name, plain)
    without = model.generate(plain, **settings, **places)[:, plain.shape[1] :]
    with replay(model, deltas):
        replayed = model.generate(plain, **settings, **places)[:, plain.shape[1] :]
    assert torch.equal(replayed, written) and not torch.equal(without, written)


def test_transfer_measures_and_writes(tmp_path):
    model, tokenizer = tiny_model("llama"), Texts()
    before = snapshot(model)
    got = transfer(model, tokenizer, "the capital of Zorvania is </script> Marigold", "we say it is", answer="Marigold now",
                   layers="2:4", max_new_tokens=3)  # fmt: skip
    rows = {row.name: row for row in got.rows}
    assert rows["in context"].carried == 1 and rows["nothing"].carried == 0 < rows["nothing"].kl
    for name in ("all layers, all tokens", "all layers, last token"):
        assert rows[name].largest_difference < 1e-5 and rows[name].carried > 0.999
        assert rows[name].p == pytest.approx(rows["in context"].p, rel=1e-4)
    part = rows["chosen: layers 2–3, last token"]
    assert abs(part.carried) < 0.999 and part.p != rows["nothing"].p
    assert got.carried.shape == got.changed.shape == (4, 4) and got.starts == (0, 1, 2, 3)
    assert got.carried[0, -1] > 0.999  # the last token from the first layer up is everything
    files = write_transfer(got, tmp_path)
    assert [f.name for f in files] == ["transfer.json", "transfer.png", "transfer.html"]
    assert json.loads(files[0].read_text())["rows"][0]["name"] == "nothing" and files[1].stat().st_size > 5000
    page = files[2].read_text()
    # Nothing of the context ends the data, nothing is loaded.
    assert page.count("</script>") == 2 and "http" not in page
    assert_unchanged(model, before)


def test_bad_calls_are_one_line():
    model, tokenizer = tiny_model("llama"), Texts()
    ids = token_ids(1, 6)
    with capture(model) as deltas:
        model(ids)
    with capture(tiny_model("llama", hidden_size=16, num_attention_heads=2)) as narrow:
        pass
    cache = model(ids, use_cache=True).past_key_values

    def run(given, **settings):
        with replay(model, given, **settings):
            return model(ids)

    def late():
        with capture(model):
            model(ids[:, :1], past_key_values=cache)

    for call, part in (
        (lambda: run(narrow), "the deltas are empty"),
        (lambda: run(deltas, layers=[9]), "layer=9 is out of range"),
        (lambda: run(deltas, tokens="some"), "tokens='some' is not known"),
        (lambda: run(deltas, tokens=[6]), "token 6 is out of range"),
        (late, "filled before capture"),
        (lambda: transfer(model, tokenizer, " ", "it is"), "the context is empty"),
        (lambda: transfer(model, tokenizer, "a b", "it is", answer=" "), "the answer is empty"),
        (lambda: transfer(model, tokenizer, "a b", "it is", tokens=[2]), "the prompt has 2 tokens"),
        (lambda: transfer(model, tokenizer, "a " * 70, "it is"), "64 positions"),
        (lambda: transfer(model, tokenizer, "a b", "it is", layers="9:"), "selects no layer"),
        (lambda: transfer(model, None, "a b", "it is"), "no tokenizer"),
    ):
        with pytest.raises(ValueError, match=part) as caught:
            call()
        assert "\n" not in str(caught.value)


# ---- the page in a browser -------------------------------------------------------------------------------------------

_USE = """
  const colours = () => [...grid.querySelectorAll("td")].map((c) => c.style.background);
  seen.cells = colours().length;
  press("ArrowRight"); seen.first = detail();
  press("ArrowUp"); press("End"); seen.end = detail();
  grid.querySelectorAll("tbody tr")[0].querySelectorAll("td")[5].click(); seen.clicked = detail();
  seen.underlined = underlined();
  document.querySelectorAll("#text span")[0].click(); seen.token = detail();
  const before = colours();
  document.querySelectorAll("#maps input")[1].click();
  seen.recoloured = colours().some((c, i) => c !== before[i]); seen.second = detail();
  seen.chosen = grid.querySelectorAll("td.on").length;
  press("Escape"); seen.cleared = grid.querySelectorAll("td.on").length;
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the page was not opened in a browser")
@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_by_mouse_and_keys(tmp_path, width):
    tokens = [f"tok{i}" for i in range(199)] + ["</script>\n"]
    values = tuple(tuple(float(i * 200 + j) / 6000 for j in range(200)) for i in range(30))
    rows = tuple(f"layer {i}" for i in range(30))
    maps = [GridMap("share", "A share.", rows, tuple(tuple(-v for v in row) for row in values), signed=True),
            GridMap("size", "A size.", rows, ((float("nan"), *values[0][1:]), *values[1:]))]  # fmt: skip
    details = [[f"more of {i} {j}" for j in range(200)] for i in range(30)]
    links = [[[(0, 0.7), (j // 2, -0.2)] if i == 29 else [] for j in range(200)] for i in range(30)]
    page = write_page(
        tmp_path / "p.html", "A <title>", ["lead & text"], ["a", "b"], [["x", "1"]], tokens, maps, details, links=links
    )
    assert draw_maps(tmp_path / "p.png", "A $title", tokens, maps).stat().st_size > 10_000
    seen = used_in_chromium(page, _USE, width)
    assert seen["cells"] == 6000 and seen["width"] <= seen["viewport"]
    assert seen["first"].startswith('token 1 of 200 "tok0", layer 0') and "more of 0 0" in seen["first"]
    assert "size: –" in seen["first"]
    assert seen["end"].startswith('token 200 of 200 "</script>⏎", layer 1') and "more of 1 199" in seen["end"]
    assert seen["clicked"].startswith('token 6 of 200 "tok5", layer 29')
    assert seen["underlined"] == [0, 2]
    assert seen["token"].startswith('token 1 of 200 "tok0", layer 29')
    assert seen["recoloured"] and "size: 0.9667" in seen["second"] and "share: -0.9667" in seen["second"]
    assert seen["chosen"] == 1 and seen["cleared"] == 0
