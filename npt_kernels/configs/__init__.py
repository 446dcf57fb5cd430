"""Run configurations: the ones that ship (``npt configs``), and how name, file and ``key=value`` become one RunConfig."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..messages import shown
from .schema import ConfigError, RunConfig
from .yaml12 import YamlProblem, read_yaml

__all__ = ["DEFAULT_CONFIG", "load_run_config", "named_configs", "parse_yaml", "read_named", "split_arguments"]

DEFAULT_CONFIG = "demo"


def named_configs() -> dict[str, str]:
    """Name → what it is for (the first line of the file), the default first."""
    found = {}
    for entry in resources.files(__package__).iterdir():
        if entry.name.endswith(".yaml"):
            found[entry.name.removesuffix(".yaml")] = entry.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    return dict(sorted(found.items(), key=lambda item: (item[0] != DEFAULT_CONFIG, item[0])))


def read_named(name: str) -> str:
    """The YAML text of a named configuration. Raises :class:`ConfigError` with a suggestion."""
    names = named_configs()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        if Path(name).suffix in {".yaml", ".yml"}:
            hint = f"for a file: --config {name}; "
        raise ConfigError(f"no configuration is called {shown(name)}; {hint}there are: {', '.join(names)}")
    return (resources.files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """``[NAME] [section.key=value]…`` of a command → ``(name, overrides)`` of :func:`load_run_config`."""
    overrides = list(arguments)
    name = overrides.pop(0) if overrides and "=" not in overrides[0] else None
    for text in overrides:
        if "=" not in text:
            raise ConfigError(
                f"{shown(text)}: only one NAME is taken, and it comes first; settings look like training.max_steps=10"
            )
    return name, overrides


def load_run_config(
    name: str | None = None, file: str | Path | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """The configuration of a run: named one, then the file's keys, then ``section.key=value``; later wins.

    Args:
        name: A named configuration. ``None``: ``demo``, or nothing but defaults when a file is given.
        file: A YAML file.
        overrides: ``section.key=value``, the value read as YAML (``model.rank=auto:128``, ``model.npt_layers=[0,1]``).

    Raises:
        ConfigError: One line per problem: which file or argument, which key, what would work.
    """
    merged: dict[str, Any] = {}
    origin = []
    if name is None and file is None:
        name = DEFAULT_CONFIG
    if name is not None:
        merged = parse_yaml(read_named(name), f"configs/{name}.yaml")
        origin.append(name)
    if file is not None:
        path = Path(file).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {file}: {getattr(error, 'strerror', None) or error}") from error
        own = parse_yaml(text, str(file))
        # Checked alone first: what is wrong in the file is then reported as the file's.
        RunConfig.from_mapping(own, source=str(file))
        _merge(merged, own)
        origin.append(str(file))
    for text in overrides:
        _merge(merged, _parse_override(text))
    return RunConfig.from_mapping(merged, source=" + ".join(origin) if not overrides else "command line")


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """A mapping of sections; an empty file is an empty mapping. Raises :class:`ConfigError` with line and column."""
    try:
        data = read_yaml(text)
    except YamlProblem as error:
        raise ConfigError(f"{source}: {error.place} {error}".replace("  ", " ")) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected sections such as 'model:' and 'training:', got {type(data).__name__}")
    # `training:` with every key commented out
    return {str(section): {} if keys is None else keys for section, keys in data.items()}


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"{shown(text)} is not of the form section.key=value, such as training.max_steps=10")
    try:
        parsed = read_yaml(value)
    except YamlProblem as error:
        raise ConfigError(f"{shown(text)}: the value {error}") from None
    section, dot, name = key.partition(".")
    # A bare key reaches the checker as an unknown section, which suggests where the key lives.
    return {section: {name: parsed}} if dot else {section: parsed}


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for section, keys in other.items():
        if isinstance(keys, dict) and isinstance(into.get(section), dict):
            into[section].update(keys)
        else:
            into[section] = dict(keys) if isinstance(keys, dict) else keys
