"""Readers of files on damaged, edited and invented input: what is returned is what the file says, or the file is refused."""

from __future__ import annotations

import atexit
import json
import math
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from npt_kernels import NPTConfig, apply_npt, save_npt
from npt_kernels.configs import load_run_config, named_configs, parse_yaml, read_named
from npt_kernels.configs.schema import ConfigError, RunConfig
from npt_kernels.configs.yaml12 import write_yaml
from npt_kernels.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME, AdapterFiles, read_adapter
from npt_kernels.run.checkpoints import MANIFEST, list_checkpoints, open_checkpoint, save_checkpoint
from npt_kernels.text.formats import read_file, read_pieces
from tests.support.helpers import tiny_model

from .outcome import outcome

__all__ = ["EVERY", "FILES"]

Draw = Callable[..., Any]
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**400) | st.just(2**63),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_TOKENS = [
    b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b"[", b"]", b"{", b"}", b":", b",", b"\n", b"\0", b"\xff", b"&a", b"*a",
    b"!!python/object:os.system", b"<<: ", b"'", b'"', b"99999999999999999999", b"../", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\t",
]  # fmt: skip


@cache
def _folder() -> Path:
    """Of this process; in memory where there is such a place."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="npt-fuzz-", dir=shared if shared.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _edited(draw: Draw, data: bytes) -> bytes:
    """Up to three edits: bytes replaced, inserted, left out, doubled, cut off."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([0, 1, 1, 2, 8, 64]))
        how = draw(st.sampled_from(["flip", "insert", "leave_out", "double", "cut"]))
        head, middle, tail = data[:start], data[start : start + length], data[start + length :]
        if how == "flip":
            bit = 1 << draw(st.integers(0, 7))
            data = head + bytes(byte ^ bit for byte in middle) + tail
        elif how == "insert":
            data = head + draw(st.sampled_from(_TOKENS)) + middle + tail
        elif how == "leave_out":
            data = head + tail
        elif how == "double":
            data = head + middle + middle + tail
        else:
            data = head
    return data


# ---- configurations --------------------------------------------------------------------------------------------------


def _yaml(draw: Draw) -> str:
    name = draw(st.sampled_from(sorted(named_configs())))
    path = _folder() / "config.yaml"
    path.write_bytes(_edited(draw, read_named(name).encode()))
    return _configuration(lambda: load_run_config(file=path), str(path))


def _override(draw: Draw) -> str:
    sections = RunConfig().model_dump()
    section = draw(st.sampled_from(sorted(sections)))
    key = draw(st.sampled_from(sorted(sections[section])) | st.text(max_size=8))
    value = draw(
        st.text(max_size=30)
        | st.integers().map(str)
        | st.floats().map(str)
        | _JSON.map(lambda value: json.dumps(value))
    )
    return _configuration(lambda: load_run_config("demo", overrides=[f"{section}.{key}={value}"]), "")


def _configuration(load: Callable[[], RunConfig], name: str) -> str:
    word, config, _ = outcome(load, names=(name,))
    if word == "read":
        # As a run records it, and as a resumed run reads it.
        again = RunConfig.from_mapping(parse_yaml(write_yaml(config.model_dump(mode="json")), "again"), source="again")
        assert again.model_dump() == config.model_dump(), "what is recorded is another configuration"
    return word


# ---- text ------------------------------------------------------------------------------------------------------------


def _text(suffix: str, make: Callable[[Draw], bytes]) -> Callable[[Draw], str]:
    def check(draw: Draw) -> str:
        path = _folder() / f"text{suffix}"
        data = make(draw)
        path.write_bytes(data)
        word, texts, _ = outcome(lambda: read_file(path, "text", "data.text_field"), names=(str(path),))
        pieces = outcome(lambda: list(read_pieces(path, "text", "data.text_field")), names=(str(path),))
        assert pieces[0] == word, f"whole: {word}, in pieces: {pieces[0]} {pieces[1]}"
        if word == "read":
            parts = [piece.text for piece, _ in pieces[1]]
            assert "".join(parts) == "".join(texts), "in pieces another text"
            _check_text(suffix, data, texts)
            # From any place on: the rest.
            if pieces[1]:
                number = draw(st.integers(0, len(pieces[1]) - 1))
                rest = [piece.text for piece, _ in read_pieces(path, "text", "data.text_field", pieces[1][number][1])]
                assert rest == parts[number + 1 :], "resumed from a place, another text"
        return word

    return check


def _check_text(suffix: str, data: bytes, texts: list[str]) -> None:
    """Against Python's own reading."""
    if suffix == ".txt":
        want = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        assert texts == [want]
    elif suffix == ".jsonl":
        lines = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8").split("\n")
        entries = [json.loads(line) for line in lines if line.strip()]
        found = [entry if isinstance(entry, str) else entry["text"] for entry in entries]
        whole = [
            text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in found if text is not None
        ]
        assert texts == whole


