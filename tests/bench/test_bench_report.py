"""The report: what it says follows from the files, stale figures are flagged, a real browser draws and sorts it."""

from __future__ import annotations

import html
import importlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from npt_kernels.bench.report import collect, write_page, write_pngs
from npt_kernels.bench.report.collect import staleness
from npt_kernels.bench.report.figures import draw_all
from npt_kernels.bench.report.goals import GOALS, markdown_table, replace_table, verdicts
from npt_kernels.bench.report.page import render
from npt_kernels.bench.report.summary import summarise
from npt_kernels.bench.results import KEY_FIELDS, BenchError, human_bytes
from tests.support.bench_results import everything, kernel, write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return collect(write(tmp_path_factory.mktemp("full")))


def text_of(lines):
    return re.sub(r"<[^>]+>", "", "\n".join(lines))


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_the_summary_follows_from_the_rows(full):
    text = text_of(summarise(full))
    for part in (
        "costs -5.0 % of a forward: an NPT MLP takes 0.950× [0.940, 0.960]", "provider triton) on NVIDIA H200",
        "Decoding a token (-10.0 %)", "434× faster than the published per-token loop", "448 GiB (by formula)", "116 MiB",
        "Training Llama-3.1-8B, all layers, local: 20,000 tokens/s, 41 % MFU, peak 18 GiB", "trains 100.0× faster",
        "1 rows refused: the numbers of liger were wrong",
    ):  # fmt: skip
        assert part in text, (part, text)
    assert "No GPU has run this" not in text and "Small stand-in" not in text


def test_small_shapes_on_a_cpu_make_no_claim(tmp_path):
    rows = {"kernels": [kernel(shape="Llama-3.1-8B ÷16", dtype="float32", tokens=t, rank=16, provider=p)
                        for t in (1, 64) for p in ("frozen", "eager")]}  # fmt: skip
    collected = collect(write(tmp_path, rows, "small", device="CPU, 2 cores"))
    text = text_of(summarise(collected))
    assert "Small stand-in shape: says nothing about real sizes" in text
    assert "No GPU has run this yet" in text
    assert all(v.met is None and v.measured == "unverified" for v in verdicts(collected))
    page = render(collected)
    assert page.count('class="unverified">unverified') == len(GOALS)


def test_goals(full):
    found = {v.goal.what: v for v in verdicts(full)}
    assert len(found) == len(GOALS)
    expected = {
        "segmented-K GEMM with one segment": ("0.952 (triton)", True),
        "the delta's cost": ("r = 64: 1.012", True),
        "NPT MLP forward ÷": ("0.950 (triton)", True),
        "NPT MLP forward and backward": ("0.950 [0.940, 0.960] (triton)", False),
        "against the strongest": ("slowest row 0.931 of it", True),
        "against the published": ("434× to 434×", True),
        "peak memory": ("0.020 of T×f (triton)", True),
        "training Llama": ("20,000 tokens/s, 18 GiB", True),
        "the same, frozen layers streamed": ("9,500 tokens/s, 7 GiB", True),
        "decode": ("0.900 [0.890, 0.910] (cuda)", True),
        "call overhead": ("8.5 µs (eager)", True),
        "perplexity NPT ÷ original, and KL": ("unverified", None),
    }
    for start, (measured, met) in expected.items():
        (verdict,) = [v for what, v in found.items() if what.startswith(start)]
        assert verdict.measured.startswith(measured), verdict
        assert verdict.met is met, verdict


def test_a_cpu_does_not_speak_for_a_gpu(tmp_path):
    collected = collect(write(tmp_path, device="CPU, 64 cores"))
    assert all(v.met is None for v in verdicts(collected) if not v.goal.on_cpu)


def at_real_sizes(tokens: int, eager: float, **others: float) -> list[dict]:
    """A forward of SmolLM2's MLP on a CPU: 1.25 × the frozen layer's operations, ratios to it by provider."""
    more = {"shape": "SmolLM2-135M", "dtype": "float32", "tokens": tokens, "rank": 128}
    return [
        kernel(provider, ratio, tflops=(1.25 if provider != "frozen" else 1.0) / ratio, **more)
        for provider, ratio in {"frozen": 1.0, "eager": eager, **others}.items()
    ]


