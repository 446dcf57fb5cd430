"""Secrets stay where they are, nothing that is read runs code, and no network is used unasked."""

from __future__ import annotations

import ast
import json
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils.other import load as accelerate_load
from safetensors.torch import load_file

from npt_kernels.base_model.loading import hub_problem, load_model
from npt_kernels.configs.schema import ConfigError, RunConfig, default_cache_dir
from npt_kernels.configs.yaml12 import YamlProblem, read_yaml
from npt_kernels.durable_files import private_folder
from tests.support.imports import ROOT, modules
from tools.audit import judge

#: Variables in which users keep secrets that the libraries below read.
SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "OPENAI_API_KEY",
    "GITHUB_TOKEN",
)
#: Run first in every child: a connection to anything but a local socket is written down, and refused.
GUARD = """
import os, socket
connect = socket.socket.connect
def note(address):
    with open(os.environ["SEEN_BY_GUARD"], "a") as file:
        file.write(f"{address}\\n")
    raise OSError("the test allows no network")
def guarded(self, address):
    return note(address) if self.family in (socket.AF_INET, socket.AF_INET6) else connect(self, address)
socket.socket.connect = socket.socket.connect_ex = guarded
socket.getaddrinfo = lambda host, *_, **__: note(host)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, **{str(i): i for i in range(1, 16)}}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


class Child:
    """``npt`` in a process whose environment and token file hold a secret, and which has no network."""

    def __init__(self, place: Path) -> None:
        self.place, self.secret = place, "hf_" + "SecretThatNobodyMayRead" * 2
        self.seen, guard, home = place / "seen", place / "guard", place / "home"
        for folder in (guard, home / "hf"):
            folder.mkdir(parents=True)
        (guard / "sitecustomize.py").write_text(GUARD)
        (home / "hf" / "token").write_text(self.secret)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "NPT_"))},
            **dict.fromkeys(SECRETS, self.secret), "HF_HOME": str(home / "hf"), "HOME": str(home), "COLUMNS": "200",
            "XDG_CACHE_HOME": str(home / ".cache"), "OMP_NUM_THREADS": "1", "SEEN_BY_GUARD": str(self.seen),
            "PYTHONPATH": os.pathsep.join((str(guard), str(ROOT))),
        }  # fmt: skip

    def __call__(self, *arguments: str, code: int = 0, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "npt_kernels", *arguments], env=self.environment | environment, cwd=self.place,
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == code, done.stderr[-3000:]
        return done.stdout + done.stderr

    @property
    def asked(self) -> list[str]:
        return self.seen.read_text().splitlines() if self.seen.exists() else []


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Child:
    return Child(tmp_path_factory.mktemp("child"))


@pytest.fixture(scope="module")
def trained(base: Path, child: Child) -> tuple[Path, str]:
    """The folder of a whole run, and all that it said."""
    text, out = child.place / "text.txt", child.place / "out"
    text.write_text("\n\n".join(" ".join(str((i * j) % 15 + 1) for i in range(40)) for j in range(1, 60)))
    settings = {
        "model.base_model_name": base, "model.rank": 4, "data.train_files": [str(text)], "data.max_length": 16,
        "data.calibration_tokens": 64, "training.max_steps": 4, "training.save_steps": 2, "training.logging_steps": 1,
        "training.batch_size": 2, "evaluation.tokens": 64, "evaluation.prompts": ["1 2 3"], "evaluation.max_new_tokens": 3,
    }  # fmt: skip
    said = child("train", "-o", str(out), *(f"{key}={value}" for key, value in settings.items()))
    return out, said + child("eval", str(out), "--out", str(child.place / "evaluated"))


@pytest.fixture(scope="module")
def asked(child: Child, trained: tuple[Path, str]) -> list[str]:
    """Addresses that ``trained`` wanted; the fixture comes before any test that asks."""
    return child.asked


# ---- secrets and network ---------------------------------------------------------------------------------------------


def test_no_secret_is_written_or_printed(child: Child, trained: tuple[Path, str], asked: list[str]) -> None:
    out, said = trained
    said += child("env") + child("env", "--json") + child("configs", "demo")
    said += child("train", "model.base_model_name=no-such/model", code=2)
    said += child("train", "model.base_model_name=no-such/model", code=1, NPT_DEBUG="1")
    written = [file for folder in (out, child.place / "evaluated") for file in folder.rglob("*") if file.is_file()]
    assert {"metrics.jsonl", "config.yaml", "summary.json", "samples.md", "state.pt"} <= {file.name for file in written}
    assert child.secret not in said
    for file in written:
        assert child.secret.encode() not in file.read_bytes(), file


def test_a_run_on_local_files_asks_nobody(child: Child, trained: tuple[Path, str], asked: list[str]) -> None:
    """Training, checkpoints, evaluation, samples."""
    assert trained[1] and asked == []
    child("train", "model.base_model_name=no-such/model", code=2)
    assert any("huggingface.co" in line for line in child.asked), "the guard must see whoever asks"


# ---- code ------------------------------------------------------------------------------------------------------------


def _calls() -> list[tuple[str, str, ast.Call]]:
    """``(module, what is called, the call)`` for every call of the package."""
    return [
        (name, ast.unparse(node.func), node)
        for name, file in modules().items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


def test_nothing_in_the_package_can_run_what_it_reads() -> None:
    loads = []
    for name, called, call in _calls():
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("trust_remote_code", "False") == "False", name
        assert called not in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load"), (name, called)
        assert not called.startswith(("pickle.", "marshal.", "dill.", "joblib.", "cloudpickle.")), (name, called)
        assert keywords.get("shell", "False") == "False", name
        if called == "torch.load":
            loads.append(name)
            assert keywords.get("weights_only") == "True", name
        if called == "yaml.load":
            from npt_kernels.configs import yaml12

            assert ast.unparse(call.args[1]) == "_Loader" and issubclass(yaml12._Loader, yaml.SafeLoader)
    assert sorted(set(loads)) == ["npt_kernels.model.adapter_files", "npt_kernels.run.checkpoints"]


def test_what_a_run_writes_cannot_run_code(trained: tuple[Path, str]) -> None:
    """Components as safetensors; what else a checkpoint holds is read by ``torch.load(weights_only=True)``."""
    files = [file for file in trained[0].rglob("*") if file.is_file()]
    tensors = [file for file in files if file.suffix not in {".json", ".jsonl", ".yaml", ".md", ".png"}]
    assert {f.name for f in tensors} == {"npt_model.safetensors", "state.pt", "optimizer.bin", "random_states_0.pkl"}
    for file in tensors:
        assert load_file(file) if file.suffix == ".safetensors" else accelerate_load(file, weights_only=True)
    assert not [file for file in files if file.stat().st_mode & stat.S_IWOTH]


def test_what_accelerate_reads_of_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    """Its own loader, as ``load_state`` calls it for the optimizer and the random numbers: with no argument that says so."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save(Evil(), tmp_path / "random_states_0.pkl")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        accelerate_load(tmp_path / "random_states_0.pkl")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "random_states_0.pkl", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file must be one that can"


