"""``lookup(kernel, device_name, **shape)``: the first entry that matches, from the GPU's own table or the default one."""

from __future__ import annotations

import json
import os
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["TABLES", "clear_cache", "device_name", "lookup", "table_path"]

#: The tables of this package.
TABLES = Path(__file__).parent

#: Directory of the user's own tables, looked at first (``npt bench tune`` writes here when it is set).
USER_TABLES_VARIABLE = "NPT_TUNING_DIR"


def table_path(name: str, directory: Path | None = None) -> Path:
    """File of a GPU's table: its name in lower case, everything but letters and digits replaced by ``_``."""
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "default"
    return (directory or TABLES) / f"{slug}.json"


@lru_cache(maxsize=64)
def _name_of(index: int) -> str:
    return torch.cuda.get_device_name(index)


def device_name(device: torch.device) -> str:
    """The GPU's name as torch gives it (``"NVIDIA H200"``); ``""`` for anything that is no CUDA device."""
    if device.type != "cuda":
        return ""
    return _name_of(torch.cuda.current_device() if device.index is None else device.index)


def clear_cache() -> None:
    """Read the files again at the next lookup."""
    _entries.cache_clear()
    _lookup.cache_clear()


def lookup(kernel: str, device_name: str, **shape: Any) -> dict[str, Any]:
    """Configuration of ``kernel`` on a GPU for a shape: ``{}`` if no table has an entry.

    Order: the user's table of this GPU (``NPT_TUNING_DIR``), the package's, then the default table. Within a table the
    first entry whose ``when`` holds wins. A condition on a key that the caller does not give does not hold.

    Args:
        kernel: Name of the kernel in the tables.
        device_name: :func:`device_name` of the device; ``""`` reads the default table only.
        shape: What an entry may ask about (``tokens``, ``rank``, ``dtype``, ...): numbers and strings.

    Returns:
        The entry's ``config`` with its ``source`` (where the numbers come from: a measurement, or "predicted: ...").
    """
    return dict(_lookup(kernel, device_name, tuple(sorted(shape.items()))))


@lru_cache(maxsize=4096)
def _lookup(kernel: str, device_name: str, shape: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    values = dict(shape)
    paths = []
    if device_name:
        user = os.environ.get(USER_TABLES_VARIABLE)
        paths += [table_path(device_name, Path(user))] if user else []
        paths.append(table_path(device_name))
    paths.append(TABLES / "default.json")
    for path in paths:
        for entry in _entries(path):
            if entry["kernel"] == kernel and _holds(entry.get("when", {}), values):
                return tuple((entry["config"] | {"source": entry["source"]}).items())
    return ()


def _holds(when: dict[str, Any], values: dict[str, Any]) -> bool:
    """Every condition: ``[low, high]`` (inclusive, ``null`` open), a list of strings, or a value to be equal to."""
    for key, wanted in when.items():
        value = values.get(key)
        if value is None:
            return False
        if isinstance(wanted, list) and all(bound is None or isinstance(bound, int | float) for bound in wanted):
            low, high = wanted
            if (low is not None and value < low) or (high is not None and value > high):
                return False
        elif value not in wanted if isinstance(wanted, list) else value != wanted:
            return False
    return True


@lru_cache(maxsize=64)
def _entries(path: Path) -> tuple[dict[str, Any], ...]:
    """Entries of a file; none, with a warning, if it is not what it should be (a missing file is simply no table)."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except OSError as error:
        warnings.warn(f"tuning table {path} cannot be read ({error}); using the defaults", stacklevel=4)
        return ()
    try:
        return tuple(check_table(json.loads(text)))
    except (ValueError, TypeError) as error:
        warnings.warn(f"tuning table {path} is malformed ({error}); using the defaults", stacklevel=4)
        return ()


def check_table(table: Any) -> list[dict[str, Any]]:
    """The entries of a parsed table. Raises ``ValueError`` saying what is wrong with it."""
    if not isinstance(table, dict) or not isinstance(table.get("entries"), list):
        raise ValueError('expected {"entries": [...]}')
    for number, entry in enumerate(table["entries"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("kernel"), str):
            raise ValueError(f"entry {number} has no kernel name")
        config, when, source = entry.get("config"), entry.get("when", {}), entry.get("source")
        if not isinstance(config, dict) or not config:
            raise ValueError(f"entry {number} ({entry['kernel']}) has no config")
        if not all(isinstance(value, int | float | str | bool) for value in config.values()):
            raise ValueError(f"entry {number} ({entry['kernel']}) has a config value that is no number or string")
        if not isinstance(source, str) or not source:
            raise ValueError(f"entry {number} ({entry['kernel']}) does not say its source")
        if not isinstance(when, dict):
            raise ValueError(f"entry {number} ({entry['kernel']}): when must be an object")
        for key, wanted in when.items():
            if isinstance(wanted, list):
                numbers = all(bound is None or isinstance(bound, int | float) for bound in wanted)
                if (numbers and len(wanted) != 2) or not (numbers or all(isinstance(item, str) for item in wanted)):
                    raise ValueError(
                        f"entry {number} ({entry['kernel']}): {key} must be [low, high] or a list of strings"
                    )
            elif not isinstance(wanted, int | float | str):
                raise ValueError(f"entry {number} ({entry['kernel']}): {key} must be a number, a string or a list")
    return table["entries"]