@pytest.mark.parametrize(
    ("large", "one", "expected"),
    [
        (at_real_sizes(256, 1.2, kconcat=1.3, compile=1.21), at_real_sizes(1, 1.25, peft=2.0),
         [("2 of 2 rows", True), ("1 of 1 rows", True), ("SmolLM2-135M 1.250", True)]),
        (at_real_sizes(256, 1.3, kconcat=1.4, compile=1.25), at_real_sizes(1, 1.3, peft=2.0),
         [("1 of 2 rows; slowest 1.040 of it (SmolLM2-135M forward T=256 r=128)", False),
          ("0 of 1 rows; worst 1.300 where they are 1.250", False), ("SmolLM2-135M 1.300", False)]),
    ],
)  # fmt: skip
def test_goals_of_a_cpu_at_real_sizes(tmp_path, large, one, expected):
    collected = collect(write(tmp_path, {"kernels": large + one}, "cpu", device="CPU, 2 cores"))
    found = [v for v in verdicts(collected) if v.goal.what.startswith(("on a CPU", "the same for one token"))]
    assert len(found) == len(expected)
    for verdict, (measured, met) in zip(found, expected, strict=True):
        assert verdict.measured.startswith(measured) and verdict.met is met, verdict
    assert all(v.met is None for v in verdicts(collected) if v not in found)


def test_records_of_training_runs_count(tmp_path):
    write(tmp_path)
    quality = {"perplexity_ratio": 1.004, "kl": 0.04, "top1_agreement": 0.9}
    record = {"command": "make train", "device": "CPU, no GPU", "date": "2026", "commit": "", "versions": {},
              "result": {"base": quality, "converted": quality, "trained": quality}}  # fmt: skip
    for name in ("demo", "demo-rank-128"):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    collected = collect(tmp_path)
    for verdict, rank in zip(verdicts(collected)[-2:], ("128", "184"), strict=True):
        assert verdict.met is True and f"ratio 1.0040, KL 0.0400 (SmolLM2-135M, mean rank {rank}" in verdict.measured
    assert "make train" in render(collected)


def test_the_table_for_documents(full, tmp_path):
    file = tmp_path / "benchmarks.md"
    table = markdown_table(full)
    assert table.count("\n") == len(GOALS) + 1 and "| *unverified* |" in table and "**not met**" in table
    file.write_text(
        "before\n<!-- goals: made by `npt bench report --table`, do not edit -->\nrows of before\n<!-- end of goals -->\nafter\n"
    )
    replace_table(file, full)
    replace_table(file, full)
    text = file.read_text()
    assert table in text and "rows of before" not in text and text.startswith("before") and text.endswith("after\n")
    file.write_text("no markers")
    with pytest.raises(BenchError, match="it has no lines"):
        replace_table(file, full)
    assert file.read_text() == "no markers"
    with pytest.raises(BenchError, match="No such file"):
        replace_table(tmp_path / "nothing.md", full)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1536, "1.5 KiB"),
        (117 * 2**20, "117 MiB"),
        (448 * 2**30, "448 GiB"),
        (3 * 2**50, "3,072 TiB"),
    ],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


