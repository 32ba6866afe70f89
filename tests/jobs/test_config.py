"""One configuration from flags, YAML and defaults; every mistake is one line that names the option and the remedy."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.config import GenerateConfig
from jobs.options import Parser, add_options, build_config, flag_of
from pipeline.errors import ConfigError

REQUIRED = ["--model", "m", "--prompts", "a.jsonl", "b.jsonl", "--output", "out"]


def parse(*words: str) -> GenerateConfig:
    parser = Parser(prog="rasd generate")
    add_options(parser, GenerateConfig)
    return build_config(GenerateConfig, *parser.parse_known_args(words))


def test_flag_wins_over_yaml_and_yaml_over_default(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: from-yaml\nprompts: one.jsonl\noutput: out\ntop-p: 0.5\ntop_k: 7\nignore_eos: true\n")
    config = parse("--config", str(path), "--top-k", "9", "--no-ignore-eos")
    assert (config.model, config.prompts, config.top_p, config.top_k) == ("from-yaml", ("one.jsonl",), 0.5, 9)
    assert config.ignore_eos is False
    assert config.slots == GenerateConfig.model_fields["slots"].default


def test_every_field_is_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for name, field in GenerateConfig.model_fields.items():
        assert flag_of(name) in text
        assert field.description


def test_values_of_every_kind_arrive() -> None:
    words = ["--kv-memory", "4GiB", "--budget", "0", "--stop", "a b", "--stop", "\n", "--stop-token-ids", "3", "4"]
    config = parse(*REQUIRED, *words, "--seed", "-5", "--dry-run", "--gpus-per-replica", "0.5")
    assert config.kv_memory == 4 << 30
    assert config.budget == 0
    assert config.sampling().stop == ("a b", "\n")
    assert config.sampling().stop_token_ids == (3, 4)
    assert (config.seed, config.dry_run, config.gpus_per_replica) == (-5, True, 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-p", "1.5"], "--top-p is 1.5; it must be above 0 and at most 1."),
        (["--top-p", "much"], "--top-p is 'much'; it must be a number above 0 and at most 1."),
        (["--temperature", "-1"], "--temperature is -1; it must be at least 0."),
        (["--temperature", "nan"], "--temperature is nan; it must be a number at least 0."),
        (["--slots", "0"], "--slots is 0; it must be at least 1 or auto."),
        (["--slots", "1.5"], "--slots is 1.5; it must be a whole number at least 1 or auto."),
        (["--budget", "some"], "--budget is 'some'; it must be a whole number at least 0 or auto."),
        (["--kv-memory", "4 potatoes"], "--kv-memory is '4 potatoes'; it must be auto or a size such as 4GiB."),
        (["--dtype", "f32"], "--dtype is 'f32'; it must be one of auto, float32, bfloat16, float16."),
        (["--stop", ""], "--stop is ''; it must be a non-empty string."),
        (["--max-new-token", "3"], "unknown option --max-new-token; did you mean --max-new-tokens?"),
        (["--zzz"], "unknown option --zzz."),
        (["--slots"], "argument --slots: expected one argument."),
    ],
)
def test_bad_flag_is_one_clear_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*REQUIRED, *words)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_missing_required_option_is_named() -> None:
    with pytest.raises(ConfigError, match="--output is missing; it must be a directory's path"):
        parse("--model", "m", "--prompts", "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top_pp: 1", "unknown key 'top_pp' in .*; did you mean top_p?"),
        ("top_p: 2", "top_p in .* is 2; it must be above 0 and at most 1"),
        ("top_k: yes", "top_k in .* is True; it must be a whole number at least 0"),
        ("model: 3", "model in .* is 3; it must be a model's name"),
        ("top_p: 1\ntop_p: 0.5", "not valid YAML: .*'top_p' is given twice"),
        ("[1, 2]", "holds a list; it must be a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_yaml_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse("--prompts", "a", "--output", "o", "--config", str(path))


def test_missing_yaml_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--config is 'nowhere\.yaml'; it cannot be read"):
        parse(*REQUIRED, "--config", "nowhere.yaml")


def test_exit_codes_and_stderr_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generat"]) == 2
    assert capsys.readouterr().err == "rasd: error: unknown command 'generat'; did you mean generate?\n"
    assert main(["generate", *REQUIRED, "--top-p", "0"]) == 2
    assert capsys.readouterr().err == "rasd: error: --top-p is 0; it must be above 0 and at most 1.\n"
    assert main(["--version"]) == 0
    assert main([]) == 0


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, contextlib\n"
        "from jobs.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['generate', '--help'])\n"
        "sys.exit(' '.join({'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
