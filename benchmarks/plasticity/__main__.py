"""Facts written into SmolLM2, methods × measurements: ``python -m benchmarks.plasticity --out benchmarks/results/<device>``.

``single``: every fact alone in a fresh model, means over facts. ``joint``: N facts at once. Each row: recall word for word and on
questions, leak to other subjects, facts of the world, prose. Rows are printed as they come; a run that is cut leaves what it has.

As called it takes a quarter of an hour on two cores. The committed records have more: ``--single 12``, ``--joint 1 8 24 100``.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch

from npt_kernels import __version__
from npt_kernels.base_model.loading import load_model
from npt_kernels.configs.schema import RunConfig
from npt_kernels.plasticity import Fact, apply_edit, undo_edit
from npt_kernels.plasticity.context import ContextSettings, conditional, context
from npt_kernels.plasticity.corpus import demo_corpus, windows
from npt_kernels.plasticity.edit import Edit
from npt_kernels.plasticity.hooks import Sites
from npt_kernels.plasticity.learn import _layers, _moments
from npt_kernels.plasticity.recall import Examination, Row
from npt_kernels.plasticity.rome import RomeSettings, rome
from npt_kernels.plasticity.token_maps import write_json
from npt_kernels.training.distributed import choose_device

from .baselines import BASELINES, fine_tuned
from .facts import facts

SETTINGS: dict[str, Any] = {
    "rome": RomeSettings(),
    "rome, plain keys": RomeSettings(plain_keys=True),
    "context": ContextSettings(),
    "context, plain keys": ContextSettings(plain_keys=True),
    "context, others not held": ContextSettings(hold_others=False),
    "conditional": ContextSettings(),
    "conditional, others not held": ContextSettings(hold_others=False),
}


class Bench:
    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        config = RunConfig()
        config.model.base_model_name = "demo"
        self.model, self.tokenizer = load_model(config, choose_device())
        self.model.eval()
        self.corpus = demo_corpus()
        self.prose = windows(self.tokenizer, self.corpus.heldout, 8, 256)
        self.keep = windows(self.tokenizer, self.corpus.calibration, 16, 64)
        self.asked: dict[str, tuple[Examination, Row, Row]] = {}
        every = list(range(len(Sites(self.model))))
        self.moments = _moments(self.model, self.tokenizer, None, self.corpus, None, every, True)

    @contextmanager
    def written(self, method: str, chosen: list[Fact]) -> Iterator[dict[str, Any]]:
        """Inside the block the facts are in the model."""
        if method in BASELINES:
            with fine_tuned(self.model, self.tokenizer, chosen, self.keep, method) as notes:
                yield notes
            return
        base = method.partition(",")[0]
        layers, triggers, settings = _layers(base, None, len(Sites(self.model))), None, SETTINGS[method]
        common = (self.model, self.tokenizer, chosen, self.moments)
        if base == "rome":
            changes, notes = rome(*common, layers[0], settings)
        elif base == "context":
            changes, notes = context(*common, layers, settings)
        else:
            changes, triggers, notes = conditional(*common, layers, settings)
        edit = Edit.of(self.model, changes, base, chosen, triggers, notes)
        applied = apply_edit(self.model, edit)
        try:
            yield {"relative": max(applied.relative.values())}
        finally:
            undo_edit(self.model, edit)

    def unedited(self, chosen: list[Fact]) -> tuple[Examination, Row, Row]:
        """The questions about a group of facts, and what the model says without an edit; measured once."""
        name = "\n".join(fact.fact for fact in chosen)
        if name not in self.asked:
            examination = Examination(self.model, self.tokenizer, chosen)
            examination.prose = self.prose
            self.asked[name] = (examination, examination.row(), examination.row(in_context=True))
        return self.asked[name]

    def rome_together(self, chosen: list[Fact], counts: list[int], keep: Callable[[dict[str, Any]], None]) -> None:
        """A row per count, given to ``keep``: facts are written one after another, so the smaller counts are met on the way."""
        examined = {n: self.unedited(chosen[:n]) for n in counts}
        sites, layer = Sites(self.model), _layers("rome", None, len(Sites(self.model)))[0]
        before, start = sites.weight(layer).detach().clone(), time.perf_counter()
        done, measuring = 0, 0.0

        def advance(count: int) -> None:
            nonlocal done, measuring
            done, now = done + count, time.perf_counter()
            if done not in examined:
                return
            examination, unedited, in_context = examined[done]
            after = examination.row()
            weight = sites.weight(layer)
            notes = [{"relative": float((weight - before).norm() / before.norm())}]
            keep(row("rome", done, done, [unedited], [in_context], [after], notes, now - start - measuring))
            measuring += time.perf_counter() - now

        rome(self.model, self.tokenizer, chosen[: max(counts)], self.moments, layer, SETTINGS["rome"], advance)

    def measured(self, method: str, groups: list[list[Fact]]) -> dict[str, Any]:
        """Rows before, in context and after, each the mean over ``groups``, every one in a fresh model."""
        rows: dict[str, list[Row]] = {"before": [], "in_context": [], "after": []}
        notes, writing = [], 0.0
        for chosen in groups:
            examination, before, in_context = self.unedited(chosen)
            rows["before"].append(before)
            rows["in_context"].append(in_context)
            start = time.perf_counter()
            with self.written(method, chosen) as note:
                writing += time.perf_counter() - start
                rows["after"].append(examination.row())
            notes.append(note)
        return row(method, sum(map(len, groups)), len(groups[0]), *rows.values(), notes, writing)


def row(
    method: str,
    facts: int,
    together: int,
    before: list[Row],
    in_context: list[Row],
    after: list[Row],
    notes: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """What the record keeps of one method on ``facts`` facts, ``together`` of them at once."""
    return {
        "method": method,
        "facts": facts,
        "together": together,
        "before": mean(before),
        "in_context": mean(in_context),
        "after": mean(after),
        "notes": notes,
        "writing_seconds": round(seconds, 2),
    }


def mean(rows: list[Row]) -> dict[str, Any]:
    """Counted rates are hits ÷ asked over all rows, others the mean."""
    found: dict[str, Any] = {"counts": {}}
    for name in ("verbatim", "questions", "leak", "known"):
        hits, asked = (sum(row.counts.get(name, [0, 0])[i] for row in rows) for i in (0, 1))
        found[name], found["counts"][name] = (hits / asked if asked else None), [hits, asked]
    for name in ("prose_ratio", "kl_subject", "kl_other"):
        values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        found[name] = sum(values) / len(values) if values else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plasticity", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder of the record")
    parser.add_argument("--single", type=int, default=8, help="facts that are written alone")
    parser.add_argument("--joint", type=int, nargs="*", default=[1, 8, 24], help="facts that are written together")
    parser.add_argument("--name", default="plasticity", help="of the JSON file")
    parser.add_argument(
        "--methods", nargs="*", choices=[*SETTINGS, *BASELINES], help="default: all alone, edits together as well"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    bench = Bench(options.threads)
    every, rows, start = facts(), [], time.perf_counter()

    def keep(found: dict[str, Any]) -> None:
        rows.append(found)
        print(line(found), flush=True)
        if options.out is not None:
            write(options.out / f"{options.name}.json", rows, time.perf_counter() - start)

    alone = options.methods or [*SETTINGS, *BASELINES]
    together = options.methods or [method for method in SETTINGS if "," not in method]
    for method in alone if options.single else ():
        # Training takes minutes where an edit takes seconds: half as many facts.
        chosen = every[: options.single // (2 if method in BASELINES else 1)]
        keep(bench.measured(method, [[fact] for fact in chosen]))
    for method in together if options.joint else ():
        if method == "rome":
            bench.rome_together(every, options.joint, keep)
        else:
            for n in options.joint:
                keep(bench.measured(method, [every[:n]]))


def line(row: dict[str, Any]) -> str:
    a = row["after"]
    count = lambda name: "{}/{}".format(*a["counts"][name])  # noqa: E731
    return (
        f"{row['method']:26s} {row['facts']:3d} facts, {row['together']:2d} together: verbatim {count('verbatim')}, "
        f"questions {count('questions')}, leak {count('leak')}, known {count('known')}, prose {a['prose_ratio']:.4f}, "
        f"{row['writing_seconds']:.0f} s"
    )


def write(path: Path, rows: list[dict[str, Any]], seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"about": about() | {"seconds": round(seconds, 1)}, "rows": rows})


def about() -> dict[str, Any]:
    """What a record of SmolLM2 was measured on."""
    return {
        "model": "SmolLM2-135M-Instruct, float32",
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "npt_kernels": __version__,
        "torch": torch.__version__,
    }


def cpu() -> str:
    names = [
        x.partition(":")[2].strip()
        for x in Path("/proc/cpuinfo").read_text().splitlines()
        if x.startswith("model name")
    ]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
