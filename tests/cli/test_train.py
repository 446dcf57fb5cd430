"""The npt command as users type it: what it prints, its exit codes, one red line for everything that is wrong."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import npt_kernels
from npt_kernels.cli import main as cli
from npt_kernels.configs import load_run_config, named_configs
from npt_kernels.configs.schema import SECTIONS
from tests.support.helpers import randomise

LEGACY = Path(__file__).parents[1] / "configs" / "test_config.py"


@pytest.fixture(autouse=True)
def quiet_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes beside the sources, uses the network, or depends on the user's variables."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("NPT_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


def npt(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def error_of(*arguments: str) -> str:
    result = npt(*arguments)
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---- help and facts --------------------------------------------------------------------------------------------------


def test_help_teaches() -> None:
    assert npt("--version").stdout.strip() == f"npt_kernels {npt_kernels.__version__}"
    text = npt("--help").stdout
    for part in ("train", "eval", "env", "configs", "npt train --dry-run"):
        assert part in text
    text = npt("train", "--help").stdout
    for part in ("--config", "--dry-run", "--resume", "--help-config", "npt train demo model.rank=auto:64", "Ctrl-C"):
        assert part in text
    assert "npt eval runs/demo" in npt("eval", "--help").stdout


def test_help_config_names_every_key() -> None:
    text = npt("train", "--help-config").stdout
    for section, keys in SECTIONS.items():
        assert section in text
        for key in keys:
            assert key in text


def test_configs() -> None:
    listing = npt("configs").stdout
    assert all(name in listing for name in named_configs())
    assert "base_model_name: demo" in npt("configs", "demo").stdout
    assert "did you mean 'demo'" in error_of("configs", "demoo")


def test_env() -> None:
    facts = json.loads(npt("env", "--json").stdout)
    assert facts["npt_kernels"]["version"] == npt_kernels.__version__
    assert facts["backends"]["eager"].endswith("; chosen unasked")
    assert "chosen unasked for the mlp in bfloat16: from 1,024" in facts["backends"]["cuda"]
    assert facts["backends"]["compiled for CPUs"]
    assert facts["hardware"]["cpu"] and facts["caches"]["npt_kernels"]
    assert "not downloaded" in npt("env").stdout or "ready" in npt("env").stdout


def test_ctrl_c_before_a_command_begins_is_one_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_python_dash_m() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "npt_kernels", "--version"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(npt_kernels.__file__).parents[1])},
    )  # fmt: skip
    assert result.stdout.startswith("npt_kernels ")


def test_help_loads_nothing_heavy() -> None:
    """Help must come at once; torch is the package's own import."""
    code = (
        "import sys; from npt_kernels.cli import main as cli; cli.app(['train', '--help'], standalone_mode=False); "
        "print([m for m in ('transformers', 'datasets', 'matplotlib', 'accelerate', 'yaml') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(npt_kernels.__file__).parents[1])},
    )  # fmt: skip
    assert result.stdout.strip().endswith("\n[]")


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(named_configs()))
def test_dry_run_of_the_named_configurations(name: str) -> None:
    result = npt("train", name, "--dry-run")
    assert result.exit_code == 0, result.output
    for part in ("base_model_name", "trainable", "memory at the peak", load_run_config(name).model.base_model_name):
        assert part in result.stdout
    assert not list(Path.cwd().iterdir()), "a dry run wrote something"


