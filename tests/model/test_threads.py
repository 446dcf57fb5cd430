"""One model and many threads, copies and processes: everybody gets the bits that they get alone.

``NPT_THREAD_REPEATS=1000`` (``make threads``) is the long form.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading

import pytest
import torch
from torch import nn

from npt_kernels import NPTConfig, apply_npt, npt_disabled, npt_parameters, remove_npt
from npt_kernels.component import NPComponent
from npt_kernels.evaluation.fidelity import layer_fidelity
from npt_kernels.evaluation.perplexity import evaluate
from npt_kernels.model import ready, visits
from npt_kernels.model.documents import isolated_documents
from npt_kernels.model.install import converted_layers
from npt_kernels.model.own_thread import OwnThread
from npt_kernels.model.save import adapter_state_dict
from npt_kernels.ops import dense_on_use
from npt_kernels.training.objectives import KLObjective, LayerObjective, LocalObjective
from tests.support.helpers import assert_unchanged, randomise, snapshot, tiny_model, token_ids
from tests.support.processes import answer_in_a_process, in_a_forked_process
from tests.support.quantised_models import quantised
from tests.support.side_by_side import REPEATS, side_by_side

IDS = token_ids()
SETTINGS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def converted(name="llama", dtype=torch.float32, base=None, **settings):
    model = tiny_model(name, layers=3).to(dtype) if base is None else base
    apply_npt(model, NPTConfig(**({"layers": "all", "rank": 8, "init": "small"} | settings)))
    randomise(model)
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def original(model):
    with npt_disabled(model):
        return logits(model)


def in_inference_mode(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits.clone()


def generated(model):
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), **SETTINGS)


def gradients(model):
    """Without ``.grad``, which all threads would share."""
    loss = model(input_ids=IDS, use_cache=False).logits.float().square().mean()
    return torch.autograd.grad(loss, npt_parameters(model))


def trained(objective, base):
    """Another model, made, trained and thrown away."""
    model = copy.deepcopy(base)
    apply_npt(model, NPTConfig(layers="all", rank=4, init="small"))
    randomise(model)
    optimizer = torch.optim.AdamW(npt_parameters(model), lr=1e-2)
    for seed in range(2):
        objective(model).accumulate(token_ids(2, 8, seed), 1.0, lambda loss: loss.backward())
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}


def fidelity(model):
    return [layer.to_dict() for layer in layer_fidelity(model, token_ids(2, 12, 7), max_tokens=24)]


def local_gradients(model):
    """What a step of local training computes, on the model that is served, without touching its ``.grad``."""
    found = []
    parameters = npt_parameters(model)

    def backward(loss):
        found.append([g for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None])

    LocalObjective(model).accumulate(token_ids(2, 12, 8), 1.0, backward)
    return found


def measured(model):
    values = evaluate(model, token_ids(2, 12, 9)).to_dict()
    return {name: value for name, value in values.items() if "seconds" not in name}


# ---- one model, all that can be done with it -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.float32), ("gpt2", torch.float32), ("llama", torch.bfloat16)], ids=str
)
def test_serving_teaching_measuring_and_training_elsewhere(name, dtype):
    model = converted(name, dtype)
    before, base = snapshot(model), tiny_model("llama", layers=2, seed=5).to(dtype)
    works = {
        "forward": lambda: logits(model),
        "another forward": lambda: logits(model, token_ids(1, 3, 4)),
        "inference mode": lambda: in_inference_mode(model),
        "generate": lambda: generated(model),
        "disabled": lambda: original(model),
        "gradients": lambda: gradients(model),
        "trained elsewhere": lambda: trained(LocalObjective, base),
    }
    done = side_by_side(works, shares={"trained elsewhere": 0.2, "generate": 0.5})
    assert done["forward"] >= REPEATS and done["trained elsewhere"] >= 1
    assert_unchanged(model, before)


def test_measuring_a_model_that_is_served():
    """The visits put hooks and stand-ins on its layers, which are everybody's."""
    model = converted()
    before = snapshot(model)
    works = {
        "forward": lambda: logits(model),
        "disabled": lambda: original(model),
        "generate": lambda: generated(model),
        "fidelity": lambda: fidelity(model),
        "fidelity again": lambda: fidelity(model),
        "perplexity": lambda: measured(model),
        "local training": lambda: local_gradients(model),
    }
    shares = dict.fromkeys(("generate", "fidelity", "fidelity again", "perplexity", "local training"), 0.4)
    done = side_by_side(works, shares=shares)
    assert min(done["forward"], done["disabled"]) >= REPEATS
    assert_unchanged(model, before)


