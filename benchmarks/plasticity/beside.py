"""Does a fact leak to another subject *that stands beside its own*? ``python -m benchmarks.plasticity.beside --out FOLDER``.

The leak of the other records is asked in texts that do not name the fact's subject, where ``conditional`` does nothing by
construction. Here it is named first and the question is about another: "{subject} and {other} have nothing in common. …".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from npt_kernels.plasticity import Fact
from npt_kernels.plasticity.facts import encode_answer
from npt_kernels.plasticity.recall import answers
from npt_kernels.plasticity.token_maps import write_json

from .__main__ import SETTINGS, Bench, about
from .facts import facts


def asked(bench: Bench, fact: Fact, front: str = "") -> list[bool]:
    """Whether each other subject gets the answer, alone and beside the fact's own: ``[alone, …, beside, …]``."""
    alone = [fact.about(other) for other in fact.others]
    beside = [f"{fact.subject} and {other} have nothing in common. {fact.about(other)}" for other in fact.others]
    pairs = [encode_answer(bench.tokenizer, front + prompt, fact.answer) for prompt in (*alone, *beside)]
    return [answer.exact for answer in answers(bench.model, bench.tokenizer, pairs)]


def counted(found: list[list[bool]]) -> dict[str, list[int]]:
    """``{"alone": [hits, asked], "beside": …}`` of one list of :func:`asked` per fact."""
    halves = {"alone": slice(0, len(found[0]) // 2), "beside": slice(len(found[0]) // 2, None)}
    return {
        name: [sum(sum(row[half]) for row in found), sum(len(row[half]) for row in found)]
        for name, half in halves.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plasticity.beside", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder of plasticity-beside.json")
    parser.add_argument("--facts", type=int, default=12)
    parser.add_argument("--methods", nargs="*", default=["rome", "context", "conditional"], choices=list(SETTINGS))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    bench, chosen = Bench(options.threads), facts(options.facts)
    rows: dict[str, Any] = {
        "before": counted([asked(bench, fact) for fact in chosen]),
        "in context": counted([asked(bench, fact, fact.fact + "\n") for fact in chosen]),
    }
    for method in options.methods:
        found = []
        for fact in chosen:
            with bench.written(method, [fact]):
                found.append(asked(bench, fact))
        rows[method] = counted(found)
    for name, row in rows.items():
        print(
            f"{name:12s} alone {row['alone'][0]}/{row['alone'][1]}, beside {row['beside'][0]}/{row['beside'][1]}",
            flush=True,
        )
    if options.out is not None:
        write_json(options.out / "plasticity-beside.json", {"about": about(), "facts": options.facts, "rows": rows})


if __name__ == "__main__":
    main()
