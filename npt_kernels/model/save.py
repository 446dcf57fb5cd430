"""Adapters on disk: ``npt_config.json`` + ``npt_model.safetensors``, and import of the two published formats.

Two files cannot be renamed as one, so a stop between the two renames of a save could pair new weights with an old
configuration. Therefore the weights file is complete in itself: its metadata holds the configuration too, and *its* rename is
the moment at which a save counts. ``npt_config.json`` is the same text for people and tools, with the SHA-256 of the weights
file it was written for. Where the two do not belong together, ``load_npt`` warns and goes by the weights file.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..component import NPComponent
from ..durable_files import disk_errors, sha256, sync_directory, sync_file
from ..messages import shortened
from .adapter_files import (
    CONFIG_NAME,
    FORMAT_VERSION,
    METADATA_KEY,
    PUBLISHED_SUFFIXES,
    WEIGHTS_NAME,
    AdapterFiles,
    read_adapter,
)
from .apply_report import ApplyReport, make_report
from .base_identity import check_base, describe_base
from .extra import ExtraSpec, extra_tensors, fill_extra, put_extra, spec_of, split_tensors
from .install import converted_layers, install, make_component, npt_config, remove_npt
from .linears import count_parameters
from .probe import check_forwards
from .select import LayerChoice, plan_layers
from .sharding import whole

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "adapter_state_dict", "find_adapter", "load_npt", "save_npt"]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``layers.{i}.w_down``, ``layers.{i}.w_a_up.{target}``, ``layers.{i}.w_b_up.{target}`` → tensor (not copied), and the same
    behind ``extra.`` of the extra changes."""
    layers = converted_layers(model)
    own = {
        f"layers.{index}.{name}": parameter.detach()
        for index, layer in layers.items()
        for name, parameter in layer.np_component.named_parameters()
    }
    return own | (extra_tensors(model) if layers else {})