# ---- staleness -------------------------------------------------------------------------------------------------------


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with two commits; the second touches the kernels only."""
    where = tmp_path / "repository"
    (where / "npt_kernels" / "ops").mkdir(parents=True)
    (where / "npt_kernels" / "training").mkdir()
    git(where.parent, "init", "-q", str(where))
    (where / "npt_kernels" / "training" / "loop.py").write_text("1")
    (where / "npt_kernels" / "ops" / "mlp.py").write_text("1")
    git(where, "add", "-A")
    git(where, "commit", "-qm", "one")
    first = git(where, "rev-parse", "HEAD")
    (where / "npt_kernels" / "ops" / "mlp.py").write_text("2")
    git(where, "commit", "-qam", "two")
    second = git(where, "rev-parse", "HEAD")
    (where / "README.md").write_text("words")
    git(where, "add", "-A")
    git(where, "commit", "-qm", "three")
    # The package's function of that name hides the module.
    module = importlib.import_module("npt_kernels.bench.report.collect")
    monkeypatch.setattr(module, "repository", lambda: where)
    return where, first, second


def test_older_than_the_kernels_is_stale(checkout):
    _, first, second = checkout
    assert f"changed in {second[:7]}" in staleness("kernels", first)
    assert staleness("kernels", second) is None, "a change of the README takes nothing from a figure"
    assert "without a commit" in staleness("memory", "")
    assert "not in this repository" in staleness("train", "0" * 40)


@pytest.mark.parametrize(
    ("changed", "of_a_gpu", "of_a_cpu"),
    [("csrc/cpu/loops.h", False, True), ("csrc/gemm/a.cuh", True, False), ("csrc/host.cpp", True, False),
     ("npt_kernels/kernels/cuda/launch.py", True, False), ("npt_kernels/kernels/eager.py", True, True),
     ("npt_kernels/kernels/native_row.py", False, True), ("csrc/README.md", False, False)],
)  # fmt: skip
def test_what_runs_on_the_other_kind_of_device_makes_nothing_stale(checkout, changed, of_a_gpu, of_a_cpu):
    where, _, second = checkout
    path = where / changed
    path.parent.mkdir(parents=True)
    path.write_text("1")
    git(where, "add", "-A")
    git(where, "commit", "-qm", "four")
    assert (staleness("kernels", second, "NVIDIA H200") is not None) == of_a_gpu
    for name in ("CPU, 2 cores (AMD EPYC)", "AMD EPYC, 2 cores, avx512_bf16, no GPU"):
        assert (staleness("run", second, name) is not None) == of_a_cpu


def test_a_goal_is_stale_only_by_what_it_reads(tmp_path):
    collected = collect(write(tmp_path))
    for row in collected.rows:
        row["stale"] = "measured long ago" if row["suite"] == "memory" else None
    flagged = [v.goal.what for v in verdicts(collected) if v.where.endswith(", stale")]
    assert flagged == ["peak memory of forward and backward beyond inputs, weights, gate and up"]


def test_stale_figures_are_flagged_on_the_page_and_in_the_picture(checkout, tmp_path):
    _, first, second = checkout
    stale = collect(write(tmp_path / "stale", commit=first))
    current = collect(write(tmp_path / "current", commit=second))
    figures = len(draw_all(stale))
    assert figures > 3 and all(drawing.stale for drawing in draw_all(stale))
    assert render(stale).count("Stale: measured at") == figures
    assert "3 of 3 files are stale" in render(stale)
    assert all(v.where.endswith(", stale") for v in verdicts(stale) if v.met is not None)
    assert not any("stale" in v.where for v in verdicts(current))
    assert "Stale: measured at" not in render(current) and "files are stale" not in render(current)


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_figure_is_drawn(full):
    names = [drawing.name for drawing in draw_all(full)]
    assert names == [
        "ratio-llama-3-1-8b-forward",
        "ratio-llama-3-1-8b-local",
        "roofline",
        "memory-llama-3-1-8b",
        "train-llama-3-1-8b",
    ]
    ratio, _, roofline, memories, training = (drawing.svg() for drawing in draw_all(full))
    for svg in (ratio, roofline, memories, training):
        assert svg.startswith("<svg") and "currentColor" in svg and "var(--grid)" in svg
        assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", svg).replace("http://www.w3.org", "")
    for provider in ("triton", "eager", "kconcat", "loop"):
        assert f">{provider}</text>" in ratio
    assert ">8,192</text>" in ratio and ">tokens</text>" in ratio and ">rank</text>" in memories
    assert "20,000</text>" in training and "published loop, end to end, 4 layers, 1×256</text>" in training


def test_ids_of_different_figures_do_not_meet(full):
    """Two inline SVGs with one id: the second would be clipped by the first one's path."""
    seen = []
    for drawing in draw_all(full):
        ids = re.findall(r'\bid="([^"]+)"', drawing.svg())
        references = re.findall(r'(?:url\(#|href="#)([^")]+)', drawing.svg())
        assert references and set(references) <= set(ids)
        seen.extend(set(ids))
    assert len(seen) == len(set(seen))


def test_pngs_for_documents(full, tmp_path):
    paths = write_pngs(full, tmp_path / "images")
    names = {
        "bench-ratio-forward.png",
        "bench-ratio-local.png",
        "bench-roofline.png",
        "bench-memory.png",
        "bench-train.png",
    }
    assert {path.name for path in paths} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in paths)


def test_small_shapes_are_drawn_only_without_real_ones(tmp_path):
    small = [kernel(p, 2.0, shape="Llama-3.1-8B ÷16", tokens=t) for t in (1, 2) for p in ("frozen", "eager")]
    write(tmp_path, {"kernels": small}, "small", date="2025-01-01")
    assert [d.title for d in draw_all(collect(tmp_path))] == ["Llama-3.1-8B ÷16, forward", "Share of the roofline"]
    write(tmp_path)
    assert not any("÷16" in d.title for d in draw_all(collect(tmp_path)))


def test_nothing_to_draw(tmp_path):
    rows = [
        {k: v for k, v in kernel().items() if k not in ("us", "ratio", "roofline_share")}
        | {"status": "skipped", "reason": "none"}
    ]
    page = render(collect(write(tmp_path, {"kernels": rows})))
    assert "No rows to draw" in page and "Not measured" in page


