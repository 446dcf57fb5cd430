"""Run configurations: the ones that ship (``npt configs``), and how name, file and ``key=value`` become one RunConfig."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .schema import ConfigError, RunConfig

__all__ = ["DEFAULT_CONFIG", "load_run_config", "named_configs", "parse_yaml", "read_named", "split_arguments"]

DEFAULT_CONFIG = "demo"


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2, and an error for a key that is there twice.

    PyYAML's 1.1 reads ``16:20`` as 980, ``010`` as 8, ``1e-4`` as text and ``no`` as false, and lets the last of two keys win.
    """

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node)).replace("_", "")
        sign, digits = (-1, text[1:]) if text[0] == "-" else (1, text.removeprefix("+"))
        if len(digits) > 30:
            raise yaml.constructor.ConstructorError(None, None, f"a number of {len(digits)} digits", node.start_mark)
        base = {"0x": 16, "0o": 8}.get(digits[:2].lower(), 10)
        return sign * int(digits if base == 10 else digits[2:], base)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key == "<<":
                continue
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{key!r} is there twice, first in line {seen[key]}; keep one of them",
                    key_node.start_mark,
                )
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)

_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+|[-+]?[0-9]+(?:_[0-9]{3})+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+0123456789.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


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
        raise ConfigError(f"no configuration is called {name!r}; {hint}there are: {', '.join(names)}")
    return (resources.files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """``[NAME] [section.key=value]…`` of a command → ``(name, overrides)`` of :func:`load_run_config`."""
    overrides = list(arguments)
    name = overrides.pop(0) if overrides and "=" not in overrides[0] else None
    for text in overrides:
        if "=" not in text:
            raise ConfigError(
                f"{text!r}: only one NAME is taken, and it comes first; settings look like training.max_steps=10"
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
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{source}:{where} {'' if 'twice' in problem else 'is not valid YAML: '}{problem}") from error
    except RecursionError:
        raise ConfigError(f"{source}: is nested too deeply for a configuration") from None
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
        raise ConfigError(f"{text!r} is not of the form section.key=value, such as training.max_steps=10")
    try:
        parsed = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{text!r}: the value is not valid YAML ({getattr(error, 'problem', None) or str(error).splitlines()[0]})"
        ) from error
    except RecursionError:
        raise ConfigError(f"{text[:40]!r}…: the value is nested too deeply") from None
    section, dot, name = key.partition(".")
    # A bare key reaches the checker as an unknown section, which suggests where the key lives.
    return {section: {name: parsed}} if dot else {section: parsed}


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for section, keys in other.items():
        if isinstance(keys, dict) and isinstance(into.get(section), dict):
            into[section].update(keys)
        else:
            into[section] = dict(keys) if isinstance(keys, dict) else keys
