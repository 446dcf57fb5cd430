"""What the files of an adapter say, checked before anything is made of it: no number in them is taken on trust."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..config import NPTConfig
from ..durable_files import sha256
from ..messages import first_line, shortened, shown
from .import_published import read_published

__all__ = [
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "METADATA_KEY",
    "PUBLISHED_SUFFIXES",
    "WEIGHTS_NAME",
    "AdapterFiles",
    "base_model_of",
    "read_adapter",
]

CONFIG_NAME = "npt_config.json"
WEIGHTS_NAME = "npt_model.safetensors"
FORMAT_VERSION = 1
#: Key of the configuration in the metadata of the weights file.
METADATA_KEY = "npt_config"
PUBLISHED_SUFFIXES = frozenset({".pt", ".pth", ".bin"})


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter that was read.

    Attributes:
        config: Of the conversion.
        layers, ranks: Indices and the rank of each, as many.
        tensors: ``layers.{i}.{name}`` → tensor.
        base: What :func:`npt_kernels.model.base_identity.check_base` compares; ``None`` where nothing was saved.
        extra: What the header says of the extra change (``extra.py``); ``None`` without.
    """

    config: NPTConfig
    layers: list[int]
    ranks: list[int]
    tensors: dict[str, Tensor]
    base: dict[str, Any] | None = None
    extra: Any = None


def read_adapter(path: Path) -> AdapterFiles:
    """A directory that ``save_npt`` wrote, or a published checkpoint (file, or directory with one).

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: Damaged, or not what it says; one line with the file's name.
    """
    if path.is_dir() and (path / CONFIG_NAME).is_file():
        return _read_directory(path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in PUBLISHED_SUFFIXES)
        if len(files) != 1:
            found = ", ".join(p.name for p in files) or "none"
            raise FileNotFoundError(
                f"{path} has no {CONFIG_NAME} and not exactly one .pt/.pth/.bin file (found: {found})"
            )
        path = files[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a directory with {CONFIG_NAME} or a torch-saved file")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} could not be read with torch.load(weights_only=True): {first_line(error)}") from error
    try:
        return AdapterFiles(*read_published(payload, path))
    except (OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not a published checkpoint: {first_line(error)}") from error


def base_model_of(path: Path) -> str | None:
    """The name of the base model that ``save_npt`` wrote down: a folder or a hub id; ``None`` if it knew none."""
    if not (path / CONFIG_NAME).is_file():
        return None
    name = _parsed((path / CONFIG_NAME).read_bytes(), path / CONFIG_NAME).get("base_model")
    return name if isinstance(name, str) and name else None


def _read_directory(path: Path) -> AdapterFiles:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    header = _parsed((path / CONFIG_NAME).read_bytes(), path / CONFIG_NAME)
    weights = path / WEIGHTS_NAME
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing beside {CONFIG_NAME}")
    try:
        with safe_open(weights, framework="pt") as file:
            own = (file.metadata() or {}).get(METADATA_KEY)
        tensors = load_file(weights)
        of_these = header.get("weights_sha256") in (None, sha256(weights))
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged or not a safetensors file: {first_line(error)}") from error
    except OSError as error:
        raise ValueError(f"{weights} cannot be read: {error.strerror or first_line(error)}") from error
    contents = _contents(header, path / CONFIG_NAME)
    if own is not None:
        theirs = _parsed(own.encode("utf-8", "surrogatepass"), weights)
        if _contents(theirs, weights) != contents or not of_these:
            what = "was not written for" if not of_these else "was changed and no longer says what is in"
            warnings.warn(
                f"{path / CONFIG_NAME} {what} the {WEIGHTS_NAME} beside it{'' if of_these else ' (weights_sha256 differs)'}: "
                "a save was interrupted, or a file was copied or edited; the weights' own configuration is used",
                stacklevel=4,
            )
            header, contents = theirs, _contents(theirs, weights)
    elif not of_these:
        warnings.warn(
            f"{path / CONFIG_NAME} was not written for the {WEIGHTS_NAME} beside it (weights_sha256 differs); it is used "
            "nevertheless, names and shapes of the tensors are checked",
            stacklevel=4,
        )
    base = header.get("base")
    return AdapterFiles(*contents, tensors, base if isinstance(base, dict) else None, header.get("extra"))


def _parsed(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object with a format version that this package reads."""
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a valid NPT configuration: {first_line(error)}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a valid NPT configuration: it holds a {type(header).__name__}")
    version = header.get("format_version", 0)
    if isinstance(version, bool) or not isinstance(version, int):
        raise ValueError(f"{path} is not a valid NPT configuration: format_version={shown(version)} is no whole number")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}; this npt_kernels {__version__} reads up to {FORMAT_VERSION}: upgrade "
            "npt_kernels"
        )
    return header


def _contents(header: dict[str, Any], path: Path) -> tuple[NPTConfig, list[int], list[int]]:
    """Configuration, layers, ranks."""
    try:
        layers, ranks = (_whole_numbers(header, key, least) for key, least in (("layers", 0), ("ranks", 1)))
        # Of before there was a fold: their norms are matched to h + a.
        config = NPTConfig.from_dict({"fold": False, **header["config"]})
    except KeyError as error:
        raise ValueError(f"{path} is not a valid NPT configuration: {error} is missing") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(shortened(f"{path} is not a valid NPT configuration: {error}")) from error
    if len(layers) != len(ranks):
        raise ValueError(
            f"{path} has {len(ranks)} ranks for {len(layers)} layers {shown(layers)}; one per layer is needed"
        )
    # Ranks follow the layers, and those are converted in ascending order.
    pairs = sorted(zip(layers, ranks, strict=True))
    return config, [layer for layer, _ in pairs], [rank for _, rank in pairs]


def _whole_numbers(header: dict[str, Any], key: str, least: int) -> list[int]:
    found = header[key]
    for entry in found if isinstance(found, list) else [found]:
        if isinstance(entry, bool) or not isinstance(entry, int) or not least <= entry < 2**31:
            raise ValueError(f"{key} contains {shown(entry)}, expected whole numbers from {least} on")
    if not isinstance(found, list) or not found:
        raise ValueError(f"{key}={shown(found)} is not a list of whole numbers")
    if key == "layers" and len(set(found)) != len(found):
        raise ValueError(f"layers={shown(found)} names one layer twice")
    return found
