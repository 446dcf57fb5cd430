"""``NPTModelForCausalLM``: base model and adapter from folders and the hub's cache, and to the hub. The network is never used."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
import torch

from npt_kernels import NPTConfig, NPTModelForCausalLM, apply_npt, load_npt, npt_parameters, save_npt
from npt_kernels.base_model import loading
from npt_kernels.model.install import converted_layers
from tests.support.helpers import randomise, tiny_model, token_ids

IDS = token_ids()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """The hub does not answer our question; whoever asks the network behind our back is caught."""
    asked = []

    def look_up(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(loading, "_probe", lambda endpoint, timeout: "no network in tests")
    yield
    assert not asked


@pytest.fixture
def saved(tmp_path):
    """``(base folder, adapter folder, logits of the converted model)``."""
    from transformers import AutoModelForCausalLM

    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    apply_npt(model, NPTConfig(layers="all", rank=6))
    randomise(model)
    NPTModelForCausalLM.save_pretrained(model, tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", logits(model)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def test_a_folder_brings_its_base_model_along(saved):
    base, adapter, want = saved
    assert json.loads((adapter / "npt_config.json").read_text())["base_model"] == str(base)
    for source in (adapter, str(adapter)):
        model = NPTModelForCausalLM.from_pretrained(source)
        assert type(model).__name__ == "LlamaForCausalLM" and not model.training
        assert torch.equal(logits(model), want)
        assert not any(p.requires_grad for n, p in model.named_parameters() if "np_component" not in n)
    # And again from what it saves itself; the folder of a run counts too.
    again = save_npt(model, adapter.parent / "run" / "adapter").parent
    assert torch.equal(logits(NPTModelForCausalLM.from_pretrained(again)), want)
    text = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert text.shape == (2, 15)


def test_arguments_reach_the_base_model_and_the_adapter(saved):
    base, adapter, want = saved
    elsewhere = shutil.move(base, base.with_name("moved"))
    model = NPTModelForCausalLM.from_pretrained(adapter, base_model=elsewhere, dtype=torch.bfloat16, fold=False)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in npt_parameters(model))
    assert not converted_layers(model)[0].npt_plan.fold
    places = {"model": "cpu", "lm_head": "cpu"}
    model = NPTModelForCausalLM.from_pretrained(adapter, base_model=str(elsewhere), device_map=places)
    assert torch.equal(logits(model), want)


def in_hub_cache(monkeypatch, cache, repo, folder):
    """The files of a folder where ``huggingface_hub`` keeps those of a repository."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    home = cache / f"models--{repo.replace('/', '--')}"
    commit = "a" * 40
    shutil.copytree(folder, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)


def test_ids_are_found_in_the_hubs_cache(saved, tmp_path, monkeypatch):
    base, adapter, want = saved
    in_hub_cache(monkeypatch, tmp_path / "cache", "someone/adapter", adapter)
    model = NPTModelForCausalLM.from_pretrained("someone/adapter")
    assert torch.equal(logits(model), want)
    # The base by its id too.
    in_hub_cache(monkeypatch, tmp_path / "cache", "someone/base", base)
    model = NPTModelForCausalLM.from_pretrained("someone/adapter", base_model="someone/base")
    assert torch.equal(logits(model), want)
    assert (
        json.loads((save_npt(model, tmp_path / "next") / "npt_config.json").read_text())["base_model"] == "someone/base"
    )


