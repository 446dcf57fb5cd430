"""Rates of named GPUs for predictions: the makers' data-sheet numbers, and how much of them a run is assumed to reach.

Everything computed from these is *predicted*, not measured.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import torch

from ..configs.schema import ConfigError

__all__ = [
    "COMPUTE_EFFICIENCY", "GPUS", "GPUS_PER_MACHINE", "NETWORK_GBS", "TRANSFER_EFFICIENCY", "Gpu", "find_gpu", "gpu_with",
    "local_gpu", "parse_size",
]  # fmt: skip

#: Share of the dense peak that the products of a step are assumed to reach, and of the rates of memory, PCIe and links.
COMPUTE_EFFICIENCY, TRANSFER_EFFICIENCY = 0.5, 0.8
#: Between machines, one direction, GB/s per GPU: 400 Gb/s (assumed), and GPUs that one machine has at most (assumed).
NETWORK_GBS, GPUS_PER_MACHINE = 50.0, 8


@dataclass(frozen=True)
class Gpu:
    """Data-sheet numbers.

    Attributes:
        name: As users write it.
        tflops: Dense bfloat16 with float32 accumulation, 10¹² per second (sheets often print the sparse one, twice that).
        memory_gbs: Device memory, GB/s.
        memory_gib: Usable device memory, GiB, about what the driver reports.
        pcie_gbs: Host to device, one direction, GB/s, nominal.
        link_gbs: To other GPUs of the node, one direction, GB/s; PCIe where there is no NVLink.
        source: Where the numbers stand.
    """

    name: str
    tflops: float
    memory_gbs: float
    memory_gib: float
    pcie_gbs: float
    link_gbs: float
    source: str

    def link(self, devices: int) -> float:
        """Bytes per second to the others of a group of that many, by the slowest part of the way."""
        rate = self.link_gbs if devices <= GPUS_PER_MACHINE else min(self.link_gbs, NETWORK_GBS)
        return rate * 1e9 * TRANSFER_EFFICIENCY

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * 2**30)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("B200", 2250, 8000, 178, 64, 900, "NVIDIA HGX B200 data sheet"),
        Gpu("H200", 989, 4800, 139, 64, 450, "NVIDIA H200 data sheet (SXM)"),
        Gpu("H100", 989, 3350, 79, 64, 450, "NVIDIA H100 data sheet (SXM)"),
        Gpu("H100-PCIe", 756, 2000, 79, 64, 300, "NVIDIA H100 data sheet (PCIe, NVLink bridge)"),
        Gpu("A100", 312, 2039, 79, 32, 300, "NVIDIA A100 data sheet (SXM, 80 GB)"),
        Gpu("A100-40GB", 312, 1555, 39, 32, 300, "NVIDIA A100 data sheet (SXM, 40 GB)"),
        Gpu("L40S", 362, 864, 44, 32, 32, "NVIDIA L40S data sheet"),
        Gpu("RTX5090", 209.5, 1792, 31, 64, 64, "NVIDIA RTX Blackwell architecture paper"),
        Gpu("RTX4090", 165.2, 1008, 23.5, 32, 32, "NVIDIA Ada architecture paper"),
        Gpu("RTX3090", 71, 936, 23.5, 32, 32, "NVIDIA GA102 architecture paper"),
        Gpu("L4", 121, 300, 22, 32, 32, "NVIDIA L4 data sheet"),
        Gpu("A10", 125, 600, 22, 32, 32, "NVIDIA A10 data sheet"),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, however it is written (``h100``, ``NVIDIA H100 80GB HBM3``, ``4090``).

    Raises :class:`ConfigError` naming the known ones.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    there = {*words, *(a + b for a, b in itertools.pairwise(words))}  # "RTX 4090" is also "RTX4090"
    # Longest first: "H100-PCIe" must not be found as "H100".
    for gpu in sorted(GPUS.values(), key=lambda g: -len(g.name)):
        wanted = set(re.findall(r"[a-z0-9]+", gpu.name.lower()))
        if wanted <= there or gpu.name.lower().removeprefix("rtx") in there:
            return gpu
    raise ConfigError(f"--gpu {name!r} is not known; choose one of {', '.join(GPUS)}, or give --gpu-memory alone")


def gpu_with(memory: int) -> Gpu:
    """The known GPU whose memory is closest to that many bytes."""
    return min(GPUS.values(), key=lambda gpu: (abs(gpu.memory_bytes - memory), -gpu.tflops))


def local_gpu() -> Gpu | None:
    """The GPU of this machine, if it is a known one."""
    if not torch.cuda.is_available():
        return None
    try:
        return find_gpu(torch.cuda.get_device_name())
    except ConfigError:
        return None


_UNITS = {"": 2**30, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_size(text: str, argument: str) -> int:
    """Bytes of ``24GiB``, ``24GB``, ``512MiB`` or ``24`` (GiB). Raises :class:`ConfigError` naming the argument."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)(b?)\s*", text.lower())
    if match is None or (match[3] and not match[2]) or float(match[1]) <= 0:
        raise ConfigError(f"{argument} {text!r} is not a size; write it like 24GiB, 80GB or 512MiB")
    number, prefix, binary, byte = match.groups()
    unit = _UNITS[prefix or byte]
    if binary:
        unit = 1024 ** (" kmgt".index(prefix))
    return int(float(number) * unit)