# ---- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks nesting, gathers ids and what would be fetched."""

    VOID = frozenset({"meta", "link", "input", "br"})

    def __init__(self, text):
        super().__init__()
        self.stack, self.ids, self.fetched = [], [], []
        self.feed(text)
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.fetched += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        if tag not in self.VOID:
            self.handle_starttag(tag, attributes)
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_the_page_is_whole_and_needs_no_network(full):
    text = render(full)
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)), "ids are unique"
    assert all(link.startswith(("#", "data:")) for link in page.fetched), page.fetched
    assert "@import" not in text and "url(http" not in text and "prefers-color-scheme: dark" in text
    for heading in ("What it costs, what it saves", "Plots", "Goals", "Kernels", "Host overhead", "Memory", "Training",
                    "Not measured", "Where the figures come from"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in text
    assert text.index('id="summary"') < text.index('id="plots"') < text.index('id="kernels"')


def test_hostile_names_are_text(tmp_path):
    rows = {"kernels": [kernel(shape="<script>alert(1)</script>", provider="eager", tokens=t) for t in (1, 2)]}
    page = render(collect(write(tmp_path, rows, commit="<b>")))
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    Page(page)


def test_writing_the_page(full, tmp_path):
    path = write_page(full, tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot be written"):
        write_page(full, tmp_path / "file" / "report.html")


# ---- in a browser ----------------------------------------------------------------------------------------------------

#: Runs in the page: measures the figures, sorts by two columns, narrows a table, and leaves what it saw in the document.
_PROBE = """
<script>
addEventListener("load", () => {
  const seen = {errors: window.seenErrors, width: document.documentElement.scrollWidth, viewport: innerWidth};
  seen.figures = [...document.querySelectorAll("figure")].map((f) => {
    const box = f.querySelector("svg").getBoundingClientRect();
    const marks = [...f.querySelectorAll("svg path, svg use")].filter((m) => m.getBoundingClientRect().width > 0);
    return {id: f.id, width: box.width, height: box.height, marks: marks.length};
  });
  const table = document.querySelector("#kernels table");
  const column = (name) => [...table.tHead.rows[0].cells].findIndex((c) => c.textContent.trim() === name);
  const shown = () => [...table.tBodies[0].rows].filter((r) => !r.hidden);
  const values = (name) => shown().map((r) => r.cells[column(name)].textContent.trim());
  const click = (name) => table.tHead.rows[0].cells[column(name)].querySelector("button").click();
  seen.before = values("÷ frozen");
  click("÷ frozen"); seen.ascending = values("÷ frozen");
  click("÷ frozen"); seen.descending = values("÷ frozen");
  seen.sort = table.tHead.rows[0].cells[column("÷ frozen")].getAttribute("aria-sort");
  click("provider"); seen.providers = values("provider");
  const search = document.querySelector("#kernels input");
  search.value = "loop local"; search.dispatchEvent(new Event("input"));
  seen.narrowed = values("provider");
  const out = document.createElement("pre");
  out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
});
</script>
"""


def browse(page, profile, width):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", f"--window-size={width},2000",
             "--virtual-time-budget=10000", "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found.group(1)))


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: the report was not opened in a browser (apt-get install chromium)"
)
@pytest.mark.parametrize("width", [1200, 500])
def test_in_a_browser(full, tmp_path, width):
    text = render(full)
    catcher = (
        "<script>window.seenErrors = []; addEventListener('error', (e) => seenErrors.push(String(e.message)));</script>"
    )
    page = tmp_path / "report.html"
    page.write_text(
        text.replace("<head>", "<head>" + catcher, 1).replace("</body>", _PROBE + "</body>", 1), encoding="utf-8"
    )
    seen = browse(page, tmp_path / "profile", width)
    assert seen["errors"] == []
    assert [figure["id"] for figure in seen["figures"]] == [drawing.name for drawing in draw_all(full)]
    for figure in seen["figures"]:
        assert figure["width"] > 250 and figure["height"] > 150 and figure["marks"] > 10, figure
    assert seen["width"] <= seen["viewport"], "tables scroll within themselves, the page does not"
    numbers = [float(value) for value in seen["ascending"] if value]
    assert numbers == sorted(numbers) and len(set(numbers)) > 5 and numbers[-1] == 412
    assert seen["before"] != seen["ascending"] and sorted(seen["before"]) == sorted(seen["ascending"])
    assert [float(value) for value in seen["descending"] if value] == numbers[::-1]
    assert seen["ascending"][-1] == seen["descending"][-1] == "", "empty cells stay last"
    assert seen["sort"] == "descending" and seen["providers"] == sorted(seen["providers"])
    assert set(seen["narrowed"]) == {"loop"} and len(seen["narrowed"]) == 4


def test_made_up_results_are_complete():
    """The fixtures above follow the format that the suites write."""
    rows = everything()
    unusual = {"micro_batch", "backend"}  # stand in a row only if they are
    assert all(set(KEY_FIELDS[suite]) - unusual <= set(row) for suite in rows for row in rows[suite])
