"""``npt_disabled`` with several threads, overlapping blocks, recomputation: whoever is inside sees the original, nobody else."""

from __future__ import annotations

import copy
import threading
from contextlib import ExitStack

import pytest
import torch

from npt_kernels import NPTConfig, apply_npt, npt_disabled, npt_parameters
from npt_kernels.model.install import converted_layers
from tests.support.helpers import randomise, tiny_model, token_ids

IDS = token_ids()


def converted(name="llama"):
    model = tiny_model(name)
    apply_npt(model, NPTConfig(layers="all", rank=8))
    randomise(model)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_a_teacher_and_a_server_side_by_side():
    model = converted()
    on = logits(model)
    with npt_disabled(model):
        off = logits(model)
    assert not torch.equal(on, off)
    inside, done = threading.Event(), threading.Event()
    wrong: list[str] = []

    def teach():
        for _ in range(40):
            with npt_disabled(model):
                inside.set()
                if not torch.equal(logits(model), off):
                    wrong.append("the teacher saw the converted model")
        done.set()

    thread = threading.Thread(target=teach)
    thread.start()
    inside.wait(10)
    served = 0
    while not done.is_set():
        if not torch.equal(logits(model), on):
            wrong.append("the server saw the original")
        served += 1
    thread.join()
    assert not wrong and served > 5
    assert torch.equal(logits(model), on)


def test_two_threads_that_leave_in_another_order():
    model = converted()
    on = logits(model)
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    states = {}

    def first():
        with npt_disabled(model):
            first_in.set()
            second_in.wait(10)
        states["first"] = torch.equal(logits(model), on)
        first_out.set()

    def second():
        first_in.wait(10)
        with npt_disabled(model):
            second_in.set()
            first_out.wait(10)
            states["second inside"] = not torch.equal(logits(model), on)
        states["second"] = torch.equal(logits(model), on)

    threads = [threading.Thread(target=f) for f in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states == {"first": True, "second inside": True, "second": True}
    assert torch.equal(logits(model), on)


def test_blocks_of_one_thread_that_overlap():
    model = converted()
    on = logits(model)
    one, two = ExitStack(), ExitStack()
    one.enter_context(npt_disabled(model))
    two.enter_context(npt_disabled(model))
    one.close()
    assert not torch.equal(logits(model), on), "the second block goes on"
    two.close()
    assert torch.equal(logits(model), on)


def test_a_copy_made_inside_is_another_model():
    model = converted()
    on = logits(model)
    with npt_disabled(model):
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin), on)
    assert torch.equal(logits(twin), on)


def test_one_layer_switched_off():
    model = converted()
    on = logits(model)
    layers = converted_layers(model)
    layers[2].np_component.enabled = False
    part = logits(model)
    with npt_disabled(model):
        off = logits(model)
    assert not torch.equal(part, on) and not torch.equal(part, off)
    assert not layers[2].np_component.enabled and layers[1].np_component.enabled
    layers[2].np_component.enabled = True
    assert torch.equal(logits(model), on)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recomputation_sees_what_the_forward_saw(name, reentrant):
    model = converted(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients(checkpointing, disabled_in_backward=False):
        model.gradient_checkpointing_disable()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        loss = model(input_ids=IDS, use_cache=False).logits.square().mean()
        if disabled_in_backward:
            with npt_disabled(model):
                loss.backward()
        else:
            loss.backward()
        return [p.grad.clone() for p in npt_parameters(model)]

    want = gradients(False)
    for disabled in (False, True):
        got = gradients(True, disabled)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
