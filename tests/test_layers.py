"""The layers of the package, as data: which room may import which. Lazy imports and module names in strings count.

CONTRIBUTING's table is checked against ``MAY_IMPORT``.
"""

from __future__ import annotations

import re

import pytest

from tests.support.imports import ROOT, cycles, edges, modules, other_libraries, room

_BASE = ("activations", "argument_checks", "durable_files", "messages", "progress")
_LAYER = ("component", "config", "functional", "ops", "rules", *_BASE)
_MODEL = ("model", "conversion", "quantised", *_LAYER)
_RUN_INPUTS = ("configs", "base_model", "text", "offload")

#: Room → rooms that it may import.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "_version": (),
    "activations": (),
    "argument_checks": (),
    "durable_files": (),
    "messages": (),
    "masked_ids": (),
    "progress": (),
    "thread_locks": (),
    "rules": (),
    "config": ("rules",),
    "component": ("kernels", "rules"),
    "kernels": ("rules", "activations"),
    "ops": ("kernels", "rules", "activations", "thread_locks"),
    "functional": ("ops", "component", "rules", "activations", "argument_checks"),
    "quantised": ("ops", "progress"),
    "model": ("kernels", "quantised", "_version", "thread_locks", *_LAYER),
    "conversion": ("model", "quantised", *_LAYER),
    "evaluation": ("masked_ids", "model", *_LAYER),
    "configs": ("config", "durable_files", "rules", "quantised", "messages"),
    "base_model": ("configs", "conversion", "quantised", "durable_files", "progress"),
    "text": ("configs", "base_model", "durable_files", "masked_ids", "messages", "progress"),
    "offload": ("configs", "config", "model", "durable_files", "progress"),
    "training": ("masked_ids", "configs", "text", "offload", "evaluation", *_MODEL),
    "plasticity": ("_version", "configs", "base_model", "text", "model", "quantised", "evaluation", *_LAYER),
    "estimate": (*_RUN_INPUTS, "training", *_MODEL),
    "run": ("_version", *_RUN_INPUTS, "training", "evaluation", "estimate", *_MODEL),
    "measure": ("kernels", *_RUN_INPUTS, "training", "evaluation", "estimate", *_MODEL),
    "pretrained": ("_version", "base_model", "messages", "model"),
    "environment": ("_version", "kernels", "ops", "base_model"),
    "bench": ("_version", "kernels", *_RUN_INPUTS, "training", "evaluation", "estimate", "run", "measure", *_MODEL),
    "cli": (
        "_version",
        "environment",
        *_RUN_INPUTS,
        "training",
        "evaluation",
        "estimate",
        "run",
        "measure",
        "bench",
        "plasticity",
        *_MODEL,
    ),
    "__main__": ("cli",),
    "": ("_version", "component", "config", "functional", "ops", "model", "conversion", "pretrained"),
}

#: Room or module → libraries that it must not import, also not lazily.
NO_LIBRARY = {
    "rules": ("transformers", "triton", "numpy"),
    "configs": ("torch", "transformers"),
    "quantised.names": ("torch",),
}

#: (op, kernel) that go by a backend's name yet.
NAMED_BACKENDS: set[tuple[str, str]] = set()


def short(module: str) -> str:
    return module.partition(".")[2]


def test_every_room_is_in_the_table() -> None:
    assert {room(module) for module in modules()} == set(MAY_IMPORT)


def test_nobody_imports_upwards() -> None:
    found = {
        (short(importer), short(imported))
        for importer, imported in edges()
        if room(imported) not in (room(importer), *MAY_IMPORT[room(importer)])
    }
    assert found == set()


def test_ops_name_no_backend() -> None:
    """Ops reach kernels through the registry; which folders there are is known in ``kernels/__init__.py`` alone."""
    named = {
        (short(importer), short(imported))
        for importer, imported in edges()
        if room(importer) in ("ops", "functional") and short(imported).startswith(("kernels.triton", "kernels.cuda"))
    }
    assert named - NAMED_BACKENDS == set()
    assert NAMED_BACKENDS - named == set(), "gone: delete them from the list"


def test_no_circles() -> None:
    assert [[short(module) for module in group] for group in cycles()] == []


@pytest.mark.parametrize("place", NO_LIBRARY)
def test_libraries_that_a_room_must_not_know(place: str) -> None:
    inside = [m for m in modules() if short(m) == place or short(m).startswith(place + ".")]
    assert inside or "." in place
    for module in inside:
        assert other_libraries(module).isdisjoint(NO_LIBRARY[place]), module


def test_contributing_shows_the_same_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `npt_kernels/(\w+?)(?:\.py|/)` \|.*\| ([^|]*) \|$", text, flags=re.MULTILINE))
    shown = {name: set(re.findall(r"\w+", may)) for name, may in rows.items()}
    for name, may in shown.items():
        assert may == set(MAY_IMPORT[name]), name
    assert set(shown) == set(MAY_IMPORT) - {"", "__main__", "_version"}
