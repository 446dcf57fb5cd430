"""Adapters on disk: ``npt_config.json`` + ``npt_model.safetensors``, and import of the two published formats."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..config import NPTConfig
from ..nn import NPComponent
from .patching import (
    ApplyReport,
    converted_layers,
    install,
    make_component,
    make_report,
    npt_config,
    plan_layers,
    remove_npt,
)
from .published import read_published
from .sharding import whole

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "adapter_state_dict", "load_npt", "save_npt"]

CONFIG_NAME = "npt_config.json"
WEIGHTS_NAME = "npt_model.safetensors"
_FORMAT_VERSION = 1


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``layers.{i}.w_down``, ``layers.{i}.w_a_up.{target}``, ``layers.{i}.w_b_up.{target}`` → tensor (not copied)."""
    return {
        f"layers.{index}.{name}": parameter.detach()
        for index, layer in converted_layers(model).items()
        for name, parameter in layer.np_component.named_parameters()
    }


def save_npt(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write the NP components of a converted model to ``directory``; returns it.

    Both files are written beside and renamed into place, so an interrupted save leaves an earlier adapter intact. If the
    components themselves are sharded (``fully_shard`` in a loop of your own), call it on every process. Raises ``ValueError``
    if the model is not converted.
    """
    from safetensors.torch import save_file

    config = npt_config(model)
    layers = converted_layers(model)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    base_config = getattr(model, "config", None)
    header = {
        "format_version": _FORMAT_VERSION,
        "npt_kernels_version": __version__,
        "base_model": getattr(base_config, "_name_or_path", None) or None,
        "hidden_size": next(iter(layers.values())).np_component.hidden_size,
        "config": config.to_dict(),
        "layers": list(layers),
        "ranks": [layer.np_component.rank for layer in layers.values()],
        "targets": list(next(iter(layers.values())).np_component.target_shapes),
    }
    # Components that FSDP2 has sharded too, in a user's own loop, are gathered; every process then saves the same.
    tensors = {name: whole(tensor).cpu().contiguous() for name, tensor in adapter_state_dict(model).items()}
    written: list[tuple[Path, Path]] = []
    try:
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            temporary = path / f".{name}.{os.getpid()}.tmp"
            written.append((temporary, path / name))
            if name == WEIGHTS_NAME:
                save_file(tensors, temporary, metadata={"format": "pt"})
            else:
                temporary.write_text(json.dumps(header, indent=2) + "\n")
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
        # Only now, with both complete on disk, does the earlier adapter go.
        for temporary, final in written:
            os.replace(temporary, final)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)
    return path


def load_npt(model: nn.Module, source: str | os.PathLike[str]) -> ApplyReport:
    """Convert ``model`` with the components saved in ``source``; a model that is already converted is converted anew.

    Args:
        model: The base model that the components were made for.
        source: A directory written by :func:`save_npt`, or a published checkpoint (a torch-saved file, read with
            ``weights_only=True``): ``{"state_dict": {"layer_{i}_A", "layer_{i}_B"}, "config": ...}`` or
            ``{"layer_{i}_np.W_down", "layer_{i}_np.W_a_up", "layer_{i}_np.W_b_up", ...}``. Rule, rank, number of terms
            and layers are read from names and shapes.

    Returns:
        :class:`ApplyReport`.

    Raises:
        FileNotFoundError: Nothing is there; the message says what was looked for.
        ValueError: Unreadable, of another model, or with missing or extra tensors (named). The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    path = Path(source)
    config, layers, ranks, tensors = _read(path)
    converted = bool(converted_layers(model))
    choices, skipped, total = plan_layers(model, replace(config, layers=layers))
    if len(choices) != len(ranks):
        raise ValueError(f"{path} has {len(ranks)} ranks for {len(choices)} layers {layers}; one per layer is needed")
    components = [make_component(choice, config, rank) for choice, rank in zip(choices, ranks, strict=True)]
    _fill(path, choices, components, tensors)
    if converted:
        remove_npt(model)
    base_parameters = sum(parameter.numel() for parameter in model.parameters())
    install(model, config, choices, components)
    return make_report(choices, components, skipped, total, base_parameters, {})


def _read(path: Path) -> tuple[NPTConfig, list[int], list[int], dict[str, Tensor]]:
    if path.is_dir() and (path / CONFIG_NAME).is_file():
        return _read_directory(path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in {".pt", ".pth", ".bin"})
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
        raise ValueError(f"{path} could not be read with torch.load(weights_only=True): {error}") from error
    return read_published(payload, path)


def _read_directory(path: Path) -> tuple[NPTConfig, list[int], list[int], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        header = json.loads((path / CONFIG_NAME).read_text())
        config = NPTConfig.from_dict(header["config"])
        layers, ranks = [int(i) for i in header["layers"]], [int(r) for r in header["ranks"]]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / CONFIG_NAME} is not a valid NPT configuration: {error}") from error
    if header.get("format_version", 0) > _FORMAT_VERSION:
        raise ValueError(
            f"{path / CONFIG_NAME} has format_version {header['format_version']}; this npt_kernels {__version__} reads up to "
            f"{_FORMAT_VERSION}: upgrade npt_kernels"
        )
    if not (path / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"{path / WEIGHTS_NAME} is missing beside {CONFIG_NAME}")
    try:
        return config, layers, ranks, load_file(path / WEIGHTS_NAME)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS_NAME} is damaged or not a safetensors file: {error}") from error


@torch.no_grad()
def _fill(path: Path, choices: list[Any], components: list[NPComponent], tensors: dict[str, Tensor]) -> None:
    """Copy tensors into fresh components; every name must be met exactly once."""
    expected = {
        f"layers.{choice.plan.index}.{name}": parameter
        for choice, component in zip(choices, components, strict=True)
        for name, parameter in component.named_parameters()
    }
    # A published checkpoint says "gate" whatever the family calls its first matrix.
    aliases = choices[0].plan.shape.aliases
    tensors = {".".join(aliases.get(part, part) for part in name.split(".")): t for name, t in tensors.items()}
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        parts = [f"{kind} {len(names)}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
                 for kind, names in (("missing", missing), ("unexpected", extra)) if names]  # fmt: skip
        raise ValueError(f"{path} does not fit this model and configuration; {'; '.join(parts)}")
    for name, parameter in expected.items():
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, but this model needs {list(parameter.shape)} "
                "(another base model?)"
            )
        if not tensors[name].is_floating_point():
            raise ValueError(f"{path}: {name} is {tensors[name].dtype}, expected a floating type")
        parameter.copy_(tensors[name])
