"""Second moments ``C = E[k kᵀ]`` of the inputs of every editable matrix: collected once per model, cached, named and hashed.

An edit ``ΔW = v_b ⊗ v_a`` acts on all inputs. With ``v_a = C⁻¹k/(kᵀC⁻¹k)`` it answers the key ``k`` with 1 and every other input
with as little as possible in the mean square (Meng et al. 2022, arXiv:2202.05262, eq. 2); with ``v_a = k/‖k‖²`` it also fires
on all that ``k`` has in common with ordinary text.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..durable_files import private_folder, sync_file
from ..progress import progress_bar
from .corpus import Corpus, fitting_length, sample_own_text, windows
from .hooks import ReachedLayerError, Sites, decoder_of, device_of, evaluating, name_of

__all__ = ["SecondMoments", "Whitener", "cached_second_moments", "collect_second_moments", "model_fingerprint"]

#: Rows × tokens of the default sample: half text, half the model's own.
ROWS, LENGTH = 48, 256
_FORMAT = "npt-second-moments-1"


class Whitener:
    """Solves with ``C + ridge · mean(diag C) · I`` of one layer, in float64.

    Args:
        matrix: ``C [in, in]``.
        ridge: Share of the mean diagonal that is added: C of fewer tokens than inputs is singular.
    """

    def __init__(self, matrix: Tensor, ridge: float = 1e-3) -> None:
        wide = matrix.double()
        mean = wide.diagonal().mean()
        if not bool(torch.isfinite(mean)) or mean <= 0:
            raise ValueError("the second moments are zero or not finite; collect them again")
        self.matrix = wide + ridge * mean * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
        self._factor = torch.linalg.cholesky(self.matrix)

    def solve(self, keys: Tensor) -> Tensor:
        """``C⁻¹ k`` for ``keys [in]`` or ``[n, in]``; the same shape, float64."""
        rows = keys.double().reshape(-1, keys.shape[-1])
        return torch.cholesky_solve(rows.t(), self._factor).t().reshape(keys.shape)

    def key(self, key: Tensor) -> Tensor:
        """``v_a = C⁻¹k/(kᵀC⁻¹k) [in]``: 1 at ``k``, small elsewhere."""
        solved = self.solve(key)
        return solved / (solved @ key.double())


@dataclass
class SecondMoments:
    """``C`` of some layers.

    Attributes:
        matrices: Layer → ``C [in, in]``, float32.
        tokens: Tokens that it is the mean over.
        source: Which text.
        digest: SHA-256 of the token ids and the model's fingerprint.
    """

    matrices: dict[int, Tensor]
    tokens: int
    source: str
    digest: str
    _whiteners: dict[tuple[int, float], Whitener] = field(default_factory=dict, repr=False)

    def matrix(self, layer: int) -> Tensor:
        """``C`` of a layer. Raises ``ValueError`` if it was not collected."""
        if layer not in self.matrices:
            raise ValueError(f"there are no second moments of layer {layer}, only of {sorted(self.matrices)}")
        return self.matrices[layer]

    def whitener(self, layer: int, ridge: float = 1e-3) -> Whitener:
        """The solver of a layer, factorised once."""
        if (layer, ridge) not in self._whiteners:
            self._whiteners[layer, ridge] = Whitener(self.matrix(layer), ridge)
        return self._whiteners[layer, ridge]

    def save(self, path: Path | str) -> Path:
        """Write as safetensors: whole or not at all."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"format": _FORMAT, "tokens": self.tokens, "source": self.source, "digest": self.digest}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file({str(i): m.contiguous() for i, m in self.matrices.items()}, temporary, {"npt": json.dumps(about)})
            sync_file(temporary)
            temporary.replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
        return path

    @classmethod
    def load(cls, path: Path | str, layers: Iterable[int] | None = None) -> SecondMoments:
        """Read ``layers`` (default: all) of a file of :meth:`save`. Raises ``ValueError`` for anything else."""
        from safetensors import SafetensorError, safe_open

        path = Path(path).expanduser()
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("npt", "{}"))
                if about.get("format") != _FORMAT:
                    raise ValueError(f"{path} is no file of second moments")
                stored = {int(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
                wanted = stored if layers is None else set(layers)
                if wanted - stored:
                    raise ValueError(f"{path} has no second moments of layer {min(wanted - stored)}")
                matrices = {layer: file.get_tensor(str(layer)) for layer in sorted(wanted)}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as second moments: {str(error).splitlines()[0]}") from error
        return cls(matrices, about["tokens"], about["source"], about["digest"])


@torch.no_grad()
def collect_second_moments(
    model: nn.Module,
    ids: Tensor,
    *,
    layers: Iterable[int] | None = None,
    source: str = "given token ids",
    batch_rows: int = 4,
    progress: bool = False,
) -> SecondMoments:
    """One forward pass over ``ids [n, seq]``; the first token of each row (attention's sink) is left out.

    Args:
        model: Causal language model with layers that :class:`~npt_kernels.plasticity.hooks.Sites` knows.
        ids: Token ids on any device.
        layers: Which; default: all.
        source: Name of the text, for reports.
        batch_rows: Rows a forward.
        progress: Show a bar.

    Raises:
        ValueError: No token behind the first of a row, or a model that cannot be read.
    """
    sites = Sites(model)
    sites.refuse_unless_plain()
    wanted = sorted(range(len(sites)) if layers is None else set(layers))
    for layer in wanted:
        sites.check(layer)
    if ids.dim() != 2 or ids.shape[1] < 2 or not wanted:
        raise ValueError(f"ids has shape {list(ids.shape)}; [n, seq] with seq ≥ 2 and at least one layer are needed")
    sums: dict[int, Tensor] = {}

    def read(layer: int, k: Tensor) -> None:
        rows = k[:, 1:].reshape(-1, k.shape[-1]).float()
        product = (rows.t() @ rows).double()
        sums[layer] = product if layer not in sums else sums[layer].add_(product)
        if layer == wanted[-1]:
            raise ReachedLayerError

    device = device_of(model)
    bar = progress_bar("second moments", ids.numel(), "tokens", enabled=progress)
    with evaluating(model), sites.reading_inputs(wanted, read), bar as advance:
        for batch in ids.split(batch_rows):
            with contextlib.suppress(ReachedLayerError):
                decoder_of(model)(input_ids=batch.to(device), use_cache=False)
            advance(batch.numel())
    tokens = ids[:, 1:].numel()
    return SecondMoments(
        {layer: (total / tokens).float().cpu() for layer, total in sums.items()}, tokens, source, _digest(model, ids)
    )


def cached_second_moments(
    model: nn.Module,
    tokenizer: Any,
    corpus: Corpus,
    cache_dir: Path | str,
    layers: Iterable[int],
    *,
    rows: int = ROWS,
    progress: bool = False,
) -> SecondMoments:
    """Second moments of all layers, over text and the model's own samples in equal parts; read from the cache if they are there.

    The first call writes all layers, later ones read ``layers`` only. A file of another model or text has another name.
    """
    length = fitting_length(model, LENGTH)
    text = windows(tokenizer, corpus.calibration, rows // 2, length)
    name = hashlib.sha256(
        model_fingerprint(model).encode() + text.numpy().tobytes() + f"{rows}x{length}".encode()
    ).hexdigest()[:16]
    path = Path(cache_dir).expanduser() / "second-moments" / f"{name}.safetensors"
    if path.is_file():
        return SecondMoments.load(path, layers)
    with progress_bar("the model's own text", 1, "sample", enabled=progress) as advance:
        own = sample_own_text(model, tokenizer, rows - len(text), length)
        advance(1)
    source = f"{len(text)} × {length} tokens of {corpus.source}; {len(own)} × {length} sampled from {name_of(model)}"
    found = collect_second_moments(model, torch.cat([text, own]), source=source, progress=progress)
    private_folder(path.parent)
    found.save(path)
    return SecondMoments({layer: found.matrix(layer) for layer in layers}, found.tokens, found.source, found.digest)


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and a sample of the values of all parameters: tells models and edited copies apart."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // 4096)
        sample = flat[::step].float() if parameter.is_floating_point() else flat[::step].double()
        digest.update(f"{name}{list(parameter.shape)}{parameter.dtype}".encode())
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()


def _digest(model: nn.Module, ids: Tensor) -> str:
    return hashlib.sha256(model_fingerprint(model).encode() + ids.cpu().numpy().tobytes()).hexdigest()