@pytest.mark.parametrize("tag", ["python/object/apply:os.system", "python/name:os.system", "python/module:os"])
def test_yaml_makes_no_objects(tag: str) -> None:
    with pytest.raises(YamlProblem, match="could not determine a constructor") as caught:
        read_yaml(f"training: !!{tag} ['echo bad']\n")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "a-type-of-its-own"])
def test_code_that_comes_with_a_model_is_not_run(kind: str, base: Path, tmp_path: Path) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": names}))
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    run = RunConfig.from_mapping({"model": {"base_model_name": str(folder)}, "data": {"max_length": 16}})
    if kind == "llama":  # a type that transformers knows is loaded by transformers' own code
        assert type(load_model(run, "cpu")[0]).__module__.startswith("transformers.")
    else:
        with pytest.raises(ConfigError, match="could not be loaded") as caught:
            load_model(run, "cpu")
        assert "\n" not in str(caught.value)
    assert not ran.exists()


def test_pickled_weights_of_a_model_cannot_run_code(base: Path, tmp_path: Path) -> None:
    """One line, and not torch's own, which advises to read the file without its protection."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    folder = tmp_path / "model"
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    run = RunConfig.from_mapping({"model": {"base_model_name": str(folder)}, "data": {"max_length": 16}})
    for write in (lambda value, path: path.write_bytes(pickle.dumps(value)), torch.save):
        write({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")
        with pytest.raises(
            ConfigError, match=r"could not be loaded: its pickled weights .* take a copy with safetensors$"
        ):
            load_model(run, "cpu")
    assert not (tmp_path / "ran").exists()


def test_a_password_in_the_address_of_the_hub_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://someone:secret@127.0.0.1:9")
    problem = hub_problem()
    assert (
        problem is not None and problem.startswith("http://127.0.0.1:9 cannot be reached") and "secret" not in problem
    )


def test_caches_are_made_for_the_user_alone(tmp_path: Path) -> None:
    """Whatever the umask; a folder that is there, such as one that several users share, stays as it is."""
    shared = tmp_path / "shared"
    before = os.umask(0)
    try:
        shared.mkdir(mode=0o775)
        made = private_folder(shared / "npt_kernels" / "streaming")
        private_folder(shared)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (made, made.parent, shared)] == [0o700, 0o700, 0o775]


def test_caches_do_not_lie_where_all_users_write(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NPT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_cache_dir() == Path("/home/somebody/.cache/npt_kernels")


# ---- what others know of the pinned versions -------------------------------------------------------------------------


def test_an_audit_fails_for_what_is_known_and_warns_for_what_was_not_asked() -> None:
    good = {"name": "a", "version": "1", "vulns": []}
    known = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
    skipped = {"name": "c", "skip_reason": "not found"}
    assert judge({"dependencies": [good]}) == ("1 packages audited, nothing known", False)
    text, bad = judge({"dependencies": [good, known, skipped]})
    assert bad and "b 2: PYSEC-1, mended in 3" in text and "of 3 packages 1 were not audited (c" in text
    text, bad = judge({"dependencies": [skipped]})
    assert not bad and text.startswith("warning: ") and "packages audited" not in text
    assert judge("no network") == ("warning: constraints.txt was not audited: no network", False)
