"""Names and sizes that users write, and rates."""

from __future__ import annotations

import pytest

from npt_kernels.configs.schema import ConfigError
from npt_kernels.estimate.devices import GPUS, find_gpu, gpu_with, parse_size


@pytest.mark.parametrize("name", list(GPUS))
def test_every_gpu_is_found_by_its_name(name: str) -> None:
    assert find_gpu(name).name == name
    assert find_gpu(name.lower()).name == name


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100-PCIe"), ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"), ("4090", "RTX4090"), ("nvidia l4", "L4"), ("NVIDIA L40S", "L40S"),
    ],
)  # fmt: skip
def test_gpus_as_drivers_and_people_write_them(written: str, name: str) -> None:
    assert find_gpu(written).name == name


@pytest.mark.parametrize("name", ["", "H1000", "TPU"])
def test_an_unknown_gpu_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is not known; choose one of B200, H200"):
        find_gpu(name)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("24", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 GiB", 3 * 2**29), ("512mib", 2**29),
     ("24G", 24 * 10**9), ("1TiB", 2**40), ("1000b", 1000)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["", "GiB", "24 apples", "-1GiB", "0", "24iB", "24GiBs"])
def test_what_is_no_size_names_the_argument(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory"):
        parse_size(text, "--gpu-memory")


def test_memory_alone_picks_the_closest_gpu() -> None:
    assert gpu_with(24 * 2**30).name == "RTX4090"
    assert gpu_with(80 * 10**9).name == "H100"
    assert gpu_with(141 * 10**9).name == "H200"
