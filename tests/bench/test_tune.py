"""Tuning tables: lookup order, conditions, malformed files, the tuner's file handling."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from npt_kernels.bench import tune as tuner
from npt_kernels.kernels.triton import tables

GPUS = ("NVIDIA H200", "NVIDIA H100 80GB HBM3")
DTYPES = ("float16", "bfloat16", "float32")


@pytest.fixture(autouse=True)
def fresh_cache():
    tables.clear_cache()
    yield
    tables.clear_cache()


@pytest.fixture
def user_table(tmp_path, monkeypatch):
    """Writes a table of "My GPU" into the user's directory."""
    monkeypatch.setenv("NPT_TUNING_DIR", str(tmp_path))

    def write(content):
        path = tables.table_path("My GPU", tmp_path)
        path.write_text(content if isinstance(content, str) else json.dumps({"entries": content}))
        tables.clear_cache()
        return path

    return write


def entry(config, when=None, kernel="k", source="measured: test"):
    return {"kernel": kernel, "when": when or {}, "config": config, "source": source}


@pytest.mark.parametrize("path", sorted(tables.TABLES.glob("*.json")), ids=lambda p: p.stem)
def test_our_tables_are_well_formed_and_honest(path):
    entries = tables.check_table(json.loads(path.read_text()))
    for item in entries:
        assert item["source"].startswith(("measured: ", "predicted, not measured: "))


@pytest.mark.parametrize("gpu", ["", "Some GPU of tomorrow", *GPUS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 256, 512, 513, 131072])
@pytest.mark.parametrize("rank", [1, 16, 64, 128])
def test_every_gpu_has_a_tile_for_the_kernels_that_rely_on_the_table(gpu, dtype, tokens, rank):
    for kernel, keys in (("coefficients", {"BM", "BK"}), ("value_grads", {"BT", "BN"})):
        config = tables.lookup(kernel, gpu, dtype=dtype, tokens=tokens, rank=rank)
        assert keys | {"num_warps", "num_stages", "source"} <= set(config)


def test_gpus_with_a_table_are_found():
    for gpu in GPUS:
        assert tables.table_path(gpu).exists()
        ours = tables.lookup("coefficients", gpu, dtype="bfloat16", tokens=8192, rank=64)
        assert ours != tables.lookup("coefficients", "", dtype="bfloat16", tokens=8192, rank=64)


def test_unknown_kernel_is_empty():
    assert tables.lookup("no such kernel", "NVIDIA H200", tokens=1) == {}


def test_order_and_conditions(user_table):
    user_table([
        entry({"a": 1}, {"tokens": [None, 16]}), entry({"a": 2}, {"tokens": [17, 64], "dtype": ["float16", "bfloat16"]}),
        entry({"a": 3}, {"dtype": "float32"}), entry({"a": 4}, {"act": ["silu", "gelu"]}), entry({"a": 5}),
    ])  # fmt: skip

    def a(**shape):
        return tables.lookup("k", "My GPU", **shape)["a"]

    assert a(tokens=1) == a(tokens=16) == 1
    assert a(tokens=17, dtype="bfloat16") == a(tokens=64, dtype="float16") == 2
    assert a(tokens=64, dtype="float32") == 3
    assert a(tokens=65, dtype="float16") == a() == 5
    assert a(act="gelu") == 4 and a(act="relu") == 5


def test_user_table_first_then_default(user_table):
    user_table([entry({"BM": 7, "BK": 7, "num_warps": 1, "num_stages": 1}, kernel="coefficients")])
    assert tables.lookup("coefficients", "My GPU", tokens=1)["BM"] == 7
    assert "BT" in tables.lookup("value_grads", "My GPU", tokens=1, rank=1)
    assert tables.lookup("coefficients", "Other GPU", tokens=1)["BM"] != 7


