"""Run configurations: precedence, YAML as users write it, and one line for everything that is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from npt_kernels.configs import load_run_config, named_configs, parse_yaml, read_named
from npt_kernels.configs.schema import SECTIONS, ConfigError, RunConfig

LEGACY = """
model: {base_model_name: openai-community/gpt2, npt_layers: upper_half, rank: 64, modulation_scale: 0.1}
training:
  batch_size: 2
  gradient_accumulation_steps: 8
  learning_rate: 5e-4
  num_epochs: 3
  warmup_steps: 500
  weight_decay: 0.01
  max_grad_norm: 1.0
  equivalence_weight: 1.0
  regularization_weight: 0.01
  logging_steps: 10
  prediction_logging_steps: 100
  eval_steps: 500
  save_steps: 1000
data:
  {dataset_name: wikitext, dataset_config: wikitext-2-raw-v1, max_length: 512, num_train_samples: 10000, num_eval_samples: 100}
wandb: {enabled: false, project: npt, entity: null, tags: [npt, rank1]}
optimization: {use_cpu_offload: false, use_8bit: false, mixed_precision: no}
paths: {output_dir: ./outputs, cache_dir: null, checkpoint_dir: ./checkpoints}
"""
LEGACY_KEYS = {
    "model": "base_model_name npt_layers rank modulation_scale",
    "training": "batch_size gradient_accumulation_steps learning_rate num_epochs warmup_steps weight_decay max_grad_norm "
    "equivalence_weight regularization_weight logging_steps prediction_logging_steps eval_steps save_steps",
    "data": "dataset_name dataset_config max_length num_train_samples num_eval_samples",
    "wandb": "enabled project entity tags",
    "optimization": "use_cpu_offload use_8bit mixed_precision",
    "paths": "output_dir cache_dir checkpoint_dir",
}


def error_of(*overrides: str, name: str | None = None, file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config(name, file, overrides)
    return str(caught.value)


def test_every_named_configuration_is_valid_and_described() -> None:
    names = named_configs()
    assert list(names) == ["demo", "optimized", "published", "small"]
    for name, summary in names.items():
        assert len(summary) > 20, name
        assert load_run_config(name).paths.output_dir == f"runs/{name}"


def test_defaults_to_the_demo() -> None:
    config = load_run_config()
    assert config.model.base_model_name == "demo"
    assert config == load_run_config("demo")
    assert config.npt_config().rank == "auto:184"
    assert config.npt_config().layers == "all"


def test_published_is_the_earlier_recipe() -> None:
    npt = load_run_config("published").npt_config()
    assert (npt.rule, npt.layers, list(npt.targets), npt.init) == ("rank1", "upper_half", ["gate"], "published")


def test_a_file_with_the_keys_users_have_runs_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "legacy.yaml"
    file.write_text(LEGACY)
    written = yaml.safe_load(LEGACY)
    assert {section: set(keys) for section, keys in written.items()} == {
        s: set(k.split()) for s, k in LEGACY_KEYS.items()
    }
    config = load_run_config(file=file)
    assert config.training.learning_rate == 5e-4
    assert config.optimization.mixed_precision == "no"
    assert config.model.npt_layers == "upper_half"
    assert config.wandb.tags == ["npt", "rank1"]
    # A file alone is not laid over the demo.
    assert config.training.max_steps is None


def test_later_wins(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {rank: 32}\ntraining: {max_steps: 5, batch_size: 3}\n")
    config = load_run_config("demo", file, ["training.max_steps=7"])
    assert (config.model.rank, config.training.batch_size, config.training.max_steps) == (32, 3, 7)
    assert config.data.max_length == 256


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("model.npt_layers=16:20", "16:20"),  # YAML 1.1 reads this as 980
        ("model.npt_layers=[0, -1]", [0, -1]),
        ("model.rank=auto:64", "auto:64"),
        ("model.rank=0.25", 0.25),
        ("model.rank=64", 64),
        ("training.learning_rate=1e-4", 1e-4),  # YAML 1.1 reads this as text
        ("training.max_steps=null", None),
        ("optimization.mixed_precision=no", "no"),  # and this as false
        ("optimization.use_8bit=true", True),
        ("wandb.enabled=yes", True),
        ("data.train_files=[a.txt, 'b*.txt']", ["a.txt", "b*.txt"]),
        ("model.base_model_name=a=b", "a=b"),
    ],
)
def test_overrides_are_read_as_yaml(text: str, value: object) -> None:
    section, _, key = text.partition("=")[0].partition(".")
    assert getattr(getattr(load_run_config("demo", None, [text]), section), key) == value


def test_the_file_format_is_its_own_inverse() -> None:
    config = load_run_config("demo", None, ["model.npt_layers=4:8", "optimization.mixed_precision=no"])
    text = yaml.safe_dump(config.model_dump(mode="json"))
    assert RunConfig.from_mapping(parse_yaml(text, "x")) == config


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["training.learning_rat=1"], ["unknown key 'training.learning_rat'", "training.learning_rate"]),
        (["learning_rate=1"], ["unknown key 'learning_rate'", "training.learning_rate"]),
        (["model.batch_size=1"], ["model.batch_size", "training.batch_size"]),
        (["modle.rank=1"], ["unknown key 'modle'", "model"]),
        (["training.batch_size=0"], ["training.batch_size=0", "greater than or equal to 1"]),
        (["training.batch_size=many"], ["training.batch_size='many'", "integer"]),
        (["training.learning_rate=-1"], ["training.learning_rate=-1", "greater than 0"]),
        (["training.mode=fast"], ["training.mode='fast'", "local+polish"]),
        (["training.seed=-1"], ["training.seed=-1"]),
        (["model.rank=0"], ["rank=0", "auto:128"]),
        (["model.rank=auto:x"], ["rank='auto:x'"]),
        (["model.rank=1.5"], ["rank=1.5"]),
        (["model.rule=rank2"], ["rule='rank2'", "rank1"]),
        (["model.targets=[]"], ["targets is empty"]),
        (["model.npt_layers=most"], ["layers='most'", "upper_half"]),
        (["model.npt_layers=[]"], ["layers is an empty list"]),
        (["model.init=closed_form", "model.rule=rank1"], ["closed_form"]),
        (["model.basis=svd"], ["basis='svd'"]),
        (["model.dtype=int8"], ["model.dtype='int8'", "bfloat16"]),
        (["model.num_ranks=0"], ["model.num_ranks=0"]),
        (["data.max_length=1"], ["data.max_length=1"]),
        (["data.eval_fraction=1.5"], ["data.eval_fraction=1.5"]),
        (["data.train_files=book.txt"], ["data.train_files='book.txt'", "list"]),
        (["evaluation.tokens=0"], ["evaluation.tokens=0"]),
        (["optimization.mixed_precision=int4"], ["optimization.mixed_precision='int4'", "bf16"]),
        (["optimization.num_threads=0"], ["optimization.num_threads=0"]),
        (["optimization.use_8bit=perhaps"], ["optimization.use_8bit='perhaps'"]),
        (["wandb.enabled=perhaps"], ["wandb.enabled='perhaps'"]),
        (["paths.output_dir=[1]"], ["paths.output_dir=[1]"]),
        (["training=3"], ["training"]),
        (["training.max_steps"], ["section.key=value"]),
        (["training.max_steps=[1"], ["not valid YAML"]),
    ],
)
def test_what_is_wrong_is_named_with_its_mend(overrides: list[str], parts: list[str]) -> None:
    message = error_of(*overrides)
    for part in parts:
        assert part in message
    assert "\n" not in message, message


def test_a_wrong_name_and_wrong_files(tmp_path: Path) -> None:
    assert "did you mean 'small'" in error_of(name="smal")
    assert "--config mine.yaml" in error_of(name="mine.yaml")
    assert "No such file" in error_of(file=tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model:\n  rank: [1\n")
    assert "line" in error_of(file=broken) and "not valid YAML" in error_of(file=broken)
    broken.write_text("- model\n")
    assert "expected sections" in error_of(file=broken)
    broken.write_text("model:\n  rnk: 3\n")
    assert str(broken) in error_of(file=broken) and "model.rank" in error_of(file=broken)
    broken.write_text("model:\ntraining:\n")
    assert load_run_config(file=broken) == RunConfig()
    broken.write_bytes(b"\xff\xfe\x00")
    assert str(broken) in error_of(file=broken)


def test_shipped_files_teach_and_name_known_keys_only() -> None:
    for name in named_configs():
        text = read_named(name)
        assert f"npt train {name}" in text
        for section, keys in parse_yaml(text, name).items():
            assert set(keys) <= set(SECTIONS[section])


def test_the_schema_is_read_without_torch():
    """``--help`` prints its keys: formats and settings are names, and whoever checks one loads what it names."""
    code = (
        "import sys, npt_kernels.configs.schema as schema\n"
        "assert schema.RunConfig.model_fields and 'torch' not in sys.modules\n"
        "schema.RunConfig()\n"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "True", "the check of a rule's name does load it, so the assertion above can fail"


# ---- YAML that says one thing and was read as another -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training:\n  seed: 1\n  max_steps: 2\n  seed: 3\n", r"line 4, column 3 'seed' is there twice, first in line 2"),
        ("training: {seed: 1}\nmodel:\n  rank: 8\ntraining:\n", r"line 4, column 1 'training' is there twice, first in line 1"),
        ("training: {seed: 1, seed: 1}\n", r"line 1, column 21 'seed' is there twice"),
        ("training:\n  batch_size: true\n", r"training.batch_size=True: expected a number, got a boolean"),
        ("training:\n  adam_betas: [0.9, true]\n", r"training.adam_betas=.*expected a number"),
        ("training:\n  adam_betas: [1.5, -2]\n", r"training.adam_betas="),
        ("training:\n  adam_betas: [0.9, 1.0]\n", r"training.adam_betas="),
        ("training:\n  learning_rate: .inf\n", r"training.learning_rate=inf: Input should be a finite number"),
        ("training:\n  weight_decay: .nan\n", r"training.weight_decay=nan"),
        ("model:\n  modulation_scale: -.inf\n", r"model.modulation_scale=-inf"),
        ("training:\n  seed: " + "9" * 5000 + "\n", r"a number of 5000 digits"),
        ("model: " + "[" * 5000, r"nested too deeply|not valid YAML"),
    ],
)  # fmt: skip
def test_yaml_that_would_be_misread(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_run_config(None, path)
    lines = str(caught.value).splitlines()
    assert all("run.yaml" in line for line in lines) and len(lines) <= 2


@pytest.mark.parametrize(
    ("written", "value"),
    [("0042", 42), ("010", 10), ("08", 8), ("0o17", 15), ("0x1F", 31), ("1_000", 1000), ("+7", 7), ("016", 16)],
)
def test_whole_numbers_of_yaml_1_2(written, value):
    assert load_run_config(None, None, [f"training.seed={written}"]).training.seed == value
    assert load_run_config(None, None, [f"training.batch_size={written}"]).training.batch_size == value


def test_merge_keys_still_work(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("x: &base {seed: 5, max_steps: 7}\ntraining:\n  <<: *base\n  seed: 6\n")
    with pytest.raises(ConfigError, match="unknown key 'x'"):
        load_run_config(None, path)
    from npt_kernels.configs import parse_yaml

    assert parse_yaml(path.read_text(), "run.yaml")["training"] == {"seed": 6, "max_steps": 7}


# ---- found by tests/fuzz ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("!!int x", "is not valid YAML: 'x' is no !!int"),
        ("!!int ''", "is no !!int"),
        ("!!float y", "'y' is no !!float"),
        ("!!bool z", "'z' is no !!bool"),
        ("!!timestamp x", "is no !!timestamp"),
        ("!!map 5", "not valid YAML"),
        ('"\\0"', r"holds '\\x00', which is no character"),
        ('"\\ud83d"', r"holds '\\ud83d', which is no character"),
        ("9" * 5000, "a number of 5000 digits"),
        ("[" + "'" + "x" * 5000 + "'" + "]", "command line: "),
    ],
)
@pytest.mark.parametrize("key", ["model.base_model_name", "paths.output_dir"])
def test_a_value_that_is_no_value_is_one_short_line(key, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_run_config(None, None, [f"{key}={value}"])
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 700


def test_seeds_are_those_that_numpy_takes():
    assert load_run_config(None, None, ["training.seed=4294967295"]).training.seed == 2**32 - 1
    for value in ("4294967296", "99999999999999999999"):
        with pytest.raises(ConfigError, match=f"training.seed={value}: "):
            load_run_config(None, None, [f"training.seed={value}"])


def test_the_message_for_references_to_references_is_short(tmp_path):
    levels = [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 9)]
    path = tmp_path / "run.yaml"
    path.write_text(f"x0: &x0 [{', '.join('a' * 9)}]\n{''.join(levels)}model: {{npt_layers: *x8}}\n")
    with pytest.raises(ConfigError, match=r"model\.npt_layers=") as caught:
        load_run_config(None, path)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 21 and max(map(len, lines)) <= 610


@pytest.mark.parametrize(
    "text", ["1e3", "0o17", "010", "no", "null", "~", "2020-01-01", "16:20", ".5", "", " a", "x: y", "# c"]
)
def test_what_a_run_records_is_read_as_what_it_was(tmp_path, text):
    config = RunConfig.from_mapping(
        {
            "paths": {"output_dir": str(tmp_path)},
            "data": {"text_field": text},
            "evaluation": {"prompts": [text, f"{text}\nb"]},
        }
    )
    assert load_run_config(None, config.save()) == config
