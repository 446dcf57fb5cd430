"""The two published checkpoint formats, read from names and shapes alone.

(i)  low-rank form → rule ``diagonal``, gate only:
     ``{"state_dict": {"layer_{i}_A": [d, r], "layer_{i}_B": [r, f]}, "config": {..., "modulation_scale": s}}``
(ii) rank-1 / rank-k form → rule ``rank1``, gate only: ``layer_{i}_np.W_down [d, r]``, ``layer_{i}_np.W_a_up [r, d]``,
     ``layer_{i}_np.W_b_up [r, f]``, for k > 1 ``layer_{i}_np.W_down.{j}`` …; also under ``model.layers.{i}.np_component.``
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import NPTConfig

__all__ = ["read_published"]

_LOW_RANK = re.compile(r"^layer_(\d+)_(A|B)$")
_RANK_K = re.compile(
    r"^(?:layer_(\d+)_np|(?:model\.)?layers\.(\d+)\.np_component)\.(W_down|W_a_up|W_b_up)(?:\.(\d+))?$"
)

_Read = tuple[NPTConfig, list[int], list[int], dict[str, Tensor]]


def read_published(payload: Any, path: Path) -> _Read:
    """``(config, layers, ranks, tensors)`` with tensors named as ``save_npt`` names them. Raises ``ValueError``."""
    if not isinstance(payload, Mapping):
        raise ValueError(f"{path} holds a {type(payload).__name__}, expected a mapping of names to tensors")
    state = payload.get("state_dict", payload)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: state_dict is a {type(state).__name__}, expected a mapping of names to tensors")
    settings = payload.get("config") if isinstance(payload.get("config"), Mapping) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    low_rank = {name: match for name in tensors if (match := _LOW_RANK.match(name))}
    rank_k = {name: match for name in tensors if (match := _RANK_K.match(name))}
    strange = sorted(set(tensors) - set(low_rank) - set(rank_k))
    if (not low_rank and not rank_k) or (low_rank and rank_k) or strange:
        names = ", ".join((strange or sorted(tensors))[:4]) or "no tensors"
        raise ValueError(
            f"{path} is in neither published format (layer_{{i}}_A/B, or layer_{{i}}_np.W_down/W_a_up/W_b_up); it has {names}"
        )
    if low_rank:
        return _low_rank(tensors, low_rank, settings or {}, path)
    return _rank_k(tensors, rank_k, path)


def _low_rank(
    tensors: dict[str, Tensor], matches: dict[str, re.Match[str]], settings: Mapping[str, Any], path: Path
) -> _Read:
    layers: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, match in matches.items():
        layers[int(match[1])][match[2]] = tensors[name]
    ranks, result = [], {}
    for index in sorted(layers):
        a, b = (_matrix(layers[index].get(part), f"layer_{index}_{part}", path) for part in "AB")
        if a.shape[1] != b.shape[0]:
            raise ValueError(
                f"{path}: layer_{index}_A is {list(a.shape)} and layer_{index}_B {list(b.shape)}; ranks differ"
            )
        ranks.append(a.shape[1])
        result[f"layers.{index}.w_down"], result[f"layers.{index}.w_b_up.gate"] = a, b
    scale = settings.get("modulation_scale", 1.0)
    if not isinstance(scale, int | float):
        raise ValueError(f"{path}: config.modulation_scale is {scale!r}, expected a number")
    order = sorted(layers)
    config = NPTConfig(
        layers=order, rule="diagonal", rank=ranks, targets=("gate",), init="published", modulation_scale=float(scale)
    )
    return config, order, ranks, result


def _rank_k(tensors: dict[str, Tensor], matches: dict[str, re.Match[str]], path: Path) -> _Read:
    layers: dict[int, dict[str, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, match in matches.items():
        layers[int(match[1] or match[2])][match[3]][int(match[4] or 0)] = tensors[name]
    ranks, terms, result = [], set(), {}
    for index in sorted(layers):
        parts = layers[index]
        counts = {part: sorted(parts.get(part, {})) for part in ("W_down", "W_a_up", "W_b_up")}
        k = len(counts["W_down"])
        for part, found in counts.items():
            if not found or found != list(range(k)):
                raise ValueError(f"{path}: layer {index} has {part} terms {found}, expected {list(range(max(k, 1)))}")
        down, key, value = (
            [_matrix(parts[part][j], f"layer_{index}_np.{part}.{j}", path) for j in range(k)] for part in counts
        )
        rank = down[0].shape[1]
        for j in range(k):
            if not (down[j].shape[1] == key[j].shape[0] == value[j].shape[0] == rank):
                raise ValueError(
                    f"{path}: layer {index} term {j} has W_down {list(down[j].shape)}, W_a_up {list(key[j].shape)}, W_b_up "
                    f"{list(value[j].shape)}; expected rank {rank} in all"
                )
        terms.add(k)
        ranks.append(rank)
        result[f"layers.{index}.w_down"] = torch.cat(down, dim=1)
        result[f"layers.{index}.w_a_up.gate"] = torch.cat(key)
        result[f"layers.{index}.w_b_up.gate"] = torch.cat(value)
    if len(terms) != 1:
        raise ValueError(f"{path}: layers have different numbers of terms {sorted(terms)}; expected one k for all")
    order = sorted(layers)
    config = NPTConfig(
        layers=order, rule="rank1", rank=ranks, num_ranks=terms.pop(), targets=("gate",), init="published"
    )
    return config, order, ranks, result


def _matrix(tensor: Tensor | None, name: str, path: Path) -> Tensor:
    if tensor is None:
        raise ValueError(f"{path}: {name} is missing")
    if tensor.dim() != 2:
        raise ValueError(f"{path}: {name} has shape {list(tensor.shape)}, expected a matrix")
    # A few bytes can claim to be a matrix of any size: expanded, sparse, or without storage.
    if (
        tensor.layout != torch.strided
        or tensor.is_meta
        or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    ):
        raise ValueError(f"{path}: {name} of shape {list(tensor.shape)} is not stored as a plain matrix")
    return tensor