def _plain(draw: Draw) -> bytes:
    size = draw(st.sampled_from([1, 1, 1, 900]))
    return _edited(draw, (draw(st.text(max_size=80)).encode("utf-8", "replace") + b"a line\r\nand another\n") * size)


def _lines(draw: Draw) -> bytes:
    entries = draw(
        st.lists(st.fixed_dictionaries({"text": st.text(max_size=20)}) | st.text(max_size=9) | _JSON, max_size=4)
    )
    data = b"\n".join(
        json.dumps(entry, ensure_ascii=draw(st.booleans())).encode("utf-8", "replace") for entry in entries
    )
    return _edited(draw, data) if draw(st.booleans()) else data


def _array(draw: Draw) -> bytes:
    entries = draw(st.lists(st.fixed_dictionaries({"text": st.text(max_size=20)}) | _JSON, max_size=4) | _JSON)
    data = json.dumps(entries).encode()
    return _edited(draw, data) if draw(st.booleans()) else data


@cache
def _parquet_bytes() -> bytes:
    import pyarrow
    from pyarrow import parquet

    path = _folder() / "whole.parquet"
    parquet.write_table(pyarrow.table({"text": [f"row {i}" * (i % 5) for i in range(40)], "n": list(range(40))}), path)
    return path.read_bytes()


# ---- adapters --------------------------------------------------------------------------------------------------------


@cache
def _adapter() -> tuple[Path, AdapterFiles]:
    torch.manual_seed(0)
    model, path = tiny_model("llama", layers=1), _folder() / "adapter"
    apply_npt(model, NPTConfig(layers="all", rank=1, init="small"))
    save_npt(model, path)
    return path, read_adapter(path)


def _same(files: AdapterFiles, want: AdapterFiles) -> bool:
    return (
        files.config == want.config
        and (files.layers, files.ranks) == (want.layers, want.ranks)
        and files.tensors.keys() == want.tensors.keys()
        and all(torch.equal(tensor, want.tensors[name]) for name, tensor in files.tensors.items())
    )


def _read_adapter(name: str, data: bytes) -> str:
    """The adapter with another file: refused, the same adapter, or said to be another."""
    source, want = _adapter()
    path = _folder() / "edited"
    path.mkdir(exist_ok=True)
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        (path / file).write_bytes(data if file == name else (source / file).read_bytes())
    word, files, said = outcome(lambda: read_adapter(path), names=(str(path),), also=(FileNotFoundError,))
    if word == "read" and not _same(files, want):
        assert any("weights_sha256" in line or "no longer says" in line for line in said), (
            f"other numbers, nothing said: {said}"
        )
        return "read with a warning"
    return word


def _adapter_config(draw: Draw) -> str:
    data = (_adapter()[0] / CONFIG_NAME).read_bytes()
    if draw(st.booleans()):
        return _read_adapter(CONFIG_NAME, _edited(draw, data))
    header = json.loads(data)
    place = draw(st.sampled_from([header, header["config"]]))
    place[draw(st.sampled_from(sorted(place)) | st.text(max_size=9))] = draw(_JSON)
    return _read_adapter(CONFIG_NAME, json.dumps(header).encode())