def test_result_is_a_copy(user_table):
    user_table([entry({"a": 1})])
    tables.lookup("k", "My GPU")["a"] = 2
    assert tables.lookup("k", "My GPU")["a"] == 1


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{not json", "Expecting property name"),
        ("[]", "entries"),
        ('{"entries": [3]}', "entry 0 has no kernel name"),
        ('{"entries": [{"kernel": "k", "config": {}, "source": "x"}]}', "no config"),
        ('{"entries": [{"kernel": "k", "config": {"a": []}, "source": "x"}]}', "no number or string"),
        ('{"entries": [{"kernel": "k", "config": {"a": 1}}]}', "does not say its source"),
        (
            '{"entries": [{"kernel": "k", "config": {"a": 1}, "source": "x", "when": {"t": [1]}}]}',
            r"t must be \[low, high\]",
        ),
        ('{"entries": [{"kernel": "k", "config": {"a": 1}, "source": "x", "when": []}]}', "must be an object"),
    ],
)
def test_malformed_table_warns_and_the_default_serves(user_table, content, what):
    path = user_table(content)
    with pytest.warns(UserWarning, match=what) as record:
        config = tables.lookup("coefficients", "My GPU", tokens=1, rank=1)
    assert "BM" in config and str(path) in str(record[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tables.lookup("coefficients", "My GPU", tokens=2, rank=1)  # warned once


def test_importing_needs_no_kernels():
    import subprocess
    import sys

    code = (
        "import sys, npt_kernels.kernels.triton.tables as t; t.lookup('value_grads', '', rank=1); "
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only without a GPU")
def test_tune_refuses_without_gpu():
    with pytest.raises(RuntimeError, match="needs a CUDA GPU"):
        tuner.tune()


def test_tunables_are_complete():
    pytest.importorskip("triton")
    found = tuner.find_tunables()
    gemms = {"segmented_gemm", "gemm_act", "gate_up_forward", "gate_up_backward", "decode"}
    assert set(found) == gemms | {"coefficients", "value_grads"}
    for kernel, spec in found.items():
        assert spec["shapes"] and spec["candidates"] and callable(spec["prepare"])
        for dtype in (torch.bfloat16, torch.float32):
            tiles = spec["candidates"](dtype) if kernel in gemms else spec["candidates"]
            assert tiles and len({json.dumps(tile, sort_keys=True) for tile in tiles}) == len(tiles)
        assert all(key in shape for shape in spec["shapes"] for key in spec["keys"])


def test_measured_points_become_ranges(tmp_path, monkeypatch):
    points = [
        {"kernel": "k", "at": {"tokens": t, "rank": r}, "config": {"a": 10 * t + r}, "us": 1.0}
        for t in (2, 1)
        for r in (5, 3)
    ]
    path = tables.table_path("My GPU", tmp_path)
    monkeypatch.setenv("NPT_TUNING_DIR", str(tmp_path))
    tuner.write_table(path, tuner._ranges(points, "bfloat16", "measured: test"), "My GPU")

    def a(tokens, rank):
        return tables.lookup("k", "My GPU", tokens=tokens, rank=rank, dtype="bfloat16")["a"]

    assert [a(1, 1), a(1, 3), a(1, 4), a(1, 99), a(2, 3), a(99, 99)] == [13, 13, 15, 15, 23, 25]


def test_writing_keeps_what_it_does_not_replace(tmp_path, monkeypatch):
    monkeypatch.setenv("NPT_TUNING_DIR", str(tmp_path))
    path = tables.table_path("My GPU", tmp_path)
    tuner.write_table(
        path, [entry({"a": 1}, {"dtype": "float16"}), entry({"b": 1}, {"dtype": ["x", "y"]}, "other")], "My GPU"
    )
    tuner.write_table(path, [entry({"a": 2}, {"dtype": "float16"})], "My GPU")
    assert tables.lookup("k", "My GPU", dtype="float16")["a"] == 2
    assert tables.lookup("other", "My GPU", dtype="x")["b"] == 1
    assert len(json.loads(path.read_text())["entries"]) == 2
    before = path.read_text()
    with pytest.raises(ValueError):
        tuner.write_table(path, [{"kernel": "k"}], "My GPU")
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