def save_npt(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write the NP components of a converted model to ``directory``; returns it.

    Both files are written beside, synced to the disk and renamed into place, the weights first: an earlier adapter is replaced
    whole or not at all, whenever the process stops (see the module's docstring). If the components themselves are sharded
    (``fully_shard`` in a loop of your own), call it on every process. Raises ``ValueError`` if the model is not converted,
    ``OSError`` if the disk does not take it.
    """
    from safetensors.torch import save_file

    config = npt_config(model)
    layers = converted_layers(model)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    base_config = getattr(model, "config", None)
    header = {
        "format_version": FORMAT_VERSION,
        "npt_kernels_version": __version__,
        "base_model": getattr(base_config, "_name_or_path", None) or None,
        "hidden_size": next(iter(layers.values())).np_component.hidden_size,
        "config": config.to_dict(),
        "layers": list(layers),
        "ranks": [layer.np_component.rank for layer in layers.values()],
        "targets": list(next(iter(layers.values())).np_component.target_shapes),
        "base": describe_base(model, [(layer, layer.npt_plan) for layer in layers.values()]),
    }
    if (extra := spec_of(model)) is not None:
        header["extra"] = extra.to_dict()
    # Components that FSDP2 has sharded too, in a user's own loop, are gathered; every process then saves the same.
    tensors = {name: whole(tensor).cpu().contiguous() for name, tensor in adapter_state_dict(model).items()}
    final = [path / WEIGHTS_NAME, path / CONFIG_NAME]
    weights, text = temporary = [path / f".{target.name}.{os.getpid()}.tmp" for target in final]
    try:
        # One key: safetensors writes several in random order, and two runs would differ in their bytes.
        with disk_errors(path):
            save_file(tensors, weights, metadata={METADATA_KEY: json.dumps(header)})
        text.write_text(json.dumps({**header, "weights_sha256": sha256(weights)}, indent=2) + "\n")
        # safetensors lets only the owner read what it wrote.
        shutil.copymode(text, weights)
        for file in temporary:
            sync_file(file)
        # Only now, with both complete on disk, does the earlier adapter go.
        for file, target in zip(temporary, final, strict=True):
            os.replace(file, target)
        sync_directory(path)
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)
    return path


def load_npt(model: nn.Module, source: str | os.PathLike[str], *, fold: bool | None = None) -> ApplyReport:
    """Convert ``model`` with the components saved in ``source``; a model that is already converted is converted anew.

    Args:
        model: The base model that the components were made for.
        source: A directory written by :func:`save_npt`, or a published checkpoint (a torch-saved file, read with
            ``weights_only=True``): ``{"state_dict": {"layer_{i}_A", "layer_{i}_B"}, "config": ...}`` or
            ``{"layer_{i}_np.W_down", "layer_{i}_np.W_a_up", "layer_{i}_np.W_b_up", ...}``. Rule, rank, number of terms
            and layers are read from names and shapes.
        fold: ``NPTConfig.fold`` in the place of the saved one; ``None``: as saved (adapters of before there was a fold: not
            folded). The components are the same numbers; what they give differs by what the rank leaves out of ``a``.

    Returns:
        :class:`ApplyReport`.

    Raises:
        FileNotFoundError: Nothing is there; the message says what was looked for.
        ValueError: Unreadable, of another model, with missing or extra tensors (named), or of a rule that cannot be folded. The
            model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    path = Path(source)
    found = read_adapter(path)
    config = found.config if fold is None else replace(found.config, fold=fold)
    converted = bool(converted_layers(model))
    try:
        choices, skipped, total = plan_layers(model, replace(config, layers=found.layers))
    except ValueError as error:
        raise ValueError(shortened(f"{path} does not fit this model: {error}")) from error
    check_base(found.base, model, [(choice.layer, choice.plan) for choice in choices], path)
    choices = check_forwards(model, choices)
    _check_sizes(path, choices, found)
    components = [make_component(choice, config, rank) for choice, rank in zip(choices, found.ranks, strict=True)]
    own, beside = split_tensors(found.tensors)
    _fill(path, choices, components, own)
    extra = _extra(path, choices, components, found.extra, beside)
    if converted:
        remove_npt(model)
    base_parameters = count_parameters(model)
    install(model, config, choices, components)
    if extra:
        put_extra(converted_layers(model), extra)
    return make_report(choices, components, skipped, total, base_parameters, {})


def find_adapter(path: Path) -> Path | None:
    """The adapter in ``path``: itself, or the folder of a run's output that holds it; ``None`` if there is none."""
    if path.is_file() or (path / CONFIG_NAME).is_file():
        return path
    for folder in ("adapter", "final"):
        if (path / folder / CONFIG_NAME).is_file():
            return path / folder
    published = path.is_dir() and any(file.suffix in PUBLISHED_SUFFIXES for file in path.iterdir())
    return path if published else None


def _check_sizes(path: Path, choices: list[LayerChoice], found: AdapterFiles) -> None:
    """Before memory is asked for: a rank of a billion in a configuration is a mistake, and not 128 GB of zeros."""
    for choice, rank in zip(choices, found.ranks, strict=True):
        name, size = f"layers.{choice.plan.index}.w_down", [choice.hidden_size, rank * found.config.num_ranks]
        tensor = found.tensors.get(name)
        if tensor is not None and list(tensor.shape) != size:
            raise ValueError(
                f"{path}: {name} has shape {list(tensor.shape)}, but this model and rank {rank} × {found.config.num_ranks} need "
                f"{size} (another base model?)"
            )
        if tensor is None:
            raise ValueError(f"{path} does not fit this model and configuration; missing 1: {name}")


def _extra(
    path: Path, choices: list[LayerChoice], components: list[NPComponent], entry: Any, tensors: dict[str, Tensor]
) -> dict[int, NPComponent]:
    """The extra changes that an adapter holds beside its components; empty without."""
    if entry is None:
        if tensors:
            raise ValueError(f"{path}: it has {len(tensors)} tensors of an extra change, and its configuration none")
        return {}
    places = [
        (choice.plan.index, choice.layer, choice.plan.shape, component)
        for choice, component in zip(choices, components, strict=True)
    ]
    try:
        spec = ExtraSpec.from_dict(entry)
        total = spec.rank * spec.num_ranks
        for index in spec.layers:  # before memory is asked for
            tensor = tensors.get(f"layers.{index}.w_down")
            if tensor is None or tensor.dim() != 2 or tensor.shape[1] != total:
                raise ValueError(
                    f"extra.layers.{index}.w_down is missing or has not the rank {total} of the configuration"
                )
        extra = fill_extra(places, spec)
    except (TypeError, ValueError) as error:
        raise ValueError(shortened(f"{path} does not fit this model: {error}")) from error
    _fill(path, [choice for choice in choices if choice.plan.index in extra], list(extra.values()), tensors)
    return extra


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
        # Also what is too large for float32. A model with such a component would answer NaN to everything.
        if not bool(parameter.isfinite().all()):
            raise ValueError(
                f"{path}: {name} holds NaN or infinite numbers; the adapter is damaged, or its training diverged"
            )
