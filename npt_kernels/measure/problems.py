"""One call of every op: random tensors of realistic size, the call through the public API, and its gradients by name.

The same code runs a backend, the reference (``eager`` in the same dtype) and the truth (``eager`` in float64, which the CPU
tests hold to the definition with every ΔW_t built). ``coefficients`` and ``value_grads`` are kernels, not ops; for them
reference and truth are the plain products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..component import AdapterTensors
from ..functional import npt_factored_linear, npt_gated_mlp, npt_linear, npt_mlp
from ..ops.matched_norm import matched_norm
from ..rules import get_rule
from .shapes import Case

__all__ = ["FROZEN", "Problem"]

#: Weights that are frozen in use: their gradient is not asked for.
FROZEN = ("weight", "gate_weight", "up_weight", "down_weight")


class Problem:
    """Tensors of a case and the ways to run it.

    Attributes:
        tensors: Name → tensor.
        per_token: Names whose first dimension is the token; their gradients are compared row by row.
        upstream: Gradients of the outputs, one each.
    """

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        self.per_token: set[str] = set()
        self.outputs: tuple[str, ...]
        getattr(self, f"_make_{case.op}")()
        widths = {"y": self._out_width()}
        # As of a loss that is a mean over tokens, so that sums over many of them stay in float16's range.
        self.upstream = {
            name: self._random(
                case.tokens,
                *(() if name == "key_scale" else (widths.get(name, case.model.d),)),
                scale=case.tokens**-0.5,
            )
            for name in self.outputs
        }

    def _random(self, *shape: int, scale: float = 1.0) -> Tensor:
        tensor = torch.empty(shape, dtype=self.case.dtype, device=self.device)
        return tensor.normal_(0, scale, generator=self.generator)

    def _add(self, name: str, *shape: int, scale: float = 1.0) -> None:
        self.tensors[name] = self._random(*shape, scale=scale)

    def _add_rows(self, name: str, *shape: int) -> None:
        self._add(name, self.case.tokens, *shape)
        self.per_token.add(name)

    def _out_width(self) -> int:
        return self.case.model.f if self.case.op in ("linear", "factored_linear") else self.case.model.d

    @property
    def _bottleneck(self) -> float:
        """Size of z's entries. rank1's c = z⟨z, p⟩ grows with z² √r; with z ≈ r^-1/4 it is of unit size as with other rules. At
        r = 1024 unit entries made c ≈ 50 and sums over 512 tokens 4.7e5, far beyond float16."""
        return (self.case.rank / self.case.num_ranks) ** -0.25 if self.case.rule == "rank1" else 1.0

    def _key(self, name: str, width: int) -> None:
        key = get_rule(self.case.rule).key
        if key != "none":
            self._add(name, *((self.case.rank, width) if key == "matrix" else (width,)), scale=width**-0.5)

    def _make_linear(self) -> None:
        model, k = self.case.model, self.case.num_ranks
        self._add_rows("x", model.d)
        self._add("weight", model.f, model.d, scale=model.d**-0.5)
        self._add_rows("v_a", k, model.d)
        self.tensors["v_a"] *= model.d**-0.5
        self._add_rows("v_b", k, model.f)
        self.outputs = ("y",)

    def _make_factored_linear(self) -> None:
        model, rank = self.case.model, self.case.rank
        self._add_rows("x", model.d)
        self._add_rows("z", rank)
        self.tensors["z"] *= self._bottleneck
        self._add("weight", model.f, model.d, scale=model.d**-0.5)
        self._key("w_a_up", model.d)
        self._add("w_b_up", rank, model.f, scale=rank**-0.5)
        self.outputs = ("y",)

    def _make_mlp(self) -> None:
        model, rank = self.case.model, self.case.rank
        targets = ("gate", "up", "down") if model.gated else ("up", "down")
        self._add_rows("x", model.d)
        self._add_rows("a", model.d)
        if self.case.key_scale:
            self._add_rows("key_scale")
            self.tensors["key_scale"].abs_().add_(0.5)
        for target in targets:
            out, fan_in = (model.d, model.f) if target == "down" else (model.f, model.d)
            self._add(f"{target}_weight", out, fan_in, scale=fan_in**-0.5)
            self._key(f"{target}_key", fan_in)
            self._add(f"{target}_value", rank, out, scale=rank**-0.5)
        self._add("w_down", model.d, rank, scale=model.d**-0.5 * self._bottleneck)
        self.outputs = ("y",)

    def _make_matched_norm(self) -> None:
        model = self.case.model
        self._add_rows("h", model.d)
        self._add_rows("a", model.d)
        self._add("weight_", model.d)  # not frozen here: its gradient is part of the kernel
        if model.norm == "layer":
            self._add("bias", model.d)
        self.outputs = ("u", "key_scale")

    def _make_coefficients(self) -> None:
        model, rank = self.case.model, self.case.rank
        self._add_rows("u", model.d)
        self._add_rows("a", model.d)
        self._add("w_down", model.d, rank, scale=model.d**-0.5 * self._bottleneck)
        self._key("w_a_up", model.d)
        self.outputs = ()

    def _make_value_grads(self) -> None:
        model, rank = self.case.model, self.case.rank
        self._add_rows("dy", model.f)
        self._add("w_b_up", rank, model.f, scale=model.f**-0.5)
        self._add_rows("c", rank)
        self.outputs = ()

    # ------------------------------------------------------------------------------------------------ running

    def call(self, tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        """Outputs by name."""
        case, t = self.case, tensors.get
        if case.op == "linear":
            x, weight, v_a, v_b = (tensors[n] for n in ("x", "weight", "v_a", "v_b"))
            return {"y": npt_linear(x, weight, v_a, v_b, backend=backend)}
        if case.op == "factored_linear":
            y = npt_factored_linear(
                tensors["x"], tensors["z"], tensors["weight"], t("w_a_up"), tensors["w_b_up"],
                rule=case.rule, num_ranks=case.num_ranks, backend=backend,
            )  # fmt: skip
            return {"y": y}
        if case.op == "mlp":
            return {"y": self._mlp(tensors, backend)}
        if case.op == "matched_norm":
            u, key_scale = matched_norm(
                tensors["h"], tensors["a"], t("weight_"), t("bias"), case.model.norm, 1e-5, backend
            )
            return {"u": u, "key_scale": key_scale}
        return self._kernel(tensors, backend)

    def _mlp(self, tensors: dict[str, Tensor], backend: str) -> Tensor:
        case, model = self.case, self.case.model
        names = {"gate": "gate", "up": "up", "down": "down"} if model.gated else {"up": "c_fc", "down": "c_proj"}
        adapter = AdapterTensors(
            tensors["w_down"],
            {names[n]: tensors[f"{n}_key"] for n in names if f"{n}_key" in tensors},
            {names[n]: tensors[f"{n}_value"] for n in names},
            rule=case.rule, num_ranks=case.num_ranks,
        )  # fmt: skip
        settings: dict[str, Any] = {"act": model.act, "key_scale": tensors.get("key_scale"), "backend": backend}
        weights = [tensors[f"{n}_weight"] for n in names]
        op: Callable[..., Tensor] = npt_gated_mlp if model.gated else npt_mlp
        return op(tensors["x"], tensors["a"], *weights, adapter, **settings)

    def _kernel(self, tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        case = self.case
        if case.op == "value_grads":
            dy, b, c = (tensors[n] for n in ("dy", "w_b_up", "c"))
            if backend == "triton":
                from ..kernels.triton.value_grads import dc_and_value_grad

                dc, db = dc_and_value_grad(dy, b, c, method="fused")
                assert dc is not None and db is not None
            elif backend == "cuda":
                from ..kernels.cuda import value_grads

                dc, db = value_grads.dc_and_value_grad(dy, b, c)
            else:
                dc, db = dy @ b.t(), c.t() @ dy
            return {"dc": dc, "sum d_w_b_up": db}
        u, a, w_down, key = tensors["u"], tensors["a"], tensors["w_down"], tensors.get("w_a_up")
        if backend == "triton":
            from ..kernels.triton.coefficients import coefficients_forward

            z, p, coefficients = coefficients_forward(
                None if key is None else u, a, w_down, key, None, case.rule, case.num_ranks
            )
        elif backend == "cuda":
            from ..kernels.cuda.coefficients import coefficients as coefficients_cuda

            made = coefficients_cuda(u, key, None, case.rule, case.num_ranks, a=a, w_down=w_down, method="fused")
            z, p, coefficients = made.z, made.p, made.c
        else:
            z = a @ w_down
            p = u.new_empty(0) if key is None else u @ (key.t() if key.dim() == 2 else key.unsqueeze(1))
            coefficients = get_rule(case.rule).coefficients(z, p, case.num_ranks, 1.0)
        return {"z": z, "c": coefficients} | ({} if p.numel() == 0 else {"p": p})

    def run(
        self, backend: str, rows: Tensor | slice | None = None, dtype: torch.dtype | None = None, sums: bool = True
    ) -> dict[str, Tensor]:
        """Outputs, and gradients as ``d NAME`` (``sum d NAME`` for sums over tokens), of all tokens or of some rows."""
        case = self.case

        def prepare(tensor: Tensor, per_token: bool) -> Tensor:
            tensor = tensor[rows] if per_token and rows is not None else tensor
            return tensor.to(dtype) if dtype is not None else tensor

        backward = case.backward and bool(self.outputs)
        wanted = [n for n in self.tensors if n not in FROZEN and (sums or n in self.per_token)] if backward else []
        leaves = {
            name: prepare(tensor, name in self.per_token).detach().requires_grad_(name in wanted)
            for name, tensor in self.tensors.items()
        }
        with torch.set_grad_enabled(backward):
            outputs = self.call(leaves, backend)
        results = {name: y.detach() for name, y in outputs.items()}
        if backward:
            upstream = [prepare(self.upstream[name], True) for name in outputs]
            inputs = [leaves[name] for name in wanted]
            for name, grad in zip(wanted, torch.autograd.grad(list(outputs.values()), inputs, upstream), strict=True):
                results[f"d {name}" if name in self.per_token else f"sum d {name}"] = grad
        return results

    def closure(self, backend: str) -> Callable[[], dict[str, Tensor]]:
        return lambda: self.run(backend)
