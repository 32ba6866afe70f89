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
from jobs.training_data import split
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


def test_what_is_held_out_is_not_learned_from() -> None:
    examples = [Example(np.array([i, i]), 1) for i in range(40)]
    kept, held_out = split(examples, 64)
    assert len(held_out) == 4 and len(kept) == 36
    assert not {int(e.tokens[0]) for e in kept} & {int(e.tokens[0]) for e in held_out}