def test_documents_of_a_run_are_nobody_elses():
    model, separator = converted(), int(IDS[0, 4])

    def of_a_run():
        with isolated_documents(model, separator):
            return logits(model)

    assert not torch.equal(of_a_run(), logits(model))
    side_by_side({"run": of_a_run, "forward": lambda: logits(model), "another run": of_a_run})


@pytest.mark.parametrize("objective", [LocalObjective, LayerObjective, KLObjective])
def test_several_models_are_trained_at_the_same_time(objective):
    base = tiny_model("llama", layers=2, seed=5)  # random numbers are drawn before, for they are the process's
    done = side_by_side(
        {f"training {i}": lambda: trained(objective, base) for i in range(3)}, repeats=max(2, REPEATS // 8)
    )
    assert len(done) == 3


def test_models_of_different_configurations_at_the_same_time():
    models = {
        "folded": converted(),
        "not folded": converted(fold=False),
        "rank1": converted("gpt2", rule="rank1", num_ranks=2, rank=3),
        "diagonal, bf16": converted(dtype=torch.bfloat16, rule="diagonal"),
        "anchored": converted("gpt2", rule="anchored", targets=("c_proj",)),
        "int8": converted(base=quantised("llama", "int8", "torchao", layers=2)),
        "another int8": converted(base=quantised("llama", "int8", "torchao", layers=2, intermediate_size=64)),
    }
    works = {name: lambda model=model: (logits(model), original(model)) for name, model in models.items()}
    done = side_by_side(works)
    assert len(done) == 7 and min(done.values()) >= REPEATS


def test_models_are_converted_and_taken_back_at_the_same_time():
    """With dropout (GPT-2), which the probe of the layers compares under random numbers that are everybody's."""
    calibration = token_ids(4, 16, 2)
    bases = {name: tiny_model(name, layers=2) for name in ("llama", "gpt2")}

    def convert(name):
        model = copy.deepcopy(bases[name])
        untouched = snapshot(model)
        apply_npt(model, NPTConfig(layers="all", rank=6), calibration=calibration)
        kinds, values = [type(m) for m in model.modules()], logits(model)
        remove_npt(model)
        assert_unchanged(model, untouched)
        return kinds, values

    works = {f"{name} {i}": lambda name=name: convert(name) for name in bases for i in range(2)}
    works["random numbers"] = lambda: float(torch.rand(16).max()) < 1
    done = side_by_side(works, repeats=max(2, REPEATS // 8))
    assert min(done.values()) >= 2


def test_two_first_conversions_of_a_class_get_the_same_class(monkeypatch):
    """Both threads find that there is none yet."""
    from npt_kernels.model import swap

    class Plain(nn.Linear):
        pass

    made, meet = [], threading.Barrier(2)

    class Slow(dict):
        def __contains__(self, key):
            found = super().__contains__(key)
            meet.wait(10)
            return found

    monkeypatch.setattr(swap, "_made", Slow())
    threads = [threading.Thread(target=lambda: made.append(swap._class_of(visits_mixin(), Plain))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2 and made[0] is made[1]


def visits_mixin():
    from npt_kernels.model.mlp import NPTMlp

    return NPTMlp


# ---- what is kept, and written to meanwhile --------------------------------------------------------------------------


def test_a_weight_that_is_written_to_while_it_is_folded(monkeypatch):
    model = converted()
    plain = ready.folded_weight

    def meanwhile(w_down, projection):
        folded = plain(w_down, projection)
        projection.weight.mul_(2)  # another thread, before this one goes on
        return folded

    with monkeypatch.context() as patch:
        patch.setattr(ready, "folded_weight", meanwhile)
        logits(model)
    assert torch.equal(logits(model), logits(copy.deepcopy(model)))


def test_a_component_that_is_written_to_while_it_is_cast(monkeypatch):
    model = converted(dtype=torch.bfloat16)
    plain = NPComponent._tensors

    def meanwhile(self, *args, **kwargs):
        made = plain(self, *args, **kwargs)
        with torch.no_grad():
            self.w_b_up["up"].mul_(2)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(NPComponent, "_tensors", meanwhile)
        logits(model)
    assert torch.equal(logits(model), logits(copy.deepcopy(model)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_served_while_it_learns_and_up_to_date_behind_it(dtype):
    """Meanwhile every answer is some mixture; after it, that of the weights as they are."""
    model = converted(dtype=dtype)
    optimizer = torch.optim.AdamW(npt_parameters(model), lr=1e-2)
    stop, answers = threading.Event(), []

    def serve():
        while not stop.is_set():
            answers.append(bool(logits(model).isfinite().all()))

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in range(max(4, REPEATS // 4)):
        KLObjective(model).accumulate(token_ids(2, 8, step), 1.0, lambda loss: loss.backward())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            converted_layers(model)[1].self_attn.o_proj.weight.mul_(1.01)
        now = logits(model)
        assert torch.equal(now, logits(copy.deepcopy(model))), f"step {step}"
    stop.set()
    for thread in threads:
        thread.join()
    assert len(answers) > 4 and all(answers)


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_copies_made_while_it_is_served_and_measured():
    model = converted()
    on = logits(model)

    def copied():
        twin = copy.deepcopy(model)
        left = [hook for m in twin.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        assert all(isinstance(hook, OwnThread) and hook.hook is None for hook in left)
        assert not any(isinstance(m, visits._Recorder) for m in twin.modules())
        return logits(twin)

    def pickled():
        return logits(pickle.loads(pickle.dumps(model)))

    def saved():
        for _ in range(100):
            stream = io.BytesIO()
            try:
                torch.save(model, stream)
                break
            except RuntimeError as error:
                # torch walks through a module's hooks while `fidelity` registers one: it says so, once in a thousand times.
                if "mutated during iteration" not in str(error):
                    raise
        stream.seek(0)
        return logits(torch.load(stream, weights_only=False))

    works = {
        "forward": lambda: logits(model),
        "generate": lambda: generated(model),
        "fidelity": lambda: fidelity(model),
        "deepcopy": copied,
        "pickle": pickled,
        "torch.save": saved,
    }
    shares = {name: 0.4 for name in works if name != "forward"}
    side_by_side(works, shares=shares)
    assert torch.equal(logits(model), on)


def test_a_copy_made_inside_a_visit_is_of_the_model_alone():
    model, twins = converted(), []

    def visit(layer, h, a, y):
        twins.append(copy.deepcopy(model))
        twins.append(pickle.loads(pickle.dumps(model)))

    plain = visits.decoder_of
    with torch.no_grad():
        visits.walk_layers(model, IDS, visit)

        def recording(given):
            twins.append(copy.deepcopy(given))
            twins.append(pickle.loads(pickle.dumps(given)))
            return plain(given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(visits, "decoder_of", recording)
            visits.record_calls(model, [IDS])
    assert len(twins) == 2 * 3 + 2
    for twin in twins:
        assert torch.equal(logits(twin), logits(model))
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


# ---- processes -------------------------------------------------------------------------------------------------------


def test_forked_while_it_is_served():
    model, int8 = converted(), converted(base=quantised("llama", "int8", "torchao", layers=2))
    on, off, quick = logits(model), original(model), logits(int8)
    assert not torch.equal(on, off)

    def child():
        with npt_disabled(model):
            inside = logits(model)
        return torch.equal(logits(model), on) and torch.equal(inside, off) and torch.equal(logits(int8), quick)

    def child_of_a_block():
        return torch.equal(logits(model), off)  # the thread that forked was inside, and goes on inside

    stop = threading.Event()

    def serve():
        while not stop.is_set():
            logits(model)
            logits(int8)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(max(3, REPEATS // 8)):
            assert in_a_forked_process(child)
        with npt_disabled(model):
            assert in_a_forked_process(child_of_a_block)
    finally:
        stop.set()
        thread.join()
    assert torch.equal(logits(model), on)


def test_forked_while_another_thread_has_the_scratch():
    """The lock is never given back in the child: the thread that holds it is not there."""
    model = converted(base=quantised("llama", "int8", "torchao", layers=2))
    on, held, stop = logits(model), threading.Event(), threading.Event()

    def hold():
        with dense_on_use._borrowed((4, 4), torch.float32, torch.device("cpu")):
            held.set()
            stop.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    try:
        assert in_a_forked_process(lambda: torch.equal(logits(model), on))
    finally:
        stop.set()
        thread.join()
    assert torch.equal(logits(model), on)


def test_given_to_a_spawned_process():
    """torch moves the weights into shared memory for it, to another address, with the same version."""
    models = [converted(), converted("gpt2", dtype=torch.bfloat16)]
    on, off = [logits(model) for model in models], [original(model) for model in models]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=answer_in_a_process, args=(models, IDS, answers))
    process.start()
    found = answers.get(timeout=120)
    process.join(60)
    assert process.exitcode == 0
    assert all(map(torch.equal, found[0], on)) and all(map(torch.equal, found[1], off))
    assert all(torch.equal(logits(model), want) for model, want in zip(models, on, strict=True))
