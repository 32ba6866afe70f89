"""Retrieval in the main job, with the real model: it changes the speed and never the text, whatever becomes of it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datastore.format import Manifest, write_manifest
from datastore.segment import write_segment
from pipeline.models import tokenizer_hash
from tests.jobs.chaos.nodes import actors_below
from tests.jobs.tables import table_of

ROOT = Path(__file__).parents[2]
EXACT = ["row_index", "id", "sample", "prompt", "text", "token_ids", "finish_reason", "seed", "status", "error_type"]
VOCABULARY = 49_152


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    subjects = ["the sea", "bread", "a clock", "winter", "copper", "a long road", "chess", "rain", "tea", "a violin"]
    path.write_text("".join(json.dumps({"prompt": f"Write about {subject}. It is"}) + "\n" for subject in subjects))
    return path


def command(prompts: Path, output: Path, cluster: str, *more: str) -> list[str]:
    words = ["--model", "smollm2-135m", "--prompts", str(prompts), "--output", str(output), "--max-context", "256"]
    words += ["--max-new-tokens", "24", "--rows-per-shard", "2", "--slots", "2", "--budget", "8", "--quiet"]
    return [sys.executable, "-m", "jobs.cli", "generate", *words, "--ray-address", cluster, *more]


def run(words: list[str]) -> dict[str, object]:
    done = subprocess.run(words, cwd=ROOT, check=True, timeout=250, stdout=subprocess.PIPE, text=True)
    record: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return record


@pytest.fixture(scope="module")
def plain(prompts: Path, cluster: str) -> Path:
    """Output of plain decoding: what every other run must equal."""
    run(command(prompts, prompts.parent / "plain", cluster, "--method", "plain"))
    return prompts.parent / "plain"


@pytest.fixture(scope="module")
def store(plain: Path, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> Path:
    """A datastore of those outputs, so that a lookup nearly always knows what comes next."""
    outputs = [np.asarray(row, np.int64) for row in table_of(plain)["token_ids"].to_pylist()]
    path = plain.parent / "store"
    record = write_segment(
        path / "segments" / "0",
        np.concatenate(outputs),
        np.cumsum([0, *map(len, outputs)]),
        [str(i) for i in range(len(outputs))],
        vocab_size=VOCABULARY,
        num_threads=1,
    )
    write_manifest(path, Manifest(tokenizer_hash(smollm2[1]), VOCABULARY, None, (record,)))
    return path


def accepted(record: dict[str, object]) -> dict[str, int]:
    found = record["accepted_by_source"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("mode", "live", "method"),
    [
        ("auto", "on", "auto"),
        ("shared", "off", "corpus"),
        ("per-node", "on", "retrieval"),
        ("in-process", "off", "auto"),
    ],
)
def test_every_mode_gives_the_text_of_plain_decoding_in_fewer_rounds(
    tmp_path: Path, prompts: Path, plain: Path, store: Path, cluster: str, mode: str, live: str, method: str
) -> None:
    words = ["--datastore", str(store), "--method", method, "--retrieval", mode, "--live", live]
    record = run(command(prompts, tmp_path / "out", cluster, *words, "--retrieval-deadline", "5000"))
    assert table_of(tmp_path / "out").select(EXACT).equals(table_of(plain).select(EXACT))
    assert record["method"] == ("rasd" if method == "auto" else method)
    assert accepted(record)["corpus"] > 100, "of 240 tokens"
    assert float(str(record["tau"])) > 2.5
    assert record["retrieval_misses"] == 0
    assert live == "on" or "live" not in accepted(record)


@pytest.mark.chaos
def test_killing_the_service_in_the_middle_changes_no_output_and_costs_no_row(
    tmp_path: Path, prompts: Path, plain: Path, store: Path, cluster: str
) -> None:
    output = tmp_path / "out"
    words = command(prompts, output, cluster, "--datastore", str(store), "--retrieval", "shared", "--slots", "1")
    killed = 0
    deadline = time.monotonic() + 250
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            assert time.monotonic() < deadline
            if len(list((output / "_commits").glob("*.json"))) > killed:
                killed += kill_services()
            time.sleep(0.02)
        printed, _ = process.communicate()
    assert process.returncode == 0 and killed >= 2
    assert json.loads(printed.splitlines()[-1])["retrieval_misses"] >= 1
    assert table_of(output).select(EXACT).equals(table_of(plain).select(EXACT))


def kill_services() -> int:
    """Those of this test's own cluster, whose processes are below this one."""
    found = list(actors_below(psutil.Process(), "RetrievalService"))
    for process in found:
        process.kill()
    return len(found)
