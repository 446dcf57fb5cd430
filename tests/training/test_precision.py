"""Mixed precision: base dtype × autocast × rule × targets × objective, one training step each, against float32; loss scaling."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from npt_kernels import NPTConfig, apply_npt, npt_parameters
from npt_kernels.rules import RULES
from npt_kernels.run.fingerprint import base_fingerprint
from npt_kernels.run.open import make_accelerator
from npt_kernels.training.loop import Phase, PhaseLoop, StopRequest, TrainingError, make_objective
from tests.support.helpers import randomise, tiny_model, token_ids
from tests.support.runs import FAR, make_config, records, start

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TARGETS = {"llama": (("gate",), ("gate", "up", "down")), "gpt2": (("c_fc",), ("c_fc", "c_proj"))}
#: ‖g − g₃₂‖ ≤ FACTOR · eps · ‖g₃₂‖, eps of the coarsest dtype that takes part.
FACTOR = 4


def converted(family, rule, targets, dtype):
    model = tiny_model(family, layers=2).to(dtype)
    apply_npt(model, NPTConfig(layers="all", rule=rule, rank=4, num_ranks=2, init="small", targets=targets))
    randomise(model, 0.12)
    return model


def one_step(tmp_path, model, objective, dtype="float32", precision="no", *, steps=1, **training):
    """``(reports, gradients of the last step that was not skipped, the loop)``."""
    config = make_config(
        tmp_path,
        {"model": {"dtype": dtype}, "optimization": {"mixed_precision": precision}},
        max_grad_norm=0,
        **training,
    )
    phase = Phase("test", objective, steps, 1e-2, 0)
    accelerator = make_accelerator(config)
    accelerator.free_memory = lambda *_: ()  # there is nothing yet, and its garbage collection takes .4 s each time
    loop = PhaseLoop(phase, model, make_objective(objective, model, config, {}), token_ids(4, 12), config, accelerator)
    reports, gradients = [], []

    def keep(*_):
        gradients[:] = [parameter.grad.clone() for parameter in npt_parameters(model)]

    loop.optimizer.optimizer.register_step_pre_hook(keep)
    try:
        reports.extend(loop.steps(StopRequest()))
        assert len(reports) == steps
    finally:
        loop.close()
    return reports, gradients, loop


def distance(gradients, reference):
    flat, ref = (torch.cat([g.flatten() for g in group]) for group in (gradients, reference))
    return float((flat - ref).norm() / ref.norm())


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("objective", ["local", "kl"])
@pytest.mark.parametrize("rule", RULES)
def test_one_step_in_every_precision(family, rule, objective, tmp_path):
    for targets, dtype in itertools.product(TARGETS[family], DTYPES):
        if rule == "diagonal" and targets not in (("gate",), ("c_fc",)):
            targets = targets[:-1]
        model = converted(family, rule, targets, DTYPES[dtype])
        # The same (rounded) weights in float32.
        _, reference, _ = one_step(tmp_path, copy.deepcopy(model).float(), objective)
        for precision in PRECISIONS:
            what = f"{targets} {dtype} {precision}"
            trained = copy.deepcopy(model)
            before = [p.detach().clone() for p in npt_parameters(trained)]
            fingerprint = base_fingerprint(trained)
            (report,), gradients, loop = one_step(tmp_path, trained, objective, dtype, precision)
            assert report.loss > 0 and report.loss < float("inf"), what
            assert report.skipped == 0 and report.grad_norm > 0, what
            assert (loop.accelerator.scaler is not None) == (
                precision == "fp16" or (precision == "no" and dtype == "float16")
            ), what
            assert base_fingerprint(trained) == fingerprint, what
            for parameter, old, gradient in zip(npt_parameters(trained), before, reference, strict=True):
                assert parameter.dtype == torch.float32 and bool(parameter.isfinite().all()), what
                assert not torch.equal(parameter, old) or not bool(gradient.any()), what
            assert distance(gradients, reference) <= bound(dtype, precision), what


def bound(dtype, precision):
    """Measured over the whole matrix: at most 2.1 eps."""
    return FACTOR * max(torch.finfo(d).eps for d in (DTYPES[dtype], PRECISIONS[precision] or torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_is_tight(dtype, tmp_path, monkeypatch):
    """A change that is easily made by mistake is outside of it in every dtype: NP parameters used as they are cast, twice."""
    model = converted("llama", "self_key", ("gate", "up", "down"), DTYPES[dtype])
    _, reference, _ = one_step(tmp_path, copy.deepcopy(model).float(), "local")
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        for component in (layer.np_component for layer in wrong.model.layers):
            component.w_b_up["up"] *= 1.25
    _, gradients, _ = one_step(tmp_path, wrong, "local", dtype)
    assert distance(gradients, reference) > bound(dtype, "no")
    assert distance([g * 1.05 for g in reference], reference) > bound(dtype, "no")


# ---- loss scale ------------------------------------------------------------------------------------------------------


GRAD_SCALER = torch.amp.GradScaler


def scaled(monkeypatch, init_scale):
    """Every loss scale starts there."""
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: GRAD_SCALER(device, init_scale=init_scale))


PASSES_FLOAT16 = [("float32", "fp16"), ("float16", "no"), ("float16", "fp16"), ("bfloat16", "fp16")]
passes_float16 = pytest.mark.parametrize(("dtype", "precision"), PASSES_FLOAT16)


@passes_float16
@pytest.mark.parametrize("objective", ["local", "kl"])
def test_small_gradients_survive_float16(dtype, precision, objective, tmp_path):
    """A loss of a hundred thousandth of the usual: without a scale its gradients are zeros in float16."""
    model = converted("llama", "self_key", ("gate", "up", "down"), DTYPES[dtype])
    weight = {"equivalence_weight": 1e-5}
    _, reference, _ = one_step(tmp_path, copy.deepcopy(model).float(), objective, **weight)
    _, gradients, _ = one_step(tmp_path, copy.deepcopy(model), objective, dtype, precision, **weight)
    assert distance(gradients, reference) <= bound(dtype, precision)


@passes_float16
def test_steps_that_overflow_are_skipped_and_counted(dtype, precision, tmp_path, monkeypatch):
    scaled(monkeypatch, 2.0**40)
    model = converted("llama", "self_key", ("gate",), DTYPES[dtype])
    before = [p.detach().clone() for p in npt_parameters(model)]
    notes = []
    plain = PhaseLoop.__init__
    monkeypatch.setattr(PhaseLoop, "__init__", lambda self, *args, **kw: plain(self, *args, note=notes.append, **kw))
    reports, _, loop = one_step(tmp_path, model, "kl", dtype, precision, steps=3)
    assert [r.skipped for r in reports] == [1, 2, 3]
    assert loop.progress.skipped == 3 and loop.progress.schedule == 0
    assert loop.accelerator.scaler.get_scale() == 2.0**37
    assert all(torch.equal(p, old) for p, old in zip(npt_parameters(model), before, strict=True))
    (note,) = notes
    assert (
        "step 1 of phase test was skipped: its gradients overflowed float16; the loss scale is 5.49756e+11 now" in note
    )
    scaled(monkeypatch, 2.0**14)
    reports, _, loop = one_step(tmp_path, model, "kl", dtype, precision, steps=3)
    assert [r.skipped for r in reports] == [0, 0, 0] and loop.progress.schedule == 3


@pytest.mark.parametrize(
    ("dtype", "precision", "mend"),
    [
        ("float32", "fp16", r"Set optimization\.mixed_precision=bf16 or no"),
        ("float16", "no", r"Set model\.dtype=bfloat16 or float32"),
    ],
)
def test_overflow_down_to_the_smallest_scale_is_an_error(dtype, precision, mend, tmp_path, monkeypatch):
    scaled(monkeypatch, 4.0)
    model = converted("llama", "self_key", ("gate",), DTYPES[dtype])
    before = [p.detach().clone() for p in npt_parameters(model)]
    message = rf"overflow float16 even at a loss scale of 1: 3 steps up to step 3 of phase test were skipped.*{mend}, or a lower"
    with pytest.raises(TrainingError, match=message) as caught:
        one_step(tmp_path, model, "local", dtype, precision, steps=9, equivalence_weight=1e12)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, old) for p, old in zip(npt_parameters(model), before, strict=True))


def test_a_loss_that_is_not_finite_names_float16(tmp_path):
    model = converted("llama", "self_key", ("gate",), torch.float16)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 3000
        model.model.layers[0].mlp.up_proj.weight *= 3000
    with pytest.raises(TrainingError, match=r"loss is (nan|inf).*float16 ends at 65504, bfloat16 does not"):
        one_step(tmp_path, model, "kl", "float16", "no")


def test_no_scale_without_float16(tmp_path):
    for dtype, precision in (("float32", "no"), ("bfloat16", "bf16"), ("float16", "bf16")):
        config = make_config(tmp_path, {"model": {"dtype": dtype}, "optimization": {"mixed_precision": precision}})
        assert make_accelerator(config).scaler is None


def test_whole_fp16_runs_on_a_cpu(tmp_path):
    """Autocast is on, not a word that does nothing: the trained weights differ from those of a float32 run."""
    models = {}
    for precision in ("no", "fp16"):
        sections = {"model": FAR, "optimization": {"mixed_precision": precision}, "evaluation": {"prompts": []}}
        mode = {"mode": "local+polish", "max_steps": 3, "polish_steps": 2, "learning_rate": 1e-3}
        summary, models[precision] = start(tmp_path / precision, sections=sections, **mode)
        assert summary.trained.kl < summary.converted.kl
    log = records(tmp_path / "fp16", "train")
    assert [line["skipped"] for line in log if line["step"] == 3] == [0]
    a, b = (torch.cat([p.detach().flatten() for p in npt_parameters(m)]) for m in models.values())
    assert 0 < (a - b).norm() < 0.05 * a.norm()


@pytest.mark.parametrize("format", ["int8", "nf4", "int4", "fp8"])
@pytest.mark.parametrize(("dtype", "precision"), [("float32", "bf16"), ("bfloat16", "no"), ("float16", "fp16")])
def test_quantised_bases_in_every_precision(format, dtype, precision, tmp_path):
    from npt_kernels.conversion.quantise import quantise_base

    model = tiny_model("llama", layers=2).to(DTYPES[dtype])
    quantise_base(model, format)
    apply_npt(model, NPTConfig(layers="all", rule="rank1", rank=4, init="small"))
    randomise(model, 0.15)
    for objective in ("local", "kl"):
        trained = copy.deepcopy(model)
        fingerprint = base_fingerprint(trained)
        _, reference, _ = one_step(tmp_path, copy.deepcopy(model).float(), objective)
        (report,), gradients, _ = one_step(tmp_path, trained, objective, dtype, precision)
        assert report.skipped == 0 and base_fingerprint(trained) == fingerprint
        assert distance(gradients, reference) <= bound(dtype, precision)
