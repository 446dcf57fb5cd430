"""A converted model on a GPU, for every backend that runs there: values, gradients, training, generation, compilation, graphs.

Values are held to the 2× rule against a float64 model on the CPU: the error of logits and gradients may be at most twice that
of the same converted model on the backend ``eager`` in the same dtype, plus one rounding.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from npt_kernels import (
    NPTConfig,
    apply_npt,
    available_backends,
    explain,
    load_npt,
    npt_disabled,
    npt_parameters,
    save_npt,
)
from tests.support.helpers import randomise, tiny_model, token_ids

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
HALVES = (torch.bfloat16, torch.float16)
#: Widths are multiples of 8, so that every backend has its fused kernels for them.
SIZES = {
    "llama": dict(hidden_size=128, intermediate_size=264, num_attention_heads=4, max_position_embeddings=512),
    "gpt2": dict(n_embd=128, n_head=4),
}


def runs_here(backend: str, dtype: torch.dtype) -> bool:
    return explain("mlp", device=DEVICE, dtype=dtype, act="silu", backend=backend).chosen == backend


BACKENDS = [name for name in available_backends() if torch.cuda.is_available() and runs_here(name, torch.bfloat16)]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """Name a backend for everything, as ``NPT_BACKEND`` does."""
    from npt_kernels.ops import registry

    return lambda name: monkeypatch.setattr(registry, "_DEFAULT_BACKEND", name)


def converted(name: str, rule: str = "self_key", layers: int = 3) -> nn.Module:
    model = tiny_model(name, layers=layers, **SIZES[name])
    apply_npt(model, NPTConfig(layers="all", rule=rule, rank=16, init="small"))
    randomise(model, scale=0.05)
    return model.float()


def loss_and_grads(model: nn.Module, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=tokens).logits
    logits.float().square().mean().backward()
    return logits.detach(), [p.grad.detach().clone() for p in npt_parameters(model)]


def error(got: Tensor, truth: Tensor) -> float:
    assert bool(got.isfinite().all())
    return float((got.double().cpu() - truth).norm() / truth.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("name", "rule"),
    [("llama", rule) for rule in ("self_key", "rank1", "diagonal", "anchored")]  # diagonal is for a gate only
    + [("gpt2", rule) for rule in ("self_key", "rank1", "anchored")],
)
def test_values_and_gradients(use, backend: str, dtype: torch.dtype, name: str, rule: str) -> None:
    config = dict(targets=("gate",)) if rule == "diagonal" else {}
    model = tiny_model(name, layers=2, **SIZES[name])
    apply_npt(model, NPTConfig(layers="all", rule=rule, rank=16, init="small", **config))
    randomise(model, scale=0.05)
    tokens = token_ids(4, 40)
    low = copy.deepcopy(model).to(dtype)  # what is rounded once is rounded for all
    truth_logits, truth_grads = loss_and_grads(copy.deepcopy(low).double(), tokens)
    low = low.to(DEVICE)
    results = {}
    for which in ("eager", backend):
        use(which)
        results[which] = loss_and_grads(low, tokens.to(DEVICE))
    eps = torch.finfo(dtype).eps
    assert error(results[backend][0], truth_logits) <= 2 * error(results["eager"][0], truth_logits) + eps
    for got, plain, truth in zip(results[backend][1], results["eager"][1], truth_grads, strict=True):
        assert error(got, truth) <= 2 * error(plain, truth) + eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ten_steps_lower_the_loss_and_repeat_bit_for_bit(use, backend: str, name: str) -> None:
    use(backend)
    tokens = token_ids(4, 40).to(DEVICE)

    def train() -> tuple[list[float], list[Tensor]]:
        model = converted(name).to(DEVICE)
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        optimizer = torch.optim.AdamW(npt_parameters(model), lr=3e-3)
        with torch.no_grad(), npt_disabled(model), torch.autocast("cuda", torch.bfloat16):
            target = model(input_ids=tokens).logits.float()
        losses = []
        for _ in range(10):
            with torch.autocast("cuda", torch.bfloat16):
                logits = model(input_ids=tokens).logits
            loss = (logits.float() - target).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        for n, p in model.named_parameters():
            assert n not in frozen or torch.equal(p, frozen[n]), n
        return losses, [p.detach().clone() for p in npt_parameters(model)]

    first, again = train(), train()
    assert first[0][-1] < 0.9 * first[0][0], first[0]
    assert first[0] == again[0] and all(map(torch.equal, first[1], again[1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(use, backend: str, cache: str) -> None:
    """Greedy tokens of cached decoding are those of the whole forward, teacher-forced, in float32-safe bf16 margins."""
    use(backend)
    model = converted("llama").to(torch.bfloat16).to(DEVICE).eval()
    prompt = token_ids(2, 12).to(DEVICE)
    out = model.generate(prompt, max_new_tokens=16, do_sample=False, cache_implementation=cache, pad_token_id=0)
    with torch.no_grad():
        logits = model(input_ids=out).logits.float()
    chosen = logits[:, 11:-1].gather(-1, out[:, 12:, None])[..., 0]
    best = logits[:, 11:-1].amax(-1)
    assert bool((best - chosen <= 0.05 * best.abs() + 0.05).all()), (
        "a cached step chose what the whole forward would not"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager(use, backend: str) -> None:
    use(backend)
    model = converted("llama", layers=2).to(torch.bfloat16).to(DEVICE)
    tokens = token_ids(2, 24).to(DEVICE)
    with torch.no_grad():
        plain = model(input_ids=tokens).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=tokens).logits
    torch.testing.assert_close(compiled, plain, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 16, 200])
def test_a_cuda_graph_computes_the_same_and_repeats_bit_for_bit(use, backend: str, rows: int) -> None:
    """Outside of the graph torch may choose another attention kernel (seen at 200 tokens, on every backend): hence two checks."""
    use(backend)
    model = converted("llama", layers=1).to(torch.bfloat16).to(DEVICE)
    tokens = token_ids(1, rows).to(DEVICE)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                expected = model(input_ids=tokens, use_cache=False).logits.clone()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(input_ids=tokens, use_cache=False).logits
    replays = []
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        replays.append(out.clone())
    torch.cuda.synchronize()
    assert all(torch.equal(replays[0], again) for again in replays[1:])
    assert error(replays[0], expected.double().cpu()) < 4 * torch.finfo(torch.bfloat16).eps


def test_a_cuda_graph_follows_its_adapter() -> None:
    """The casts of fp32 masters are part of the graph, and nothing that the capture made is kept for eager calls."""
    component = converted("llama", layers=1).to(DEVICE).model.layers[0].np_component.float()
    with torch.no_grad():
        component.tensors(torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = component.tensors(torch.bfloat16).w_down * 1
        component.w_down.add_(1)
        graph.replay()
        assert torch.equal(out, component.w_down.bfloat16())
        assert torch.equal(component.tensors(torch.bfloat16).w_down, out)


def test_conversion_on_the_gpu_is_exact_at_full_rank() -> None:
    model = tiny_model("llama", layers=3, **SIZES["llama"]).to(DEVICE)
    tokens = token_ids(16, 64).to(DEVICE)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
    apply_npt(model, NPTConfig(layers="all", rank=1.0), calibration=tokens)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=tokens).logits, before, rtol=1e-3, atol=1e-3 * float(before.abs().max())
        )
    with torch.no_grad(), npt_disabled(model):
        assert torch.equal(model(input_ids=tokens).logits, before)


def test_an_adapter_written_on_the_gpu_loads_on_the_cpu(tmp_path) -> None:
    model = converted("llama").to(DEVICE)
    save_npt(model, tmp_path)
    other = tiny_model("llama", layers=3, **SIZES["llama"]).float()
    load_npt(other, tmp_path)
    for a, b in zip(npt_parameters(model), npt_parameters(other), strict=True):
        assert torch.equal(a.cpu(), b)
