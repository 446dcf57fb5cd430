"""Try every causal language model type of the installed transformers and write docs/families.md and tests/model/families.json.

python tools/list_families.py            # a few minutes; run it after a change of npt_kernels/model/shapes or of transformers
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RECORD, PAGE = ROOT / "tests" / "model" / "families.json", ROOT / "docs" / "families.md"


def outcome(model_type: str) -> tuple[str, str]:
    """``exact``, ``refused``, ``not built`` or ``wrong``, and the reason or the relative error of the logits."""
    import torch

    from npt_kernels import NPTConfig, apply_npt
    from tests.support.tiny_families import build

    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    calibration = torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(2))
    try:
        model = build(model_type)
        with torch.no_grad():
            wanted = model(input_ids=ids, use_cache=False).logits
    except Exception as error:
        return "not built", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"
    try:
        report = apply_npt(model, NPTConfig(layers="all", rank=1.0), calibration=calibration)
    except ValueError as error:
        return "refused", str(error)
    with torch.no_grad():
        got = model(input_ids=ids, use_cache=False).logits
    error = float((got - wanted).abs().max() / wanted.abs().max())
    if not error < 1e-3:
        return "wrong", f"relative error {error:.2g}"
    skipped = (
        "" if len(report.converted) == report.num_layers else f", {len(report.converted)} of {report.num_layers} layers"
    )
    return "exact", f"{report.converted[0].shape}{skipped}"


def reason_of(text: str) -> str:
    """The part of a refusal that says why."""
    for before in (" comes nearest: ", "cannot be converted: "):
        text = text.split(before, 1)[-1]
    return text


def page(record: dict[str, dict[str, str]]) -> str:
    """docs/families.md."""
    exact = {name: entry["about"] for name, entry in record["types"].items() if entry["outcome"] == "exact"}  # type: ignore[attr-defined]
    refused = {name: entry["about"] for name, entry in record["types"].items() if entry["outcome"] == "refused"}  # type: ignore[attr-defined]
    unbuilt = [name for name, entry in record["types"].items() if entry["outcome"] == "not built"]  # type: ignore[attr-defined]
    lines = [
        "# Which models can be converted",
        "",
        f"Tried with transformers {record['transformers']}: every causal language model type, built tiny with random weights and",
        "perturbed norms, converted in all layers at full rank. *Exact*: the logits are the original's (relative error below",
        "1e-3 in float32). *Refused*: `apply_npt` says why in one line and changes nothing. `tools/list_families.py` writes this",
        "page, `tests/model/test_families.py` holds it.",
        "",
        f"{len(exact)} types are exact, {len(refused)} are refused, none is converted wrongly;",
        f"{len(unbuilt)} could not be built tiny.",
        "",
        "## Exact",
        "",
        "| type | shape of its layers |",
        "|---|---|",
        *(f"| `{name}` | {about} |" for name, about in exact.items()),
        "",
        "A layer of another model that has one of these shapes is converted too: what counts is the layer, and each is tried on",
        "its own forward before anything is changed. In a *parallel* layer the MLP does not read attention's output, so it",
        "enters through the change of the last matrix alone.",
        "",
        "## Refused",
        "",
        "| type | reason |",
        "|---|---|",
        *(f"| `{name}` | {reason_of(about)[:200].replace('|', '/')} |" for name, about in refused.items()),
        "",
        "## Not tried",
        "",
        "Their configurations need settings that the generic sizes do not give, or a package that is not installed: "
        + ", ".join(f"`{name}`" for name in unbuilt)
        + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    warnings.simplefilter("ignore")
    import transformers

    from tests.support.tiny_families import causal_types

    transformers.logging.set_verbosity_error()
    types = {}
    for name in causal_types():
        found, about = outcome(name)
        types[name] = {"outcome": found, "about": about}
        print(f"{name}: {found}: {about[:120]}", flush=True)
    record = {"transformers": transformers.__version__, "types": types}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(record))  # type: ignore[arg-type]
    wrong = [name for name, entry in types.items() if entry["outcome"] == "wrong"]
    if wrong:
        raise SystemExit(f"converted wrongly: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
