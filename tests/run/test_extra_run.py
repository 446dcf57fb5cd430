"""A run that trains an extra change beside converted components: what trains, what stays, what is saved, resumed, refused."""

from __future__ import annotations

import pytest
import torch

from npt_kernels import load_npt, npt_parameters, remove_extra
from npt_kernels.configs.schema import ConfigError, RunConfig
from npt_kernels.model.extra import extra_components
from npt_kernels.model.save import adapter_state_dict
from tests.support.helpers import tiny_model, token_ids
from tests.support.runs import Blocks, records, start

MODEL = {"rank": 8, "basis": "pca", "extra_rank": 4}
TASK = {"objective": "task", "learning_rate": 1e-2, "save_steps": 5, "max_steps": 10}


def text():
    repeated = token_ids(1, 16).repeat(24, 1)
    return Blocks(repeated, token_ids(8, 16, 2), repeated[:6], ["one sequence"])


@pytest.mark.parametrize("rule", ["diagonal", "self_key"])
def test_only_the_extra_change_trains(tmp_path, rule):
    sections = {"model": MODEL | {"extra_rule": rule, "extra_layers": [0, 2], "extra_targets": ["gate", "down"]}}
    _, plain = start(tmp_path / "plain", sections={"model": {"rank": 8, "basis": "pca"}}, text=text(), mode="none")
    summary, model = start(tmp_path / "a", sections=sections, text=text(), **TASK)
    logged = records(tmp_path / "a", "train")
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.01
    assert summary.converted.npt_nll > summary.trained.npt_nll + 0.01
    assert list(extra_components(model)) == [0, 2] and list(extra_components(model)[0].target_shapes) == [
        "gate",
        "down",
    ]
    own, before = adapter_state_dict(model), adapter_state_dict(plain)
    assert all(torch.equal(own[name], tensor) for name, tensor in before.items())  # the components, bit for bit
    fresh = tiny_model("llama", layers=3)
    load_npt(fresh, tmp_path / "a" / "adapter")
    assert all(torch.equal(one, two) for one, two in zip(npt_parameters(model), npt_parameters(fresh), strict=True))
    remove_extra(fresh)
    ids = token_ids(1, 9)
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, plain(ids).logits)


def test_a_resumed_run_has_the_same_bits(tmp_path):
    _, model = start(tmp_path / "a", sections={"model": MODEL}, text=text(), **TASK)
    (checkpoint,) = (tmp_path / "a" / "checkpoints").glob("*5")
    _, again = start(tmp_path / "b", sections={"model": MODEL}, text=text(), resume=checkpoint, **TASK)
    assert all(torch.equal(one, two) for one, two in zip(npt_parameters(model), npt_parameters(again), strict=True))
    with pytest.raises(ConfigError, match=r"model\.extra_rank is 2, but"):
        start(tmp_path / "c", sections={"model": MODEL | {"extra_rank": 2}}, text=text(), resume=checkpoint, **TASK)
    with pytest.raises(
        ConfigError, match=r"an extra change of rank 4, rule diagonal; the configuration says model\.extra_rank=0"
    ):
        start(tmp_path / "d", sections={"model": {"rank": 8}}, text=text(), resume=tmp_path / "a" / "adapter")


def test_a_plain_adapter_gets_one(tmp_path):
    start(tmp_path / "plain", sections={"model": {"rank": 8, "basis": "pca"}}, text=text(), mode="none")
    _, model = start(
        tmp_path / "a", sections={"model": MODEL}, text=text(), resume=tmp_path / "plain" / "adapter", **TASK
    )
    assert len(extra_components(model)) == 3


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"extra_rank": 4}}, "set training.objective=task, or extra_rank=0"),
        ({"model": {"extra_rank": 4, "extra_rule": "nose"}, "training": {"objective": "task"}}, "model.extra_rule: "),
        (
            {"model": {"extra_rank": 4}, "training": {"objective": "task"}, "optimization": {"stream_layers": "host"}},
            "streamed",
        ),
    ],
)
def test_settings_that_do_not_agree_are_one_line(sections, message):
    with pytest.raises(ConfigError) as error:
        RunConfig.from_mapping(sections)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"), [({"extra_layers": [7]}, "contains 7"), ({"extra_targets": ["nose"]}, "nose")]
)
def test_what_the_model_has_not_is_one_line(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message) as error:
        start(tmp_path, sections={"model": MODEL | change}, text=text(), **TASK)
    assert "\n" not in str(error.value)
