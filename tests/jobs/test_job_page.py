"""report.html of a generation job: its figures are the rows', and what a replica tells survives a bad end."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from jobs.commit import read_commits
from jobs.html.document import SOURCES
from tests.browser import Browser, program

PROMPTS = [
    {"id": f"r{i}", "task": "lists", "prompt": f"{word}, {word}, {word}, {word},"} for i, word in enumerate("abcd")
]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> Path:
    folder = tmp_path_factory.mktemp("job")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS) + "{broken\n")
    words = ["--model", "smollm2-135m", "--prompts", str(folder / "prompts.jsonl"), "--output", str(folder / "out")]
    words += ["--max-new-tokens", "12", "--max-context", "128", "--quiet", "--ray-address", cluster]
    assert main(["generate", *words]) == 0
    return folder / "out"


def trails_of(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found is not None
    trails: list[dict[str, Any]] = json.loads(found[1])["trails"]
    return trails


def test_the_page_shows_the_rows(output: Path) -> None:
    page = (output / "report.html").read_text()
    record = json.loads((output / "report.json").read_text())
    rows = pq.read_table([output / commit.file for commit, _ in read_commits(output) if commit]).to_pylist()
    good = {row["id"]: row for row in rows if row["status"] == "ok"}
    assert f"<span class=figure>{record['tau']:.2f}</span> tokens a round" in page
    assert "4 of 5 rows are good" in page and "malformed_json" in page
    trails = trails_of(page)
    assert [trail["title"] for trail in trails] == [f"lists · r{i}" for i in range(4)]
    for trail, row in zip(trails, (good[f"r{i}"] for i in range(4)), strict=True):
        assert len(trail["tokens"]) == row["num_output_tokens"]
        assert trail["said"] == row["prompt"]
        sources = Counter(SOURCES[token[1]] for token in trail["tokens"])
        assert {name: n for name, n in sources.items() if name != "target"} == dict(row["accepted_by_source"])
        assert trail["tokens"][-1][6] == row["rounds"]


def test_a_run_with_nothing_to_do_leaves_the_page(
    output: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (output / "report.html").read_text()
    words = ["--model", "smollm2-135m", "--prompts", str(output.parent / "prompts.jsonl"), "--output", str(output)]
    words += ["--max-new-tokens", "12", "--max-context", "128", "--quiet", "--ray-address", cluster]
    assert main(["generate", *words]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["resumed_shards"] > 0
    assert (output / "report.html").read_text() == before
    assert main(["verify", str(output)]) == 0


@pytest.mark.skipif(program() is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_opens_without_errors(output: Path, tmp_path: Path) -> None:
    with Browser(tmp_path) as browser:
        browser.open(output / "report.html", width=390, height=800)
        assert browser.messages == [] and browser.requests == []
        assert browser.run("document.querySelectorAll('.tok').length") == len(
            trails_of((output / "report.html").read_text())[0]["tokens"]
        )
        assert browser.run("document.documentElement.scrollWidth") <= 390
