"""What ``npt env`` prints: everything a bug report needs, found without starting CUDA work or touching the network."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from ._version import __version__
from .base_model.assets import default_cache_dir, demo_model_cached, demo_texts_cached
from .kernels import native
from .ops.registry import BACKENDS, Call

__all__ = ["describe"]

_LIBRARIES = (
    "torch", "triton", "transformers", "accelerate", "datasets", "safetensors", "gguf", "pydantic", "rich", "typer",
)  # fmt: skip
_VARIABLES = (
    "NPT_BACKEND",
    "NPT_CACHE_DIR",
    "NPT_DEBUG",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)


def describe() -> dict[str, dict[str, str]]:
    """Group → name → value, all text."""
    return {
        "npt_kernels": {"version": __version__, "installed as": _install_type(), "from": str(Path(__file__).parent)},
        "python": {"version": platform.python_version(), "system": platform.platform()},
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "hardware": _hardware(),
        "backends": _backends(),
        "caches": _caches(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ} or {"(none set)": ""},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _install_type() -> str:
    try:
        direct = metadata.distribution("npt_kernels").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return "source tree, not installed"
    if direct is None:
        return "wheel from a package index"
    data = json.loads(direct)
    return ("editable from " if data.get("dir_info", {}).get("editable") else "built from ") + str(data.get("url"))


def _hardware() -> dict[str, str]:
    facts = {"cpu": f"{_cpu_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            facts[f"gpu {index}"] = (
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
                f"{properties.major}.{properties.minor}"
            )
        facts["cuda"] = f"torch built for {torch.version.cuda}"
    else:
        why = (
            "torch is a CPU build"
            if torch.version.cuda is None
            else f"torch is built for CUDA {torch.version.cuda}, no device"
        )
        facts["gpu"] = f"none ({why})"
    return facts


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _backends() -> dict[str, str]:
    """Name → what it is, whether it runs here, and when it is chosen."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {}
    for backend in BACKENDS.values():
        reasons = {backend.check(Call(op, device, torch.float32)) for op in backend.ops} - {None}
        here = f"not on this {device.type}: {reasons.pop()}" if reasons else f"runs on this {device.type}"
        verified = (
            f"chosen unasked for {backend.unasked}" if backend.unasked
            else "chosen unasked" if backend.automatic else "only when asked for"
        )  # fmt: skip
        facts[backend.name] = f"{backend.summary}; {here}; {verified}"
    loops = native.available()
    facts["compiled for CPUs"] = (
        f"one token, the activation ({loops})" if loops else "nothing: csrc/cpu is not built (g++, then pip install)"
    )
    return facts


def _caches() -> dict[str, str]:
    cache = default_cache_dir()
    state = {True: "ready", False: "not downloaded"}
    facts = {
        "npt_kernels": str(cache),
        "demo model": state[demo_model_cached(cache)],
        "demo text": state[demo_texts_cached(cache)],
    }
    try:
        from huggingface_hub import constants

        facts["hub"] = f"{constants.HF_HUB_CACHE}{' (offline by HF_HUB_OFFLINE)' if constants.HF_HUB_OFFLINE else ''}"
    except ImportError:
        facts["hub"] = "huggingface_hub is not installed"
    return facts