def _adapter_weights(draw: Draw) -> str:
    data = (_adapter()[0] / WEIGHTS_NAME).read_bytes()
    if draw(st.booleans()):
        return _read_adapter(WEIGHTS_NAME, _edited(draw, data))
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    tensor = header[draw(st.sampled_from(sorted(header)))]
    tensor[draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(
        st.sampled_from(["F64", "BF16", "I64", "X"])
        | st.lists(st.sampled_from([0, 1, 4, -1, 2**31, 2**62]), max_size=3)
        | _JSON
    )
    text = json.dumps(header).encode()
    return _read_adapter(
        WEIGHTS_NAME, struct.pack("<Q", draw(st.sampled_from([len(text), 2**63, 0]))) + text + data[8 + size :]
    )


def _published(draw: Draw) -> str:
    """A torch-saved file has no sum of its own: a number that was changed is read as it stands, and must be finite."""
    path = _folder() / "published.pt"
    payload: dict[str, Any] = {"layer_0_A": torch.ones(8, 2), "layer_0_B": torch.ones(2, 8)}
    key = draw(st.sampled_from([*payload, "layer_0_C", "layer_-1_A", "layer_99999999999_A", "x"]))
    strange = [
        torch.ones(0),
        torch.ones(2, 2, 2),
        torch.full((8, 2), math.nan),
        torch.ones(8, 2).to_sparse(),
        torch.ones(1).expand(8, 2),
    ]
    if draw(st.booleans()):
        payload[key] = draw(st.sampled_from([*strange, torch.ones(8, 2, dtype=torch.int64)]) | _JSON)
    try:
        torch.save({"state_dict": payload, "config": draw(_JSON)} if draw(st.booleans()) else payload, path)
    except (OverflowError, UnicodeError):
        return "not written"
    if draw(st.booleans()):
        path.write_bytes(_edited(draw, path.read_bytes()))
    word, files, _ = outcome(lambda: read_adapter(path), names=(str(path),))
    if word == "read":
        assert all(isinstance(tensor, Tensor) for tensor in files.tensors.values())
    return word


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@cache
def _checkpoint() -> Path:
    from accelerate import Accelerator

    model = tiny_model("llama", layers=1)
    apply_npt(model, NPTConfig(layers="all", rank=1, init="small"))
    return save_checkpoint(
        _folder() / "checkpoints", model, Accelerator(cpu=True), run="a", phase="local", objective="local", step=1,
        total_steps=1, output_dir=_folder(), state={"step": 1},
    )  # fmt: skip


def _read_checkpoint(name: str, data: bytes) -> str:
    whole, path = _checkpoint(), _folder() / "edited-checkpoints" / "local-000001"
    if not path.is_dir():
        shutil.copytree(whole, path)
    before = (whole / name).read_bytes()
    (path / name).write_bytes(data)
    try:
        word, found, _ = outcome(lambda: open_checkpoint(path), names=(str(path),))
        listed, problems = list_checkpoints(path.parent)
        assert len(listed) + len(problems) == 1
        if word == "read":
            want = open_checkpoint(whole)
            assert (found.step, found.serial, found.run, found.output_dir) == (1, want.serial, "a", want.output_dir)
            assert data == before or name == MANIFEST, f"{name} is not what was written, and was taken"
            assert found.state() == {"step": 1}
        return word
    finally:
        (path / name).write_bytes(before)


def _any_of_a_checkpoint(draw: Draw) -> str:
    names = sorted(file.name for file in _checkpoint().iterdir())
    name = draw(st.sampled_from([*names, MANIFEST, MANIFEST]))
    return _read_checkpoint(name, _edited(draw, (_checkpoint() / name).read_bytes()))


# ---- the registry ----------------------------------------------------------------------------------------------------

#: Target → one drawn case of it; its word is what came out.
FILES: dict[str, Callable[[Draw], str]] = {
    "config file": _yaml,
    "config override": _override,
    "text .txt": _text(".txt", _plain),
    "text .jsonl": _text(".jsonl", _lines),
    "text .json": _text(".json", _array),
    "text .parquet": _text(".parquet", lambda draw: _edited(draw, _parquet_bytes())),
    "adapter config": _adapter_config,
    "adapter weights": _adapter_weights,
    "published .pt": _published,
    "checkpoint": _any_of_a_checkpoint,
}


def _cut_at_every_byte() -> Iterator[str]:
    """Every file of an adapter and of a checkpoint, a parquet file, at every length."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        data = (_adapter()[0] / name).read_bytes()
        for length in range(len(data)):
            word = _read_adapter(name, data[:length])
            assert word == "refused" or name == CONFIG_NAME, f"{name} cut at {length}: {word}"
            yield word
    for file in sorted(_checkpoint().iterdir()):
        data = file.read_bytes()
        for length in range(0, len(data), max(1, len(data) // 4000)):
            word = _read_checkpoint(file.name, data[:length])
            assert word == "refused" or data[length:].strip() == b"", f"{file.name} cut at {length}: {word}"
            yield word
    path, data = _folder() / "cut.parquet", _parquet_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        yield _only_refused(lambda: read_file(path, "text", "data.text_field"), path, f"cut at {length}")


def _only_refused(call: Callable[[], Any], path: Path, what: str) -> str:
    word, result, _ = outcome(call, names=(str(path),))
    assert word == "refused", f"{path.name} {what}: {result}"
    return word


def _paths_and_links() -> Iterator[str]:
    """A folder, a device, a link in a circle, a link to nowhere in a file's place; names that leave the folder."""
    source = _adapter()[0]
    for number, make in enumerate(
        (
            lambda path: path.mkdir(),
            lambda path: path.symlink_to(path),
            lambda path: path.symlink_to(path.parent / "nowhere"),
            lambda path: path.symlink_to(path.parent),
            lambda path: path.write_bytes(b""),
        )
    ):
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            path = _folder() / f"links-{number}-{name}"
            shutil.copytree(source, path)
            (path / name).unlink()
            make(path / name)
            word, result, _ = outcome(
                lambda path=path: read_adapter(path), names=(str(path),), also=(FileNotFoundError,)
            )
            assert word == "refused", result
            yield word
        for suffix in (".txt", ".jsonl", ".json", ".parquet"):
            path = _folder() / f"links-{number}{suffix}"
            make(path)
            word, result, _ = outcome(lambda path=path: read_file(path, "text", "data.text_field"), names=(str(path),))
            assert word == "refused" or (number == 4 and result in ([], [""])), result
            yield word
        path = _folder() / f"links-{number}.yaml"
        make(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                load_run_config(file=path)
                assert number == 4, "a configuration that is none"
                yield "read"
            except ConfigError:
                yield "refused"


#: Target → all of its cases, each of them in every run.
EVERY: dict[str, Callable[[], Iterator[str]]] = {
    "cut at every byte": _cut_at_every_byte,
    "paths and links": _paths_and_links,
}
