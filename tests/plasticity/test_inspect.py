"""What ``inspect`` says of a layer and a token, against its definition computed from hooks on the running model."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from npt_kernels import NPTConfig, apply_npt
from npt_kernels.plasticity import inspect, sources
from npt_kernels.plasticity.inspection import table, write_inspection
from tests.plasticity.test_transfer import Texts, converted
from tests.support.browser import CHROMIUM, used_in_chromium
from tests.support.helpers import assert_unchanged, snapshot, tiny_model

TEXT = "the capital of Zorvania is </script> [red] Marigold and we say it is"
#: Family → (norm of the MLP, first matrices, last matrix, attention).
NAMES = {
    "llama": ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj", "self_attn"),
    "gpt2": ("ln_2", ["mlp.c_fc"], "mlp.c_proj", "attn"),
}


def layers_of(model):
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def seen_in(model, name, layer, ids):
    """``h``, ``a``, the layer's output, pre-activations and the last matrix' input of an original layer, from hooks."""
    block, seen, handles = layers_of(model)[layer], {}, []
    _, firsts, last, attention = NAMES[name]

    def first(x):
        return (x[0] if isinstance(x, tuple) else x)[0].detach()

    handles.append(block.register_forward_hook(lambda _, args, out: seen.update(h=first(args), y=first(out))))
    handles.append(block.get_submodule(attention).register_forward_hook(lambda _, __, out: seen.update(a=first(out))))
    for path in firsts:
        handles.append(
            block.get_submodule(path).register_forward_hook(
                lambda _, __, out, path=path: seen.update({path: first(out)})
            )
        )
    handles.append(block.get_submodule(last).register_forward_hook(lambda _, args, out: seen.update(inter=first(args))))
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def ids_of(tokenizer):
    return torch.tensor([[1, *tokenizer(TEXT)["input_ids"]]])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_number_is_its_definition(name):
    model, tokenizer = tiny_model(name), Texts()
    before = snapshot(model)
    attention = model.config._attn_implementation
    found = inspect(model, tokenizer, TEXT)
    assert model.config._attn_implementation == attention
    assert_unchanged(model, before)
    assert found.layers == (0, 1, 2, 3) and found.tokens[4] == "Zorvania" and found.by_values
    norm, firsts, last, _ = NAMES[name]
    for layer in found.layers:
        block, seen = layers_of(model)[layer], seen_in(model, name, layer, ids_of(tokenizer))
        with torch.no_grad():
            u = block.get_submodule(norm)(seen["h"])
            without = [block.get_submodule(path)(u) for path in firsts]
        pre = [seen[path] for path in firsts]
        weights = [block.get_submodule(path).weight for path in firsts]
        if name == "gpt2":
            weights = [w.t() for w in weights]
        squares = 0.0
        for y, y0, (target, norms) in zip(pre, without, found.norms.items(), strict=False):
            # ΔW_t as a matrix: it makes y of what the frozen weight made of u.
            delta = torch.einsum("to,ti->toi", y - y0, u / u.square().sum(-1, keepdim=True))
            assert torch.allclose(torch.einsum("toi,ti->to", delta, u) + y0, y, atol=1e-5)
            assert torch.allclose(norms[layer], delta.flatten(1).norm(dim=1), rtol=1e-4), target
            squares = squares + delta.square().sum((1, 2))
        size = (squares / sum(w.square().sum() for w in weights)).sqrt()
        assert torch.allclose(found.size[layer], size, rtol=1e-4) and found.size[layer].min() > 0
        y, y0 = torch.cat(pre, -1), torch.cat(without, -1)
        assert torch.allclose(found.share[layer], ((y - y0) * y).sum(-1) / y.square().sum(-1), atol=1e-5)
        added = seen["y"] - seen["h"]
        assert torch.allclose(found.output[layer], (seen["a"] * added).sum(-1) / added.square().sum(-1), atol=1e-4)
        act = block.mlp.act_fn if name == "llama" else block.mlp.act
        inter0 = act(without[0]) * without[1] if name == "llama" else act(without[0])
        w = block.get_submodule(last).weight
        moved = (seen["inter"] - inter0).abs() * (w if name == "llama" else w.t()).norm(dim=0)
        for t, cell in enumerate(found.neurons[layer]):
            assert [n.index for n in cell] == moved[t].topk(4).indices.tolist()
            assert cell[0].with_change == pytest.approx(float(seen["inter"][t, cell[0].index]), abs=1e-5)
            assert cell[0].without == pytest.approx(float(inter0[t, cell[0].index]), abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_converted_layer_of_full_rank_is_the_original(name):
    original, npt = inspect(tiny_model(name), Texts(), TEXT), inspect(converted(name, 32), Texts(), TEXT)
    assert torch.allclose(npt.size, original.size, rtol=1e-3)
    assert torch.allclose(npt.share, original.share, atol=1e-3)
    assert torch.allclose(npt.output, original.output, atol=1e-3)
    low = inspect(converted(name, 4), Texts(), TEXT)
    assert (low.share - original.share).abs().max() > 0.05


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision(name):
    original, half = inspect(tiny_model(name), Texts(), TEXT), inspect(tiny_model(name).bfloat16(), Texts(), TEXT)
    assert half.by_values and (half.share - original.share).abs().max() < 0.05
    npt = inspect(converted(name, 32).bfloat16(), Texts(), TEXT)
    assert (npt.share - original.share).abs().max() < 0.05 and (npt.output - original.output).abs().max() < 0.05


@pytest.mark.parametrize("rule", ["rank1", "diagonal", "anchored", "self_key"])
def test_rules_and_parts_of_a_model(rule):
    """The parts add up to what the layer returned: ``inspect`` refuses a layer where they do not."""
    model = tiny_model("llama")
    targets = ("gate",) if rule in ("rank1", "diagonal") else ("gate", "up", "down")
    apply_npt(model, NPTConfig(layers=[1, 3], rule=rule, rank=8, targets=targets, init="small"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    found = inspect(model, Texts(), TEXT, layers="1:")
    assert found.layers == (1, 2, 3) and set(found.norms) == {"gate", "up", "down"}
    assert found.size.isfinite().all() and found.norms["gate"][0].min() > 0
    assert (found.norms["down"][0].max() > 0) == ("down" in targets) and found.norms["down"][1].min() > 0
    assert (found.output[0].abs().max() > 0) == ("down" in targets)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sources_are_what_each_token_alone_gives(name):
    model, tokenizer = tiny_model(name), Texts()
    found, ids, layer = inspect(model, tokenizer, TEXT), ids_of(Texts()), 2
    a = seen_in(model, name, layer, ids)["a"]
    attention = layers_of(model)[layer].get_submodule(NAMES[name][3])
    projection = attention.v_proj if name == "llama" else attention.c_attn
    bias = 0 if name == "llama" else attention.c_proj.bias
    alone = []
    for token in range(ids.shape[1]):
        # The values of this token only; queries and keys, so the weights, are as they were.
        def keep(_, __, out, token=token):
            out = out.clone()
            values = out if name == "llama" else out[..., 2 * out.shape[-1] // 3 :]
            mask = torch.ones(out.shape[1], dtype=torch.bool)
            mask[token] = False
            values[:, mask] = 0
            return out

        handle = projection.register_forward_hook(keep)
        alone.append(((seen_in(model, name, layer, ids)["a"] - bias) * a).sum(-1) / a.square().sum(-1))
        handle.remove()
    share = torch.stack(alone, 1).detach()  # [t, s]
    if name == "llama":
        assert torch.allclose(share.sum(1), torch.ones(len(share)), atol=1e-4)
    for t, cell in enumerate(found.sources[layer]):
        order = share[t].abs().topk(min(5, len(share))).indices.tolist()
        assert [i for i, _ in cell] == [i for i in order if share[t, i].abs() >= 0.02]
        assert all(v == pytest.approx(float(share[t, i]), abs=1e-4) for i, v in cell)
        assert all(i <= t for i, _ in cell)


def test_without_values_the_weights_are_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "_VALUES", ())
    found = inspect(tiny_model("llama"), Texts(), TEXT)
    assert not found.by_values and found.report["sources_by"] == "attention weights"
    assert found.sources[0][0] == ((0, 1.0),)  # the first token has only itself
    assert all(v > 0 for row in found.sources for cell in row for _, v in cell)
    assert "mean attention weight" in write_inspection(found, tmp_path)[2].read_text()


def test_files(tmp_path):
    found = inspect(tiny_model("llama"), Texts(), TEXT)
    files = write_inspection(found, tmp_path)
    assert [f.name for f in files] == ["inspect.json", "inspect.png", "inspect.html"]
    report, page = json.loads(files[0].read_text()), files[2].read_text()
    assert report["tokens"][6] == "</script>" and len(report["size"]) == 4 and report["sources_by"] == "values"
    assert report["neurons"][3][2][0][0] == found.neurons[3][2][0].index
    assert page.count("</script>") == 2 and "http" not in page and "came from:" in page
    assert files[1].stat().st_size > 5000
    rows = table(found)
    assert [row[0] for row in rows] == ["3", "2", "1", "0"]
    assert float(rows[0][1]) == pytest.approx(float(found.size[3, 1:].mean()), abs=1e-4)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the page was not opened in a browser")
def test_the_page_in_a_browser(tmp_path):
    found = inspect(tiny_model("llama"), Texts(), TEXT)
    script = """
      grid.querySelectorAll("tbody tr")[0].querySelectorAll("td")[6].click(); seen.clicked = detail();
      seen.underlined = underlined();
      document.querySelectorAll("#maps input")[2].click(); press("ArrowDown"); seen.below = detail();
    """
    seen = used_in_chromium(write_inspection(found, tmp_path)[2], script)
    neuron, count = found.neurons[3][6][0], len(found.tokens)
    assert seen["clicked"].startswith(f'token 7 of {count} "</script>", layer 3')
    assert f"{neuron.index}: {neuron.without:.2f} → {neuron.with_change:.2f}" in seen["clicked"]
    assert "came from: " in seen["clicked"]
    # Only what adds to the change is underlined.
    assert seen["underlined"] == sorted(i for i, v in found.sources[3][6] if v > 0)
    assert seen["below"].startswith(f'token 7 of {count} "</script>", layer 2')
    assert seen["width"] <= seen["viewport"]


def test_bad_calls_are_one_line():
    model, tokenizer = tiny_model("llama"), Texts()
    hooked = tiny_model("llama")
    hooked.model.layers[2].mlp.register_forward_hook(lambda module, args, out: out + 1)
    for call, part in (
        (lambda: inspect(model, tokenizer, " \n"), "the text is empty"),
        (lambda: inspect(model, None, "a b"), "no tokenizer"),
        (lambda: inspect(model, tokenizer, "a " * 70), "64 positions"),
        (lambda: inspect(tiny_model("llama", max_position_embeddings=512), tokenizer, "a " * 450), "at most 400"),
        (lambda: inspect(model, tokenizer, "a b", layers="9:"), "selects no layer"),
        (lambda: inspect(hooked, tokenizer, "a b"), "layer 2 computes more"),
    ):
        with pytest.raises(ValueError, match=part) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert len(inspect(hooked, tokenizer, "a b", layers="0:2").layers) == 2
    assert not hooked.model.layers[0]._forward_hooks and not hooked.model.layers[2].self_attn._forward_hooks