def test_dry_run_of_a_file_with_the_keys_users_have(tmp_path: Path) -> None:
    text = LEGACY.read_text().partition('LEGACY = """')[2].partition('"""')[0]
    (tmp_path / "mine.yaml").write_text(text)
    result = npt("train", "--config", "mine.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "12 gpt2-like layers" in result.stdout and "upper_half" in result.stdout and "rank 64" in result.stdout


def test_overrides_reach_the_plan() -> None:
    result = npt(
        "train", "--dry-run", "-o", "elsewhere", "model.rank=8", "model.npt_layers=28:30", "training.max_steps=3"
    )
    assert result.exit_code == 0, result.output
    for part in ("2 layers (28:30)", "rank 8", "3 (training.max_steps)", "elsewhere"):
        assert part in result.stdout


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["smal"], ["'smal'", "did you mean 'small'"]),
        (["demo", "small"], ["'small'", "only one NAME"]),
        (["training.learning_rat=1"], ["training.learning_rat", "training.learning_rate"]),
        (["rank=8"], ["unknown key 'rank'", "model.rank"]),
        (["model.rank=-3"], ["rank=-3"]),
        (["model.rank=1000"], ["rank=1000", "576"]),
        (["model.npt_layers=[40]"], ["layers contains 40", "30"]),
        (["model.rule=magic"], ["rule='magic'"]),
        (["training.batch_size=none"], ["training.batch_size='none'"]),
        (["data.max_length=100000"], ["data.max_length=100000", "8192"]),
        (["optimization.mixed_precision=half"], ["optimization.mixed_precision='half'"]),
        (["wandb.tags=one"], ["wandb.tags='one'"]),
        (["paths.output_dir=3"], ["paths.output_dir=3"]),
        (["evaluation.prompts=hello"], ["evaluation.prompts='hello'"]),
        (["model.base_model_name=a/b"], ["'a/b'", "not on this machine"]),
        (["model.base_model_name=./none"], ["'./none'", "is not a directory"]),
        (["--config", "none.yaml"], ["none.yaml", "No such file"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], parts: list[str]) -> None:
    message = error_of("train", *arguments, "--dry-run")
    for part in parts:
        assert part in message


def test_offline_hub_id_fails_within_three_seconds() -> None:
    start = time.perf_counter()
    message = error_of("train", "model.base_model_name=some/model")
    assert time.perf_counter() - start < 3
    assert "some/model" in message and "cannot be reached" in message


def test_offline_dataset_fails_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npt_kernels.run.open.load_model", lambda *_, **__: pytest.fail("the model was loaded first"))
    assert "data.dataset_name='Salesforce/wikitext'" in error_of("train", "small")
    assert "matches no file" in error_of("train", "data.train_files=['none.txt']")


