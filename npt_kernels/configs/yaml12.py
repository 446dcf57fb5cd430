"""YAML 1.2 for configurations: read with every trap an error, written so that it is read back as what it was.

PyYAML is YAML 1.1, which reads ``16:20`` as 980, ``010`` as 8, ``1e-4`` as text and ``no`` as false, and lets the last of two
equal keys win. Its scanner and parser are those of 1.2 as well, so a loader with other scalars is all it takes (ruamel.yaml,
which reads 1.2, would be one more dependency for 40 lines).
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from ..messages import shown

__all__ = ["YamlProblem", "read_yaml", "write_yaml"]


class YamlProblem(ValueError):
    """What is wrong in a YAML text, and where.

    Attributes:
        place: ``line 3, column 5``, or empty where it is not known.
    """

    def __init__(self, message: str, place: str = "") -> None:
        super().__init__(message)
        self.place = place


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            LookupError,
            AttributeError,
        ):  # `!!int x`: PyYAML's constructors expect what their pattern matches
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(None, None, f"{shown(node.value)} is no !!{kind}", node.start_mark) from None

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node)).replace("_", "")
        sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
        if len(digits) > 30:
            raise ConstructorError(None, None, f"a number of {len(digits)} digits", node.start_mark)
        base = {"0x": 16, "0o": 8}.get(digits[:2].lower(), 10)
        return sign * int(digits if base == 10 else digits[2:], base)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        # A node that is no mapping has the tag of one (`!!map 5`): the constructor below says so.
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key == "<<":
                continue
            if key in seen:
                raise ConstructorError(
                    None,
                    None,
                    f"{shown(key)} is there twice, first in line {seen[key]}; keep one of them",
                    key_node.start_mark,
                )
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML reads as something else: ``1e3`` is a number in 1.2, ``no`` a boolean in 1.1."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+|[-+]?[0-9]+(?:_[0-9]{3})+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+0123456789.")),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises :class:`YamlProblem`, one line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        twice = isinstance(error, ConstructorError) and "is there twice" in problem
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise YamlProblem(problem if twice else f"is not valid YAML: {problem}", place) from error
    except RecursionError:
        raise YamlProblem("is nested too deeply for a configuration") from None


def write_yaml(value: Any, *, width: int = 80) -> str:
    """``value`` of plain types as YAML that :func:`read_yaml` reads as an equal one, and YAML 1.1 too; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)