class Hub:
    """Stands in for ``HfApi``: keeps what is uploaded."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def __call__(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, **settings):
        self.calls.append(("create_repo", repo_id, settings))

    def upload_folder(self, *, repo_id, folder_path, **settings):
        self.calls.append(("upload_folder", repo_id, settings))
        shutil.copytree(folder_path, self.folder)
        return f"https://hub/{repo_id}/commit/1"


def test_push_and_pull_by_id(saved, tmp_path, monkeypatch):
    import huggingface_hub

    _, adapter, want = saved
    hub = Hub(tmp_path / "uploaded")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(loading, "_probe", lambda endpoint, timeout: None)
    model = NPTModelForCausalLM.from_pretrained(adapter)
    address = NPTModelForCausalLM.push_to_hub(model, "someone/pushed", private=True, token="t", commit_message="first")
    assert address == "https://hub/someone/pushed/commit/1"
    assert hub.calls == [
        ("token", "t"),
        ("create_repo", "someone/pushed", {"private": True, "exist_ok": True}),
        ("upload_folder", "someone/pushed", {"revision": None, "commit_message": "first"}),
    ]
    assert sorted(p.name for p in hub.folder.iterdir()) == ["README.md", "npt_config.json", "npt_model.safetensors"]
    card = (hub.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: npt_kernels\ntags:")
    assert 'NPTModelForCausalLM.from_pretrained("someone/pushed", base_model=...)' in card and "4 layers" in card

    fetched = []

    def download(repo, file, revision=None, token=None):
        fetched.append((repo, file, revision, token))
        return str(hub.folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    pulled = NPTModelForCausalLM.from_pretrained("someone/pushed", revision="v1", token="t")
    assert [f[1:] for f in fetched] == [("npt_config.json", "v1", "t"), ("npt_model.safetensors", "v1", "t")]
    assert torch.equal(logits(pulled), want)


def test_the_card_names_a_base_model_of_the_hub(saved):
    from npt_kernels.pretrained import _card

    model = tiny_model("llama")
    model.config._name_or_path = "someone/base"
    load_npt(model, saved[1])
    card = _card(model, "me/mine")
    assert "base_model: someone/base\n" in card and 'from_pretrained("me/mine")' in card and "rank 6" in card


def refusal(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_cannot_be_loaded_says_why(saved, tmp_path, monkeypatch):
    base, adapter, _ = saved
    load = NPTModelForCausalLM.from_pretrained
    refusal(
        FileNotFoundError, r"/nowhere does not exist; give a folder of save_npt", lambda: load(tmp_path / "nowhere")
    )
    refusal(FileNotFoundError, r"\./nowhere does not exist", lambda: load("./nowhere"))
    (tmp_path / "empty").mkdir()
    refusal(FileNotFoundError, r"/empty holds no npt_config\.json", lambda: load(tmp_path / "empty"))
    refusal(FileNotFoundError, r"/base holds no npt_config\.json", lambda: load(base))
    refusal(
        ConnectionError, r"the adapter 'someone/thing' is not in the local cache and .* cannot be reached \(no network in "
        r"tests\); give a folder, or download it", lambda: load("someone/thing"),
    )  # fmt: skip
    refusal(
        ConnectionError, r"base_model='someone/thing' of .*adapter is not in the local cache and .*hf download someone/thing",
        lambda: load(adapter, base_model="someone/thing"),
    )  # fmt: skip
    refusal(ValueError, r"the adapter 'not an id' is neither a local directory nor a hub id", lambda: load("not an id"))
    refusal(ValueError, r"base_model='\./gone' of .* is not a directory", lambda: load(adapter, base_model="./gone"))
    refusal(ValueError, r"is a directory without config\.json", lambda: load(adapter, base_model=tmp_path / "empty"))
    nameless = tiny_model("llama")
    apply_npt(nameless, NPTConfig(layers="all", rank=6))
    nameless.config._name_or_path = ""
    folder = save_npt(nameless, tmp_path / "nameless")
    refusal(ValueError, r"does not say which base model it was made for; pass base_model=", lambda: load(folder))
    tiny_model("gpt2").save_pretrained(tmp_path / "other")
    refusal(
        ValueError,
        r"does not fit this model|was made for a base model",
        lambda: load(adapter, base_model=tmp_path / "other"),
    )
    with pytest.raises(TypeError, match="is not instantiated"):
        NPTModelForCausalLM()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refusal(ConnectionError, "HF_HUB_OFFLINE is set; give a folder", lambda: load("someone/thing"))


def test_what_is_not_on_the_hub(saved, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    monkeypatch.setattr(loading, "_probe", lambda endpoint, timeout: None)

    class NotThere(RepositoryNotFoundError):
        def __init__(self):
            Exception.__init__(self, "404 Client Error.\n\nRepository Not Found for url")

    def download(*args, **kwargs):
        raise NotThere

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    refusal(
        FileNotFoundError, r"the adapter 'someone/thing' is not on the hub, or has no npt_config\.json .* pass token=",
        lambda: NPTModelForCausalLM.from_pretrained("someone/thing"),
    )  # fmt: skip


def test_what_cannot_be_pushed(saved):
    push = NPTModelForCausalLM.push_to_hub
    model = tiny_model("llama")
    refusal(ValueError, "has no NPT layers", lambda: push(model, "someone/thing"))
    load_npt(model, saved[1])
    refusal(ValueError, r"repo_id='a/b/c' is no hub id .*use 'organisation/name'", lambda: push(model, "a/b/c"))
    refusal(
        ConnectionError, r"someone/thing cannot be uploaded: .* cannot be reached .*save_npt\(model, folder\) keeps it here",
        lambda: push(model, "someone/thing"),
    )  # fmt: skip
