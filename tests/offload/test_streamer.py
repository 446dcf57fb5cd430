"""Streamed models compute what resident ones do, bit for bit, with two buffers alive, and are left as they were."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from npt_kernels import NPTConfig, apply_npt, npt_disabled, npt_parameters, remove_npt
from npt_kernels.evaluation.fidelity import layer_fidelity
from npt_kernels.evaluation.perplexity import evaluate
from npt_kernels.kernels import native
from npt_kernels.measure.live_bytes import LiveBytes
from npt_kernels.model.install import converted_layers
from npt_kernels.model.select import find_layers
from npt_kernels.offload import LayerStreamer
from npt_kernels.offload.weights import layer_tensors
from npt_kernels.run.fingerprint import base_fingerprint
from npt_kernels.training.objectives import KLObjective, LayerObjective, LocalObjective, enable_checkpointing
from tests.support.helpers import randomise, tiny_model, token_ids

FAMILIES = ["llama", "gpt2"]
WHERE = ["host", "disk"]


def converted(family="llama", layers="all", count=4, **settings):
    model = tiny_model(family, layers=count)
    apply_npt(model, NPTConfig(layers=layers, **{"rank": 6, "init": "small", **settings}))
    randomise(model)
    return model


def backward(loss):
    loss.backward()


def gradients(model):
    return [p.grad.clone() for p in npt_parameters(model)]


def state(model):
    """Everything a user could notice: objects, devices, layouts, numbers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        n: (id(t), t.device, t.dtype, t.shape, t.stride(), t.requires_grad, t.detach().clone())
        for n, t in tensors.items()
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, (*facts, numbers) in before.items():
        assert facts == list(after[name][:-1]), name
        assert torch.equal(numbers, after[name][-1]), name


def assert_no_traces(model):
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "npt_residence" not in module.__dict__
    gc.collect()


@pytest.fixture
def torch_alone(monkeypatch):
    """For what is compared bit for bit with a run under NotAtHome: under a dispatch mode torch does the compiled code's work."""
    monkeypatch.setattr(native, "compiled", None)


class NotAtHome(TorchDispatchMode):
    """Raises when anything computes with a weight in its home: on a GPU that would be host memory."""

    def __init__(self, streamer):
        super().__init__()
        self.homes = {t.untyped_storage().data_ptr() for weights in streamer._weights for t in weights._home}
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "linear", "mul", "add", "mlp", "mlp_backward"):
            self.products += name != "mul"
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor):
                    source = getattr(tensor, "source", None)  # of a quantised weight, which has no memory of its own
                    for part in [tensor] if source is None else source.parameters():
                        if part.untyped_storage().data_ptr() in self.homes:
                            raise AssertionError(f"{name} reads a weight of shape {list(part.shape)} in its home")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", WHERE)
def test_forwards_are_bitwise_those_of_the_resident_model(family, where, tmp_path):
    model, ids = converted(family), token_ids()
    before = state(model)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with npt_disabled(model):
            original = model(input_ids=ids).logits
    with LayerStreamer(model, "cpu", where=where, folder=tmp_path) as streamer, torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(input_ids=ids).logits, expected)
        with npt_disabled(model):
            assert torch.equal(model(input_ids=ids).logits, original)
        assert streamer.transfers.fetches >= 16
    assert_same(before, state(model))
    assert_no_traces(model)
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("where", WHERE)
def test_layers_arrive_ahead_and_once_per_visit(where, tmp_path):
    model, ids = converted(count=5), token_ids()
    with LayerStreamer(model, "cpu", where=where, folder=tmp_path) as streamer, torch.no_grad():
        for walk in range(1, 4):
            model(input_ids=ids)
            assert streamer.transfers.misses == 1  # the very first layer
            assert streamer.transfers.fetches == 5 * walk + 1  # and one ahead
        assert streamer.transfers.bytes == streamer.transfers.fetches * streamer.layer_bytes[0]
        assert streamer.transfers.host_seconds > 0


@pytest.mark.usefixtures("torch_alone")
@pytest.mark.parametrize("per_visit", [1, 3])
def test_local_training_fetches_a_layer_once_for_all_micro_batches_of_a_visit(per_visit):
    model = converted(layers=[0, 1, 2], count=5)
    objective = LocalObjective(model, micro_batches_per_layer=per_visit)
    batches, shares = [token_ids(seed=s) for s in range(3)], [0.2, 0.3, 0.5]
    objective.accumulate_group(batches, shares, backward)
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    visits = 3 // per_visit
    with LayerStreamer(model, "cpu") as streamer:
        for step in range(4):
            start = streamer.transfers.fetches
            with NotAtHome(streamer) as guard:
                objective.accumulate_group(batches, shares, backward)
            assert guard.products > 20
            assert all(torch.equal(a, b) for a, b in zip(gradients(model), expected, strict=True))
            model.zero_grad(set_to_none=True)
            if step > 1:  # by then it has learned that the walk ends at layer 2
                assert streamer.transfers.fetches - start == 3 * visits
        assert streamer.transfers.misses <= 3


