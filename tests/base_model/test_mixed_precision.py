"""``mixed_precision: auto``: what the machine can, said and recorded; a wish that the machine makes slow is warned of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from npt_kernels.base_model import mixed_precision as precision
from npt_kernels.base_model.mixed_precision import bf16_arithmetic, choose_mixed_precision, settle_mixed_precision
from npt_kernels.configs import load_run_config, named_configs
from npt_kernels.configs.schema import RunConfig
from npt_kernels.run.resume import find_resume, resumed_config
from tests.support.plan_cases import config_of
from tests.support.runs import start

CPU = torch.device("cpu")


def machine(monkeypatch: pytest.MonkeyPatch, *, onednn: bool, avx512_bf16: bool, amx: bool) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(precision, "_onednn_takes_bf16", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")


@pytest.mark.parametrize(
    ("onednn", "avx512_bf16", "amx", "chosen"),
    [
        (True, True, True, "bf16"),
        (True, True, False, "bf16"),
        (True, False, False, "no"),  # AVX-512 without bf16: oneDNN emulates
        (False, False, False, "no"),
    ],
)
def test_auto_follows_the_cpu(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, avx512_bf16: bool, amx: bool, chosen: str
) -> None:
    machine(monkeypatch, onednn=onednn, avx512_bf16=avx512_bf16, amx=amx)
    config = RunConfig()
    assert config.optimization.mixed_precision == "auto", "the default"
    assert choose_mixed_precision(config, CPU) == chosen
    line = settle_mixed_precision(config, CPU)
    assert line is not None and f"auto is {chosen}" in line
    assert config.optimization.mixed_precision == chosen, "recorded"
    assert settle_mixed_precision(config, CPU) is None, "nothing is left to say"


def test_another_machine_can_be_imitated() -> None:
    code = "import torch\nfrom npt_kernels.base_model.mixed_precision import bf16_arithmetic as b\nprint(b(torch.device('cpu')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    )
    assert done.stdout.startswith("(False, 'ONEDNN_MAX_CPU_ISA=AVX2"), done.stderr


def test_bf16_by_name_on_a_cpu_without_it_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, onednn=False, avx512_bf16=False, amx=False)
    config = RunConfig.from_mapping({"optimization": {"mixed_precision": "bf16"}})
    line = settle_mixed_precision(config, CPU)
    assert line is not None and "8 times" in line and "25 times" in line
    assert config.optimization.mixed_precision == "bf16", "asked for is asked for"
    machine(monkeypatch, onednn=True, avx512_bf16=True, amx=False)
    assert settle_mixed_precision(config, CPU) is None


def test_no_shipped_configuration_fixes_a_precision() -> None:
    for name in named_configs():
        assert load_run_config(name, None, []).optimization.mixed_precision == "auto", name


@pytest.mark.parametrize("has", [True, False])
def test_a_run_says_records_and_keeps_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    machine(monkeypatch, onednn=has, avx512_bf16=has, amx=False)
    chosen = "bf16" if has else "no"
    sections = {"optimization": {"mixed_precision": "auto"}}
    start(tmp_path / "a", sections=sections, max_steps=2, save_steps=1)
    assert f"mixed_precision: auto is {chosen}" in start.output
    record = load_run_config(None, tmp_path / "a" / "config.yaml", [])
    assert record.optimization.mixed_precision == chosen
    # Gone on with on a machine of the other kind: the run's own precision.
    machine(monkeypatch, onednn=not has, avx512_bf16=not has, amx=False)
    file = tmp_path / "again.yaml"
    file.write_text((tmp_path / "a" / "config.yaml").read_text().replace(f"mixed_precision: '{chosen}'", "mixed_precision: auto")
                    .replace(f"mixed_precision: {chosen}", "mixed_precision: auto"))  # fmt: skip
    assert load_run_config(None, file, []).optimization.mixed_precision == "auto"
    resumed = resumed_config(find_resume(tmp_path / "a"), tmp_path / "a", file=file)
    assert resumed.optimization.mixed_precision == chosen


def test_the_plan_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    from npt_kernels.estimate.storage import Precision

    for has in (True, False):
        machine(monkeypatch, onednn=has, avx512_bf16=has, amx=False)
        planned = Precision.of(config_of(optimization__mixed_precision="auto"), CPU)
        assert planned.compute == (torch.bfloat16 if has else torch.float32)


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert bf16_arithmetic(gpu)[0] or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, has in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert bf16_arithmetic(gpu) == (
            has,
            f"compute capability {capability[0]}.{capability[1]} has {'' if has else 'no '}bf16 arithmetic",
        )
    assert not bf16_arithmetic(torch.device("mps"))[0]
    assert json.dumps(bf16_arithmetic(CPU))
