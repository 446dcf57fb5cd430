"""Base models: the demo model, local directories, hub ids. What cannot work fails in seconds, with the mend in the message."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from ..configs.models import KNOWN_MODELS
from ..configs.schema import ConfigError, RunConfig, default_cache_dir
from ..conversion.quantise import adopt_quantised, quantise_base
from ..quantised.names import import_library, missing_library
from .assets import demo_model_cached, demo_model_dir

__all__ = [
    "DEMO_NAME",
    "PICKLED",
    "HostLoader",
    "HubUnreachable",
    "cached_file",
    "check_hub_reachable",
    "find_model",
    "hub_problem",
    "load_model",
    "load_model_config",
    "looks_local",
    "quantization_notes",
    "resolve_dtype",
]

DEMO_NAME = "demo"
PICKLED = "its pickled weights hold more than tensors, or are damaged; take a copy with safetensors"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def resolve_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """Dtype of the frozen base. ``auto``: float32 on a CPU (its bfloat16 GEMMs are slower), bfloat16 elsewhere."""
    if config.model.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return _DTYPES[config.model.dtype]


def quantization_notes(config: RunConfig, device: torch.device) -> list[str]:
    """What the keys of quantisation do on this device, for the plan and the log: a key is never silently without effect."""
    quantization = config.optimization.base_quantization
    if quantization is not None:
        return [
            f"optimization.quantization={quantization[0]}: all linears of the decoder layers, by {quantization[1]}, after "
            "loading in model.dtype" + ("" if device.type == "cpu" else "; verified on a CPU only")
        ]
    if config.optimization.quantization_library != "auto":
        return ["optimization.quantization_library: nothing to do without optimization.quantization"]
    return []


class HubUnreachable(ConfigError):
    """What is asked for would have to come from the hub, which does not answer."""


@dataclass(frozen=True)
class FoundModel:
    """Where a base model's files are.

    Attributes:
        source, arguments: For ``from_pretrained``: a folder, or a hub id and its revision.
        recorded: The name that an adapter writes down as its base: ``demo`` and a hub id mean the same on every machine, the path
            of a cache or a relative one does not.
        on_hub: Whether the name is a hub id.
    """

    source: str
    arguments: dict[str, Any]
    recorded: str
    on_hub: bool = False


def find_model(name: str, revision: str | None, what: str, cache_dir: Path) -> FoundModel:
    """The model of that name: the demo (fetched if need be), a local directory, a hub id, in this order.

    ``what`` is how messages call it. Raises :class:`ConfigError` and :class:`AssetError` as :func:`load_model`.
    """
    if name == DEMO_NAME:
        return FoundModel(str(demo_model_dir(cache_dir)), {}, name)
    local = _local_directory(name, what)
    if local is not None:
        return FoundModel(str(local.resolve()), {}, str(local.resolve()))
    source, arguments = _hub_source(name, revision, what)
    return FoundModel(source, arguments, name, on_hub=True)


#: ``(dtype, model_config, load) → model``: puts the weights into host memory, by ``load(dtype)`` or ``load("auto")``.
HostLoader = Callable[[torch.dtype, Any, Callable[[torch.dtype | str], nn.Module]], nn.Module]


def load_model(
    config: RunConfig, device: torch.device | str, *, to_host: HostLoader | None = None
) -> tuple[nn.Module, Any]:
    """The base model of ``model.base_model_name``, in eval mode, and its tokenizer.

    A local directory wins over a hub id of the same name. A hub model that is in the cache is used as it is there.

    Args:
        config: The run.
        device: Where the model will compute. It is there on return, unless ``to_host`` is given.
        to_host: For a model whose layers will be streamed to ``device`` or sharded: loads it into host memory, where it stays
            (``functools.partial(npt_kernels.offload.load_for_streaming, config, device)``, ``…load_for_sharding, config``).

    Raises:
        ConfigError: No such model, no network, no access, a model that is no causal language model, or sequences longer
            than it takes. Without network this takes seconds, not hub retries.
        AssetError: The demo files could not be fetched.
    """
    device = torch.device(device)
    name = config.model.base_model_name
    quantization = _quantization(config)
    found = find_model(name, config.model.revision, _key(name), config.cache_dir)
    source, hub = found.source, found.arguments
    try:
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ConfigError(f"loading a model needs {error.name}; pip install 'npt_kernels[train]'") from error
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if importlib.util.find_spec("torchao") is not None:
        # transformers imports it for any model, with a page of warnings about kernels of other hardware.
        with suppress(ImportError):
            import_library("torchao")
    try:
        # Left out, transformers asks on the terminal whether it may run what comes with a model.
        hub = {**hub, "trust_remote_code": False}
        model_config = AutoConfig.from_pretrained(source, **hub)
        check_length(config, model_config.to_dict())
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
        dtype = resolve_dtype(config, device)
        home = device if to_host is None else torch.device("cpu")
        placement = _prequantised(config, model_config, home)

        def load(dtype: torch.dtype | str) -> nn.Module:
            arguments = {"config": model_config, "dtype": dtype, **placement, **hub}
            loaded: nn.Module = AutoModelForCausalLM.from_pretrained(source, **arguments)
            return loaded

        if to_host is not None:
            model: Any = to_host(dtype, model_config, load)
        else:
            # In the dtype of its files a model is mapped, not read; quantised, no more than one of its weights is dense.
            model = load(dtype if quantization is None or placement else "auto")
    except ConfigError:
        raise
    except UnpicklingError as error:
        # torch's own words advise to read the file without its protection.
        raise ConfigError(f"model.base_model_name={name!r} could not be loaded: {PICKLED}") from error
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise ConfigError(f"model.base_model_name={name!r} could not be loaded: {_first_line(error)}") from error
    if placement:
        adopt_quantised(model)
    elif quantization is not None:
        try:
            # Linear by linear at home, which so never holds more than one dense weight.
            quantise_base(model, *quantization, device=home, dtype=dtype, progress=sys.stderr.isatty())
            model.config.dtype = dtype
        except ValueError as error:
            raise ConfigError(f"optimization.quantization={quantization[0]!r}: {error}") from error
    if to_host is None and not placement:
        model = model.to(device)
    model.config._name_or_path = found.recorded
    return model.eval(), tokenizer


def load_model_config(name: str, revision: str | None = None, cache_dir: Path | None = None) -> dict[str, Any]:
    """The model's ``config.json`` as a mapping, without network and without weights.

    Looked for in: a local directory, the demo cache, the hub cache, the numbers of well-known models that ship with this
    package. Raises :class:`ConfigError` if it is in none of them.
    """
    if name == DEMO_NAME:
        cache_dir = cache_dir or default_cache_dir()
        if demo_model_cached(cache_dir):
            return _read_config(cache_dir / "smollm2-135m-instruct" / "config.json")
        return dict(KNOWN_MODELS[DEMO_NAME])
    local = _local_directory(name, _key(name))
    if local is not None:
        return _read_config(local / "config.json")
    cached = cached_file(name, "config.json", revision, _key(name))
    if cached is not None:
        return _read_config(cached)
    if name in KNOWN_MODELS:
        return dict(KNOWN_MODELS[name])
    raise ConfigError(
        f"model.base_model_name={name!r} is not on this machine, and a plan uses no network; fetch its configuration with "
        f"`hf download {name} config.json`, give a local directory, or run without --dry-run"
    )


def check_length(config: RunConfig, model_config: dict[str, Any]) -> None:
    """Raise :class:`ConfigError` if ``data.max_length`` exceeds the positions of the model."""
    limit = model_config.get("max_position_embeddings") or model_config.get("n_positions")
    if isinstance(limit, int) and config.data.max_length > limit:
        raise ConfigError(
            f"data.max_length={config.data.max_length} exceeds the {limit} positions of {config.model.base_model_name}; "
            f"use {limit} or less"
        )


# ---- local -----------------------------------------------------------------------------------------------------------


def _key(name: str) -> str:
    return f"model.base_model_name={name!r}"


def _local_directory(name: str, what: str) -> Path | None:
    """The directory of a local model; ``None`` for what can only be a hub id.

    Raises :class:`ConfigError` for a path that leads nowhere; ``what`` is how the message calls it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{what} is a directory without config.json, not a saved model")
        return path
    if looks_local(name) or path.is_file():
        raise ConfigError(
            f"{what} is not a directory; give the folder with config.json and weights, "
            f"a hub id such as 'openai-community/gpt2', or {DEMO_NAME!r}"
        )
    return None