@pytest.mark.usefixtures("torch_alone")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [KLObjective, LayerObjective])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("where", WHERE)
def test_end_to_end_backward_meets_the_layers_in_reverse(family, kind, checkpointing, where, tmp_path):
    model, ids = converted(family, layers=[1, 2, 3], rule="rank1"), token_ids()
    objective = kind(model, regularization_weight=0.01)
    enable_checkpointing(model, checkpointing)
    expected_loss = objective.accumulate(ids, 1.0, backward).loss
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    with LayerStreamer(model, "cpu", where=where, folder=tmp_path) as streamer:
        for _ in range(3):
            start = streamer.transfers.fetches
            with NotAtHome(streamer) as guard:
                assert torch.equal(objective.accumulate(ids, 1.0, backward).loss, expected_loss)
            assert guard.products > 20
            assert all(torch.equal(a, b) for a, b in zip(gradients(model), expected, strict=True))
            model.zero_grad(set_to_none=True)
        # teacher, student and the way back, each layer once in each, and a few wrong guesses at the turns
        assert streamer.transfers.fetches - start <= 3 * 4 + 4


def test_two_buffers_are_alive_whatever_the_number_of_layers():
    peaks = {}
    for count in (3, 9):
        model, ids = converted(count=count, layers=[0]), token_ids(1, 4)
        for p in npt_parameters(model):
            p.grad = torch.zeros_like(p)
        streamer = LayerStreamer(model, "cpu")
        with streamer:
            assert streamer.device_bytes == 2 * max(streamer.layer_bytes)
            with LiveBytes() as live, torch.no_grad():
                model(input_ids=ids, use_cache=False)
            peaks[count] = live.peak
            storages = {
                t.untyped_storage().data_ptr()
                for index, layer in enumerate(find_layers(model)[1])
                for t in layer_tensors(layer).values()
                if t.dim() == 2 and index == streamer._current
            }
            assert len(storages) == 1  # the layer at work lies in one buffer
    assert peaks[3] == peaks[9]  # a visit allocates nothing that stays


def test_layers_of_different_sizes_and_ties():
    """Layers of their own widths, a Parameter that two layers share, tied embeddings, views of one storage."""
    model = tiny_model("llama", layers=4, tie_word_embeddings=True)
    layers = find_layers(model)[1]
    wide = tiny_model("llama", layers=1, intermediate_size=80, seed=3)
    layers[2] = find_layers(wide)[1][0]
    layers[2].self_attn.layer_idx = 2
    layers[3].self_attn.o_proj.weight = layers[0].self_attn.o_proj.weight
    both = torch.randn(64, 32)
    layers[1].self_attn.q_proj.weight.data = both[:32]
    layers[1].self_attn.o_proj.weight.data = both[16:48].t()
    apply_npt(model, NPTConfig(layers="all", rank=4, init="small"))
    ids = token_ids()
    before = state(model)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    with LayerStreamer(model, "cpu") as streamer, torch.no_grad():
        assert len(set(streamer.layer_bytes)) > 1
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert layers[3].self_attn.o_proj.weight is layers[0].self_attn.o_proj.weight
    assert_same(before, state(model))
    q, o = layers[1].self_attn.q_proj.weight, layers[1].self_attn.o_proj.weight
    assert q.untyped_storage().data_ptr() == o.untyped_storage().data_ptr()