def test_other_wrong_arguments(tmp_path: Path) -> None:
    assert "--resume: nowhere does not exist" in error_of("train", "--resume", "nowhere")
    assert "ADAPTER_DIR: nowhere does not exist" in error_of("eval", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no npt_config.json" in error_of("eval", "empty")
    (tmp_path / "file").write_text("")
    assert "paths.output_dir='file/x' cannot be written" in error_of("train", "-o", "file/x")
    assert npt("train", "--no-such-option").exit_code == 2


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPT_DEBUG", "1")
    assert type(npt("train", "smal").exception).__name__ == "ConfigError"


def test_an_error_nobody_foresaw_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from npt_kernels.estimate import whole_run as planning

    monkeypatch.setattr(planning, "make_plan", lambda config: {}["bug"])
    assert isinstance(npt("train", "--dry-run").exception, KeyError)
    monkeypatch.setattr(planning, "make_plan", lambda config: json.loads("{"))
    assert isinstance(npt("train", "--dry-run").exception, json.JSONDecodeError)


# ---- training and evaluation, with a tiny model ----------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a two-layer model, a byte tokenizer and a text: ``train`` and ``eval`` without downloads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={"</s>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(tmp_path / "tiny")
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    (tmp_path / "book.txt").write_text(
        "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 40
    )
    (tmp_path / "tiny.yaml").write_text(
        "model: {base_model_name: ./tiny, rank: 4}\n"
        "training: {max_steps: 2, batch_size: 2}\n"
        "data: {train_files: [book.txt], max_length: 16, calibration_tokens: 64}\n"
        "evaluation: {tokens: 60, prompts: [It was], max_new_tokens: 3}\n"
        "paths: {output_dir: out}\n"
    )
    return tmp_path


def test_four_levels_from_the_command_to_the_step(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who wants to know what a run does reads this chain, top to bottom."""
    from npt_kernels.training.loop import PhaseLoop

    chains: list[list[str]] = []

    def step(self: PhaseLoop, batch: Any) -> Any:
        frames = [frame.frame for frame in inspect.stack()[1:]]
        names = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame in reversed(frames)]
        chains.append([f"{module}.{name}" for module, name in names if module.startswith("npt_kernels.")])
        return original(self, batch)

    original = PhaseLoop._step
    monkeypatch.setattr(PhaseLoop, "_step", step)
    assert npt("train", "--config", "tiny.yaml", "model.init=small").exit_code == 0
    assert len(chains) == 2
    for chain in chains:
        assert chain == [
            "npt_kernels.cli.errors.wrapped",  # the decorator of every command
            "npt_kernels.cli.train.train",
            "npt_kernels.run.run.run_training",
            "npt_kernels.run.run.train",
            "npt_kernels.training.loop.steps",
        ]


def test_train_hands_everything_to_the_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run_training(
        config: Any, model: Any, tokenizer: Any, blocks: Any, *, resume: Any, console: Any, world: Any
    ) -> None:
        seen.update(config=config, model=model, blocks=blocks, resume=resume, world=world)

    monkeypatch.setattr("npt_kernels.run.run.run_training", run_training)
    result = npt("train", "--config", "tiny.yaml", "training.max_steps=1")
    assert result.exit_code == 0, (result.output, result.exception)
    assert seen["config"].training.max_steps == 1 and seen["resume"] is None and seen["world"].size == 1
    assert seen["blocks"].train.shape[1] == 16 and seen["model"].config.hidden_size == 16
    assert load_run_config(file=tiny / "out" / "config.yaml") == seen["config"]
    (tiny / "out" / "npt_config.json").write_text("{}")
    npt("train", "--config", "tiny.yaml", "--resume", "out")
    assert str(seen["resume"].adapter) == "out"

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("npt_kernels.run.run.run_training", interrupted)
    assert npt("train", "--config", "tiny.yaml").exit_code == 130


def test_resume_goes_on_with_the_configuration_of_the_run(tiny: Path) -> None:
    settings = ["training.learning_rate=0.01", "training.save_steps=2", "model.init=small"]
    assert npt("train", "--config", "tiny.yaml", "training.max_steps=3", *settings).exit_code == 0
    result = npt("train", "--resume", "out", "training.max_steps=5")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "resumed from out/checkpoints/end_to_end-000003" in result.output
    assert "training.max_steps 3 → 5" in result.output
    config = load_run_config(file=tiny / "out" / "config.yaml")
    assert config.training.learning_rate == 0.01 and config.paths.output_dir == "out"
    steps = [json.loads(line) for line in (tiny / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in steps if r["kind"] == "train"] == [1, 3, 5]
    # Before a model is loaded, and with nothing written:
    shutil.move(tiny / "tiny", tiny / "gone")
    assert "model.rank is 2, but" in error_of("train", "--resume", "out", "model.rank=2")
    assert "training.seed is 3, but" in error_of("train", "--config", "tiny.yaml", "--resume", "out", "training.seed=3")
    shutil.move(tiny / "gone", tiny / "tiny")
    # A run that was moved goes on where it is.
    shutil.move(tiny / "out", tiny / "moved")
    assert npt("train", "--resume", "moved", "training.max_steps=6").exit_code == 0
    assert not (tiny / "out").exists() and (tiny / "moved" / "checkpoints" / "end_to_end-000006").is_dir()
    assert npt("eval", "moved/checkpoints/end_to_end-000006", "--json").exit_code == 0


def test_a_missing_tracker_is_known_before_anything_is_loaded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    (tiny / "tiny" / "config.json").unlink()
    message = error_of("train", "--config", "tiny.yaml", "training.report_to=[trackio]")
    assert "training.report_to names trackio" in message and "pip install trackio" in message
    assert not (tiny / "out").exists()


@pytest.fixture
def adapter(tiny: Path) -> Path:
    """``out``: an adapter with its configuration beside, as a run leaves it."""
    from transformers import AutoModelForCausalLM

    from npt_kernels import NPTConfig, apply_npt, save_npt

    model = AutoModelForCausalLM.from_pretrained(tiny / "tiny")
    apply_npt(model, NPTConfig(layers="all", rank=4, init="small"))
    randomise(model)  # a start changes nothing
    save_npt(model, tiny / "out" / "adapter")
    (tiny / "out" / "config.yaml").write_text((tiny / "tiny.yaml").read_text())
    return tiny / "out" / "adapter"


def test_eval(adapter: Path) -> None:
    result = npt("eval", "out", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    payload = json.loads(result.stdout)
    assert payload["converted_layers"] == [0, 1] and payload["base_model"] == "./tiny"
    assert payload["metrics"]["tokens"] == 60 and payload["metrics"]["kl"] >= 0
    assert [sample["prompt"] for sample in payload["samples"]] == ["It was"]
    assert [entry["index"] for entry in payload["fidelity"]] == [0, 1]
    statistics = payload["fidelity"][0]["delta_statistics"]["gate"]
    assert 0 < statistics["p50"] <= statistics["p95"] <= statistics["max"] and statistics["relative"]["max"] > 0
    folder = adapter.parent / "eval"
    assert json.loads((folder / "eval.json").read_text()) == payload
    assert {file.name for file in folder.glob("*.png")} == {"perplexity.png", "fidelity.png", "delta_norms.png"}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in folder.glob("*.png"))


def test_eval_shows_tables_and_writes_where_it_is_told(adapter: Path) -> None:
    table = npt("eval", "out", "evaluation.tokens=30", "--out", "there").stdout
    for part in ("perplexity, converted", "top-1 agreement", "greedy continuations", "explained", "‖ΔW‖/‖W‖"):
        assert part in table
    assert "eval.json, perplexity.png, fidelity.png, delta_norms.png in there" in table
    assert sorted(file.name for file in Path("there").iterdir())[1] == "eval.json" and not Path("out/eval").exists()


def test_eval_of_a_checkpoint_leaves_it_as_it_was(adapter: Path) -> None:
    checkpoint = adapter.parent / "checkpoints" / "local-000001"
    checkpoint.parent.mkdir()
    adapter.rename(checkpoint)
    (checkpoint / "config.yaml").write_text((adapter.parent / "config.yaml").read_text())
    (checkpoint / "checkpoint.json").write_text("{}")
    before = sorted(os.listdir(checkpoint))
    assert npt("eval", "out/checkpoints/local-000001", "--json").exit_code == 0
    assert sorted(os.listdir(checkpoint)) == before
    assert (adapter.parent / "eval" / "local-000001" / "eval.json").is_file()


def test_eval_of_an_adapter_on_its_own(adapter: Path) -> None:
    alone = adapter.rename(adapter.parent.parent / "alone")
    text = ["data.train_files=[book.txt]", "data.max_length=16", "evaluation.tokens=30", "evaluation.max_new_tokens=2"]
    assert npt("eval", "alone", "--model", "./tiny", *text).exit_code == 0
    assert (alone / "eval" / "eval.json").is_file()
    assert npt("eval", "alone", *text).exit_code == 0, "the adapter says which model it belongs to"
    isolated = json.loads(npt("eval", "alone", *text, "data.isolate_documents=true", "--json").stdout)
    # One book is one document, whose end is not in the held-out text's first sequences: the same numbers.
    assert isolated["metrics"] == json.loads(npt("eval", "alone", *text, "--json").stdout)["metrics"]
    Path("file").write_text("")
    assert "file/x cannot be made: Not a directory; name another folder with --out" in error_of(
        "eval", "alone", *text, "--out", "file/x"
    )
    assert "'none.txt' matches no file" in error_of("eval", "alone", "data.train_files=[none.txt]")
    (alone / "npt_model.safetensors").write_bytes(b"damaged")
    assert "is damaged" in error_of("eval", "alone", *text)
