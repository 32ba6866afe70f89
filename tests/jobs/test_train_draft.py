"""`rasd train-draft` on the real model: answers, training, a killed run that goes on, a head that `generate` takes."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from jobs.commit import read_commits
from jobs.training_data import absolute, split
from pipeline.models import load_tokenizer, resolve_model
from pipeline.training.data import Example

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    subjects = ["the sea", "bread", "a clock", "winter", "copper", "a long road", "chess", "rain", "tea", "a violin"]
    path.write_text("".join(json.dumps({"prompt": f"Write about {subject}. It is"}) + "\n" for subject in subjects))
    return path


def words(prompts: Path, output: Path, cluster: str, *more: str) -> list[str]:
    options = ["--model", "smollm2-135m", "--prompts", str(prompts), "--output", str(output), "--ray-address", cluster]
    options += ["--dtype", "float32", "--max-new-tokens", "20", "--slots", "4", "--draft-vocab", "300", "--rank", "4"]
    options += ["--epochs", "6", "--batch-size", "2", "--length", "48", "--unroll", "2", "--evaluate-every", "8"]
    return ["train-draft", *options, "--held-out", "2", "--learning-rate", "3e-4", "--quiet", *more]


def record_of(printed: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return record


def test_a_killed_training_goes_on_and_its_head_drafts_for_generate(
    tmp_path: Path, prompts: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    command = [sys.executable, "-m", "jobs.cli", *words(prompts, killed, cluster)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 250
        while not (killed / "checkpoint.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    assert not (killed / "head.json").exists()
    results = []
    for output in (killed, undisturbed):
        assert main(words(prompts, output, cluster)) == 0
        results.append(record_of(capsys.readouterr().out))
    assert results[0]["steps"] == results[1]["steps"] == 27
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-3)
    curve = [json.loads(line) for line in (undisturbed / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == [8, 16, 24, 27]
    assert curve[-1]["held_out"]["loss"][0] < curve[0]["held_out"]["loss"][0]
    assert "27 steps" in (killed / "README.md").read_text()
    assert (killed / "curve.png").read_bytes().startswith(b"\x89PNG")

    assert main(words(prompts, killed, cluster, "--rank", "8")) == 2
    assert "rank: 4 -> 8" in capsys.readouterr().err

    texts = []
    for method in ("plain", "draft"):
        output = tmp_path / method
        options = ["--model", "smollm2-135m", "--prompts", str(prompts), "--output", str(output), "--method", method]
        options += ["--draft", str(killed), "--max-new-tokens", "20", "--max-context", "256", "--quiet"]
        assert main(["generate", *options, "--ray-address", cluster]) == 0
        record = record_of(capsys.readouterr().out)
        texts.append(pq.read_table([output / commit.file for commit, _ in read_commits(output) if commit])["token_ids"])
        assert method == "plain" or record["accepted_by_source"]["draft"] > 0
    assert texts[0].to_pylist() == texts[1].to_pylist()


# Ray Data, which Ray Train imports, warns of defaults of its own.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_workers_go_on_with_a_head_from_given_answers_and_documents(
    tmp_path: Path, prompts: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", "smollm2-135m", "--ray-address", cluster, "--quiet"]
    answers = ["--output", str(tmp_path / "answers"), "--max-new-tokens", "20", "--method", "plain"]
    assert main(["generate", *model, *answers, "--prompts", str(prompts)]) == 0
    documents = tmp_path / "documents.jsonl"
    documents.write_text(
        "".join(json.dumps({"text": f"{n} bottles of beer on the wall. " * 9}) + "\n" for n in range(4))
    )
    shape = ["--batch-size", "3", "--length", "32", "--unroll", "2", "--held-out", "2", "--dtype", "float32"]
    data = ["--answers", str(tmp_path / "answers"), "--corpus", str(documents), "--corpus-tokens", "200"]
    first = ["--output", str(tmp_path / "first"), "--epochs", "2", "--draft-vocab", "300", "--rank", "4"]
    capsys.readouterr()
    assert main(["train-draft", *model, *shape, *data, *first]) == 0
    record = record_of(capsys.readouterr().out)
    assert record["sequences"] == 9 + 8  # of ten answers one is held out; 80 + 80 + 40 tokens are eight pieces
    second = ["--output", str(tmp_path / "second"), "--epochs", "3", "--initial", str(tmp_path / "first")]
    assert main(["train-draft", *model, *shape, *data, *second, "--num-workers", "2"]) == 0
    continued = record_of(capsys.readouterr().out)
    assert continued["state"] == "done" and continued["steps"] == 17
    assert continued["loss"][0] < record["loss"][0]
    assert json.loads((tmp_path / "second" / "head.json").read_text())["draft_vocab_size"] == 300
    third = ["--output", str(tmp_path / "third"), "--epochs", "400", "--evaluate-every", "5", "--num-workers", "2"]
    command = [sys.executable, "-m", "jobs.cli", "train-draft", *model, *shape, *data, *third]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "third" / "curve.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    steps = record_of(printed)["steps"]
    assert record_of(printed)["state"] == "stopped" and 5 <= steps < 2000
    assert json.loads((tmp_path / "third" / "curve.jsonl").read_text().splitlines()[-1])["step"] == steps


def test_answers_must_be_the_targets_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["train-draft", "--model", "smollm2-135m", "--output", str(tmp_path / "head")]
    assert main(options) == 2
    assert "--prompts, --answers and --corpus are all missing" in capsys.readouterr().err
    assert main([*options, "--answers", str(tmp_path)]) == 2
    assert "is no output of `rasd generate`" in capsys.readouterr().err
    (tmp_path / "plan.json").write_text(json.dumps({"fingerprint": {"weights": "1" * 64}}))
    assert main([*options, "--answers", str(tmp_path)]) == 2
    assert "was generated by the model 1111111111111111" in capsys.readouterr().err
    assert main([*options, "--answers", str(tmp_path / "plan.json")]) == 2
    assert "is no output of `rasd generate`" in capsys.readouterr().err
    assert main([*options, "--corpus", str(tmp_path), "--initial", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main([*options, "--corpus", str(tmp_path), "--num-workers", "9"]) == 2
    assert "--num-workers is 9; they share the 8 sequences" in capsys.readouterr().err
    (tmp_path / "plan.json").unlink()
    (tmp_path / "short.txt").write_text("x")
    assert main([*options, "--corpus", str(tmp_path / "short.txt")]) == 2
    assert "there are 0 sequences to learn from" in capsys.readouterr().err


def test_the_shipped_heads_name_is_no_directory(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "head.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    options = ["--model", "smollm2-135m", "--prompts", str(prompts), "--output", str(tmp_path / "out")]
    assert main(["generate", *options, "--draft", "head"]) == 2
    assert "for the directory write ./head" in capsys.readouterr().err


def test_paths_are_absolute_and_names_of_data_sets_stay() -> None:
    specs = [absolute(spec) for spec in ("no/such/data-set", "generations:some", "*.jsonl")]
    assert specs == ["no/such/data-set", f"generations:{Path('some').absolute()}", str(Path("*.jsonl").absolute())]


def test_a_head_of_another_target_is_refused(tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "head").mkdir()
    config = {"target": "0" * 64, "depths": [0, 1, 2], "hidden_size": 8, "num_heads": 1, "num_kv_heads": 1}
    config |= {
        "head_dim": 8,
        "intermediate_size": 8,
        "rope_theta": 1e4,
        "vocab_size": 9,
        "draft_vocab_size": 4,
        "rank": 0,
    }
    (tmp_path / "head" / "head.json").write_text(json.dumps(config))
    options = ["--model", "smollm2-135m", "--prompts", str(prompts), "--output", str(tmp_path / "out")]
    assert main(["generate", *options, "--draft", str(tmp_path / "head")]) == 2
    assert "was trained for the target 0000000000000000" in capsys.readouterr().err


def test_a_draft_model_must_have_the_targets_tokenizer(
    tmp_path: Path, prompts: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The target's own weights draft for it; with one more token in their vocabulary they are refused."""
    resolved = resolve_model("smollm2-135m")
    draft = tmp_path / "draft"
    draft.mkdir()
    for file in Path(resolved.path).iterdir():
        (draft / file.name).symlink_to(file)
    options = ["--model", "smollm2-135m", "--prompts", str(prompts), "--draft", str(draft), "--method", "draft"]
    options += ["--max-new-tokens", "8", "--max-context", "256", "--budget", "4", "--ray-address", cluster, "--quiet"]
    assert main(["generate", *options, "--output", str(tmp_path / "out")]) == 0
    record = record_of(capsys.readouterr().out)
    assert record["errors"] == 0 and record["tau"] > 2.0, "it drafts what it says itself"

    tokenizer = load_tokenizer(resolved)
    tokenizer.add_tokens(["<one more>"])
    for file in draft.glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(draft)
    assert main(["generate", *options, "--output", str(tmp_path / "other")]) == 2
    assert "a draft model must have the target's" in capsys.readouterr().err


def test_no_prompt_that_is_held_out_is_learned_from() -> None:
    examples = [Example(np.array([1, i % 40, i]), 2) for i in range(80)]  # two answers to each of 40 prompts
    kept, held_out = split(examples, 64)
    assert len(held_out) == 4 and len(kept) == 72
    assert not {int(e.tokens[1]) for e in kept} & {int(e.tokens[1]) for e in held_out}
    documents = [Example(np.array([1, i, i]), 1) for i in range(40)]
    kept, held_out = split(documents, 64)
    assert len(held_out) == 4 and len(kept) == 36
    assert split([], 64) == ([], [])