class Int8Linear(nn.Linear):
    """A weight kept as an int8 buffer and scales."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (linear.weight.detach() / scale).round().to(torch.int8)
        del self.weight
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale)


def test_integer_buffers_are_streamed():
    model, ids = tiny_model("llama", layers=3), token_ids()
    for layer in find_layers(model)[1]:
        layer.self_attn.q_proj = Int8Linear(layer.self_attn.q_proj)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    before = state(model)
    with LayerStreamer(model, "cpu") as streamer, torch.no_grad():
        layer = find_layers(model)[1][0]
        home = layer.self_attn.q_proj.codes.data_ptr()
        assert torch.equal(model(input_ids=ids).logits, expected)
        streamer.acquire(0)
        assert layer.self_attn.q_proj.codes.data_ptr() != home
        streamer.acquire(1)
        assert layer.self_attn.q_proj.codes.data_ptr() == home
    assert_same(before, state(model))


def test_tensor_subclasses_are_taken_apart_and_wrapped_anew():
    ao = pytest.importorskip("torchao.quantization")
    model, ids = tiny_model("llama", layers=3), token_ids()
    for layer in find_layers(model)[1]:
        linear = layer.self_attn.q_proj
        linear.weight = nn.Parameter(ao.Int8Tensor.from_hp(linear.weight.detach(), ao.PerRow()), requires_grad=False)
    objects = [layer.self_attn.q_proj.weight for layer in find_layers(model)[1]]
    codes = [weight.qdata.clone() for weight in objects]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    with LayerStreamer(model, "cpu") as streamer, torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert torch.equal(model(input_ids=ids).logits, expected)
        streamer.acquire(1)
        weight = find_layers(model)[1][1].self_attn.q_proj.weight
        assert weight is not objects[1] and weight.qdata.untyped_storage().nbytes() == max(streamer.layer_bytes)
    for layer, weight, numbers in zip(find_layers(model)[1], objects, codes, strict=True):
        assert layer.self_attn.q_proj.weight is weight and torch.equal(weight.qdata, numbers)
        assert weight.qdata.untyped_storage().nbytes() == weight.qdata.nbytes


@pytest.mark.usefixtures("torch_alone")
@pytest.mark.parametrize("format", ["int8", "nf4"])
@pytest.mark.parametrize("kind", [LocalObjective, KLObjective])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_quantised_bases_are_streamed_in_their_codes(format, kind, checkpointing):
    pytest.importorskip("bitsandbytes")
    from npt_kernels.conversion.quantise import quantise_base

    def quantised():
        model = tiny_model("llama", layers=3, hidden_size=64, intermediate_size=128)
        quantise_base(model, format)
        apply_npt(model, NPTConfig(layers="all", rank=6, init="small"))
        randomise(model)
        enable_checkpointing(model, checkpointing and kind is KLObjective)
        return model

    model, ids = quantised(), token_ids()
    expected_loss = kind(model).accumulate(ids, 1.0, backward).loss
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    before = state(model)
    with LayerStreamer(model, "cpu") as streamer:
        dense = sum(
            p.numel()
            for p in tiny_model("llama", layers=1, hidden_size=64, intermediate_size=128).model.layers.parameters()
        )
        assert max(streamer.layer_bytes) < (1.3 if format == "int8" else 0.8) * dense
        for _ in range(2):
            with NotAtHome(streamer):
                assert torch.equal(kind(model).accumulate(ids, 1.0, backward).loss, expected_loss)
            assert all(torch.equal(a, b) for a, b in zip(gradients(model), expected, strict=True))
            model.zero_grad(set_to_none=True)
    assert_same(before, state(model))


def test_training_moves_only_the_components():
    model = converted()
    optimizer = torch.optim.AdamW(npt_parameters(model), lr=1e-2)
    resident = converted()
    other = torch.optim.AdamW(npt_parameters(resident), lr=1e-2)
    fingerprint = base_fingerprint(model)
    with LayerStreamer(model, "cpu"):
        for step in range(3):
            for m, o in ((model, optimizer), (resident, other)):
                LocalObjective(m).accumulate(token_ids(seed=step), 1.0, backward)
                o.step()
                o.zero_grad(set_to_none=True)
        assert base_fingerprint(model) == fingerprint  # inside too: between visits a layer is at home
    assert base_fingerprint(model) == fingerprint
    assert all(torch.equal(a, b) for a, b in zip(npt_parameters(model), npt_parameters(resident), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_conversion_evaluation_and_generation_inside(family):
    """The whole life of a run: closed form with Fisher and refit, evaluation, fidelity, generation, removal."""
    text, heldout = token_ids(12, 24), token_ids(2, 16, seed=9)

    def life(model):
        report = apply_npt(model, NPTConfig(layers="all", rank="auto:8"), calibration=text)
        result, fidelity = evaluate(model, heldout), layer_fidelity(model, heldout)
        tokens = model.generate(input_ids=heldout[:1, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
        weights = [p.detach().clone() for p in npt_parameters(model)]
        return str(report), result, fidelity, tokens, weights

    expected = life(tiny_model(family, layers=3))
    model = tiny_model(family, layers=3)
    with LayerStreamer(model, "cpu"):
        actual = life(model)
        assert actual[:3] == expected[:3] and torch.equal(actual[3], expected[3])
        assert all(torch.equal(a, b) for a, b in zip(actual[4], expected[4], strict=True))
        remove_npt(model)
    assert_same(
        {n: v[1:] for n, v in state(tiny_model(family, layers=3)).items()}, {n: v[1:] for n, v in state(model).items()}
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("basis", ["fisher", "pca"])
def test_nothing_in_the_life_of_a_run_computes_with_a_weight_at_home(family, basis):
    """In bf16, where the closed form's casts to float32 are copies; on a GPU they bring the weights over."""
    model = tiny_model(family, layers=3).bfloat16()
    heldout = token_ids(2, 16, seed=9)
    with LayerStreamer(model, "cpu") as streamer, NotAtHome(streamer) as guard:
        apply_npt(model, NPTConfig(layers=[0, 2], rank=8, basis=basis), calibration=token_ids(12, 24))
        evaluate(model, heldout)
        layer_fidelity(model, heldout)
        LayerObjective(model).accumulate(heldout, 1.0, backward)
        with npt_disabled(model):
            model.generate(input_ids=heldout[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert guard.products > 100


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("moment", ["forward", "backward", "visit"])
def test_an_error_inside_leaves_the_model_restored(where, moment, tmp_path):
    model = converted()
    before = state(model)
    handle = None

    def fail(*_):
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"), LayerStreamer(model, "cpu", where=where, folder=tmp_path):
        if moment == "forward":
            handle = find_layers(model)[1][2].self_attn.register_forward_hook(fail)
            model(input_ids=token_ids())
        elif moment == "backward":
            KLObjective(model).accumulate(token_ids(), 1.0, fail)
        else:
            LocalObjective(model).accumulate_group([token_ids()], [1.0], fail)
    if handle is not None:
        handle.remove()
    assert_same(before, state(model))
    assert_no_traces(model)


def test_inference_mode_is_no_trap():
    model, ids = converted(), token_ids()
    with LayerStreamer(model, "cpu"):
        with torch.inference_mode():
            model(input_ids=ids)
        LocalObjective(model).accumulate(ids, 1.0, backward)
    assert not any(p.is_inference() for p in model.parameters())


def test_a_weight_that_is_written_to_is_an_error_not_a_loss():
    model, ids = converted(), token_ids()
    layers = find_layers(model)[1]
    before = state(model)

    def write(module, *_):
        module.q_proj.weight.add_(1)

    handle = layers[1].self_attn.register_forward_hook(write)
    message = r"layer 1: self_attn\.q_proj\.weight was written"
    with torch.no_grad(), pytest.raises(RuntimeError, match=message), LayerStreamer(model, "cpu"):
        model(input_ids=ids)
    handle.remove()
    assert_same(before, state(model))
    with pytest.raises(RuntimeError, match=message), LayerStreamer(model, "cpu") as streamer:  # at the end, too
        streamer.acquire(1)
        with torch.no_grad():
            layers[1].self_attn.q_proj.weight.add_(1)


def test_bad_uses_are_named(tmp_path):
    model, ids = tiny_model("llama", layers=3), token_ids()
    with LayerStreamer(model, "cpu"), pytest.raises(RuntimeError, match=r"layer 0: .* requires a gradient.*apply_npt"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="where='gpu'"):
        LayerStreamer(model, "cpu", where="gpu")
    with torch.device("meta"):
        meta = type(model)(model.config)
    with pytest.raises(ValueError, match=r"layer 0: .*meta.*load the model"), LayerStreamer(meta, "cpu"):
        pass
    assert_no_traces(meta)
    with LayerStreamer(model, "cpu") as streamer:
        with pytest.raises(RuntimeError, match="already in use"):
            streamer.__enter__()
        with pytest.raises(RuntimeError, match="already moved"), LayerStreamer(model, "cpu"):
            pass
    assert_no_traces(model)
    with pytest.raises(FileNotFoundError), LayerStreamer(model, "cpu", where="disk", folder=tmp_path / "none"):
        pass
    assert_no_traces(model)
    model = converted()
    with LayerStreamer(model, "cpu"):
        loss = model(input_ids=ids).logits.sum()
    with pytest.raises(RuntimeError, match="outside its LayerStreamer"):
        loss.backward()


def test_a_model_with_a_device_map_is_refused():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(tiny_model("llama", layers=2), {"": "cpu"}, force_hooks=True)
    with pytest.raises(ValueError, match="device_map"):
        LayerStreamer(model, "cpu")


def test_adapters_of_a_streamed_model_save_and_fit_the_resident_one(tmp_path):
    from npt_kernels import load_npt, save_npt

    model = converted()
    with LayerStreamer(model, "cpu"):
        save_npt(model, tmp_path)
    fresh = tiny_model("llama", layers=4)
    with LayerStreamer(fresh, "cpu"):
        load_npt(fresh, tmp_path)
        with torch.no_grad():
            inside = fresh(input_ids=token_ids()).logits
    with torch.no_grad():
        assert torch.equal(model(input_ids=token_ids()).logits, inside)
    assert set(converted_layers(fresh)) == {0, 1, 2, 3}
