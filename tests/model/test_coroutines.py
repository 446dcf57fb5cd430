"""``npt_disabled`` and ``npt_scale`` in coroutines: one serves the converted model while another is inside the block."""

from __future__ import annotations

import asyncio
import contextvars

import pytest
import torch

from npt_kernels import NPTConfig, apply_npt, npt_disabled, npt_scale
from tests.support.helpers import randomise, tiny_model, token_ids

IDS = token_ids()


def converted():
    model = tiny_model("llama", layers=2)
    apply_npt(model, NPTConfig(layers="all", rank=8))
    randomise(model)
    return model


def references(model, logits):
    with npt_disabled(model):
        off = logits()
    with npt_scale(model, 0.5):
        half = logits()
    on = logits()
    assert not torch.equal(on, off) and not torch.equal(on, half)
    return {"on": on, "off": off, "half": half}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_teacher_a_server_and_a_scaled_one_in_one_loop(compiled):
    model = converted()

    def forward(ids):
        return model(ids, use_cache=False).logits

    if compiled:
        forward = torch.compile(forward, backend="eager", fullgraph=True)

    def logits():
        with torch.no_grad():
            return forward(IDS)

    want = references(model, logits)
    wrong, calls = [], {name: 0 for name in want}

    async def runs(name, block):
        for _ in range(6):
            with block():
                for _ in range(3):
                    if not torch.equal(logits(), want[name]):
                        wrong.append(name)
                    calls[name] += 1
                    await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def serve(task):
        while not task.done():
            if not torch.equal(logits(), want["on"]):
                wrong.append("on")
            calls["on"] += 1
            await asyncio.sleep(0)

    async def main():
        blocks = {"off": lambda: npt_disabled(model), "half": lambda: npt_scale(model, 0.5)}
        await serve(asyncio.gather(*(runs(name, blocks[name]) for name in ("off", "half", "off"))))

    asyncio.run(main())
    assert not wrong
    assert calls["off"] == 36 and calls["half"] == 18 and calls["on"] > 18
    assert torch.equal(logits(), want["on"])


def test_what_a_task_takes_along():
    """A task, and a function sent to a thread, begin as the coroutine was that started them; what they do stays theirs."""
    model = converted()

    def logits():
        with torch.no_grad():
            return model(IDS).logits

    want = references(model, logits)
    seen = {}

    async def child(name):
        seen[name] = logits()
        with npt_scale(model, 0.5, layers=[0]):
            await asyncio.sleep(0)

    async def main():
        with npt_disabled(model):
            await asyncio.create_task(child("a task started inside"))
            seen["a thread given a function inside"] = await asyncio.to_thread(logits)
            loop = asyncio.get_running_loop()
            seen["a bare executor"] = await loop.run_in_executor(None, logits)
            later = asyncio.create_task(child("started inside, run after"))
        seen["after the block"] = logits()
        await later
        seen["at the end"] = logits()

    asyncio.run(main())
    expected = {
        "a task started inside": "off", "a thread given a function inside": "off", "a bare executor": "on",
        "started inside, run after": "off", "after the block": "on", "at the end": "on",
    }  # fmt: skip
    assert {name: next(k for k, v in want.items() if torch.equal(v, y)) for name, y in seen.items()} == expected


def test_a_block_that_is_left_in_another_context_leaves_nothing_there():
    """As an asynchronous generator does when it is closed from elsewhere."""
    model = converted()
    block, here = npt_disabled(model), contextvars.copy_context()
    here.run(block.__enter__)
    components = [layer.np_component for layer in model.model.layers]
    assert all(component.enabled for component in components)
    assert not any(here.run(lambda: [component.enabled for component in components]))
    block.__exit__(None, None, None)
    assert all(component.enabled for component in components)
