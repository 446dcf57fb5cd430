""":class:`NPTModelForCausalLM`: a base model and its adapter in one call, from folders or from the hub, and back there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import nn

from ._version import __version__
from .base_model.assets import default_cache_dir
from .base_model.loading import DEMO_NAME, PICKLED, HubUnreachable, cached_file, find_model, hub_problem, looks_local
from .messages import first_line, shown
from .model.adapter_files import CONFIG_NAME, WEIGHTS_NAME, base_model_of
from .model.install import converted_layers, npt_config, require_converted
from .model.save import find_adapter, load_npt, save_npt

__all__ = ["NPTModelForCausalLM"]

_FILES = (CONFIG_NAME, WEIGHTS_NAME)


class NPTModelForCausalLM:
    """Loads, saves and shares converted models. Like ``AutoModelForCausalLM`` it is never instantiated: what it returns is the
    transformers model itself, converted, with ``generate`` and everything else it has.
    """

    def __init__(self) -> None:
        raise TypeError(
            "NPTModelForCausalLM is not instantiated; use NPTModelForCausalLM.from_pretrained(adapter), or apply_npt(model)"
        )

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | os.PathLike[str],
        *,
        base_model: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        base_revision: str | None = None,
        fold: bool | None = None,
        token: str | bool | None = None,
        **base_arguments: Any,
    ) -> Any:
        """The base model of an adapter, converted with it, in evaluation mode.

        Args:
            adapter: A folder of :func:`npt_kernels.save_npt` (or a run's output folder), a published checkpoint, or a hub id
                such as ``"organisation/adapter"``. A folder wins over a hub id of the same name; what is in the hub's cache is
                used as it is there.
            base_model: Folder, hub id or ``"demo"``; default: the one written down in the adapter.
            revision, base_revision: Branch, tag or commit of the adapter and of the base model on the hub.
            fold: As in :func:`npt_kernels.load_npt`.
            token: For private repositories, as ``huggingface_hub`` takes it.
            base_arguments: For ``AutoModelForCausalLM.from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation``, …

        Returns:
            The transformers model. Its components are fp32 whatever ``dtype`` says.

        Raises:
            FileNotFoundError: The path leads nowhere, or the hub's repository holds no adapter.
            ConnectionError: It would have to come from the hub, which does not answer within two seconds.
            ValueError: An adapter that cannot be read or does not fit the base model; one that does not say its base model; a
                base model that cannot be loaded.
        """
        path = _adapter_path(adapter, revision, token)
        named = os.fspath(base_model) if base_model is not None else base_model_of(path)
        if named is None:
            raise ValueError(
                f"{adapter} does not say which base model it was made for; pass base_model=a folder or a hub id"
            )
        model = _base(named, base_revision, token, base_arguments, f"base_model={named!r} of {adapter}")
        load_npt(model, path, fold=fold)
        return model.eval()

    @staticmethod
    def save_pretrained(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
        """The adapter of a converted model in ``directory``: :func:`npt_kernels.save_npt` by the name that one looks for.

        (The model's own ``save_pretrained`` writes the base model too, with tensors that ``AutoModelForCausalLM`` does not know.)
        """
        return save_npt(model, directory)

    @staticmethod
    def push_to_hub(
        model: nn.Module,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload NPT adapter",
        token: str | bool | None = None,
    ) -> str:
        """Put the adapter of a converted model on the hub, with a card; the repository is made if there is none.

        Args:
            model: A converted model.
            repo_id: ``"organisation/name"``.
            private, revision, commit_message, token: As ``huggingface_hub`` takes them.

        Returns:
            The address of the commit.

        Raises:
            ConnectionError: The hub does not answer within two seconds, or ``HF_HUB_OFFLINE`` is set.
            ValueError: The model is not converted, or ``repo_id`` is none.
            Others: What ``huggingface_hub`` raises: no token, no right to write there.
        """
        require_converted(model)
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(repo_id)
        except (HFValidationError, TypeError) as error:
            raise ValueError(
                f"repo_id={shown(repo_id)} is no hub id ({first_line(error)}); use 'organisation/name'"
            ) from None
        problem = hub_problem()
        if problem is not None:
            raise ConnectionError(f"{repo_id} cannot be uploaded: {problem}; save_npt(model, folder) keeps it here")
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            save_npt(model, folder)
            (Path(folder) / "README.md").write_text(_card(model, repo_id), encoding="utf-8")
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
            )
        return str(commit)


def _adapter_path(adapter: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> Path:
    """The folder or file of an adapter on this machine, fetched from the hub if need be."""
    name = os.fspath(adapter)
    path = Path(name).expanduser()
    if path.exists():
        found = find_adapter(path)
        if found is None:
            raise FileNotFoundError(
                f"{name} holds no {CONFIG_NAME} and no published checkpoint; it is no adapter of save_npt"
            )
        return found
    if isinstance(adapter, os.PathLike) or looks_local(name):
        raise FileNotFoundError(
            f"{name} does not exist; give a folder of save_npt, or a hub id such as 'organisation/adapter'"
        )
    what = f"the adapter {name!r}"
    cached = [cached_file(name, file, revision, what) for file in _FILES]
    if None not in cached:
        return cached[0].parent  # type: ignore[union-attr]
    problem = hub_problem()
    if problem is not None:
        raise ConnectionError(
            f"{what} is not in the local cache and {problem}; give a folder, or download it where there is network (`hf download "
            f"{name}`)"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

    try:
        fetched = [Path(hf_hub_download(name, file, revision=revision, token=token)) for file in _FILES]
        return fetched[0].parent
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"{what} is not on the hub, or has no {CONFIG_NAME} and {WEIGHTS_NAME}, or is private ({first_line(error)}); check "
            "its name, pass token="
        ) from error
    except HfHubHTTPError as error:
        raise ConnectionError(f"{what} could not be downloaded: {first_line(error)}") from error


def _base(name: str, revision: str | None, token: str | bool | None, arguments: dict[str, Any], what: str) -> Any:
    """The base model. Raises what :meth:`NPTModelForCausalLM.from_pretrained` says."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(f"loading a model needs {error.name}; pip install 'npt_kernels[train]'") from error
    try:
        found = find_model(name, revision, what, default_cache_dir())
    except HubUnreachable as error:
        raise ConnectionError(str(error)) from None
    private = {"token": token} if found.on_hub and token is not None else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(found.source, **{**found.arguments, **private, **arguments})
    except (OSError, ValueError, KeyError, UnpicklingError) as error:
        problem = PICKLED if isinstance(error, UnpicklingError) else first_line(error)
        raise ValueError(f"{what} could not be loaded: {problem}") from error
    model.config._name_or_path = found.recorded
    return model


def _card(model: nn.Module, repo_id: str) -> str:
    """Model card: what it is, what it was made for, how to load it."""
    config, layers = npt_config(model), converted_layers(model)
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    on_hub = bool(base) and base != DEMO_NAME and not looks_local(base) and not Path(base).exists()
    head = ["library_name: npt_kernels", *([f"base_model: {base}"] if on_hub else []), "tags:", "- npt_kernels"]
    ranks = sorted({layer.np_component.rank for layer in layers.values()})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    arguments = f'"{repo_id}"' + ("" if on_hub else ", base_model=...")
    return "\n".join([
        "---", *head, "---", "", f"# {repo_id}", "",
        f"Adapter of a Neuro-Plastic Transformer (npt_kernels {__version__}) for {base or 'its base model'}: "
        f"{len(layers)} layers, rule `{config.rule}`, rank {rank}.",
        "", "```python", "from npt_kernels import NPTModelForCausalLM", "",
        f"model = NPTModelForCausalLM.from_pretrained({arguments})", "```", "",
    ])  # fmt: skip