def looks_local(name: str) -> bool:
    """Whether it can only be a path, and no hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _read_config(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable as JSON: {_first_line(error)}") from error
    if not isinstance(data, dict) or "model_type" not in data:
        raise ConfigError(f"{path} has no model_type; not the configuration of a transformers model")
    return data


# ---- hub -------------------------------------------------------------------------------------------------------------


def cached_file(name: str, filename: str, revision: str | None, what: str) -> Path | None:
    """A file of a hub repository in the local cache; ``None`` if it is not there. Raises :class:`ConfigError` for no hub id."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise ConfigError(f"a hub model needs {error.name}; pip install 'npt_kernels[train]'") from error
    try:
        found = try_to_load_from_cache(name, filename, revision=revision)
    except HFValidationError as error:
        raise ConfigError(
            f"{what} is neither a local directory nor a hub id ({_first_line(error)}); try 'organisation/model'"
            + (f" or {DEMO_NAME!r}" if what == _key(name) else "")
        ) from None
    return Path(found) if isinstance(found, str) else None


def _hub_source(name: str, revision: str | None, what: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` is given for a hub model: the folder in the local cache if it is complete, else id and revision.

    The folder, not ``local_files_only``: with that transformers still asks the hub whether the model is an adapter of PEFT, and
    without network tries again for 24 s.
    """
    config = cached_file(name, "config.json", revision, what)
    if config is not None and any(cached_file(name, file, revision, what) is not None for file in _WEIGHT_FILES):
        return str(config.parent), {}
    check_hub_reachable(what, f"download it where there is network (`hf download {name}`), or use {DEMO_NAME!r}")
    return name, {"revision": revision} if revision else {}


def check_hub_reachable(what: str, mend: str, timeout: float = 2.0) -> None:
    """Raise :class:`HubUnreachable` unless the hub answers within ``timeout`` seconds; its client retries for a minute."""
    problem = hub_problem(timeout)
    if problem is not None:
        offline = problem == _OFFLINE
        raise HubUnreachable(f"{what} is not in the local cache and {problem}; {'unset it, ' if offline else ''}{mend}")


_OFFLINE = "HF_HUB_OFFLINE is set"


def hub_problem(timeout: float = 2.0) -> str | None:
    """Why the hub cannot be asked, ``None`` if it answers within ``timeout`` seconds."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _OFFLINE
    outcome: list[str | None] = []
    endpoint = re.sub(
        r"//[^/@]+@", "//", constants.ENDPOINT
    )  # a user and a password in the address are nobody's business

    def probe() -> None:
        outcome.append(_probe(endpoint, timeout))

    # In a thread, because a name look-up has no time limit of its own.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout)
    problem = outcome[0] if outcome else f"no answer within {timeout:g} s"
    return None if problem is None else f"{endpoint} cannot be reached ({problem})"


def _probe(endpoint: str, timeout: float) -> str | None:
    """``None`` if anything answers, else why not."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout):
            return None
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:
        # Certificates are the hub client's business: it has its own store, and its own words for it.
        return None if "CERTIFICATE" in str(error.reason).upper() else str(error.reason)
    except (OSError, ValueError) as error:
        return str(error)


# ---- quantisation ----------------------------------------------------------------------------------------------------


def _quantization(config: RunConfig) -> tuple[str, str] | None:
    """``(format, library)``, or ``None``. Raises :class:`ConfigError` if the library is not installed."""
    quantization = config.optimization.base_quantization
    if quantization is not None and importlib.util.find_spec(quantization[1]) is None:
        raise ConfigError(f"optimization.quantization={quantization[0]!r} {missing_library(quantization[1])}")
    return quantization


def _prequantised(config: RunConfig, model_config: Any, device: torch.device) -> dict[str, Any]:
    """Where ``from_pretrained`` puts a checkpoint that is stored quantised; empty for a dense one."""
    stored = getattr(model_config, "quantization_config", None)
    if stored is None:
        return {}
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if config.optimization.base_quantization is not None:
        raise ConfigError(
            f"model.base_model_name={config.model.base_model_name!r} is stored quantised already "
            f"({getattr(method, 'value', method)}); set optimization.quantization=none, use_8bit=false and use_4bit=false, or "
            "take the dense checkpoint"
        )
    return {"device_map": {"": device}}


def _first_line(error: BaseException) -> str:
    """The first line of a library's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
