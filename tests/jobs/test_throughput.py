"""`rasd throughput` on the real model: what is measured is kept, figures follow from it, a killed run goes on."""

import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from jobs.measured import JOURNAL, RESULTS, read_rows
from tests.jobs.throughput_run import METHODS, NUM_REQUESTS, REPEATS, SLOTS, TOKENS, words, write_questions

pytestmark = pytest.mark.timeout(600)  # the run that is shared takes minutes
ROOT = Path(__file__).parents[2]
ONE_SLOT = {"hf-prompt-lookup"}


@pytest.fixture(scope="module")
def rows(throughput_output: Path) -> list[dict[str, Any]]:
    return read_rows(throughput_output / RESULTS)


@pytest.fixture(scope="module")
def record(throughput_output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((throughput_output / "results.json").read_text())
    return found


def test_every_request_is_there_once_a_method_and_repeat(rows: list[dict[str, Any]]) -> None:
    keys = Counter((r["method"], r["slots"], r["repeat"], r["row"], r["turn"]) for r in rows)
    assert set(keys.values()) == {1}
    counts = Counter((r["method"], r["slots"]) for r in rows)
    expected = {(m, s): NUM_REQUESTS * REPEATS for m in METHODS for s in SLOTS if s == 1 or m not in ONE_SLOT}
    assert counts == expected
    assert {r["task"] for r in rows} == {"writing", "listing"}, "tasks keep their names"


def test_no_method_changes_the_text(rows: list[dict[str, Any]]) -> None:
    texts = defaultdict(set)
    for row in rows:
        texts[row["row"], row["turn"]].add(tuple(row["token_ids"]))
    assert len(texts) == NUM_REQUESTS
    assert all(len(found) == 1 for found in texts.values()), "fp32, greedy: the target's own, peers' too"
    second = [row for row in rows if row["turn"] == 1]
    first = {row["row"]: row for row in rows if row["turn"] == 0}
    assert all(row["num_prompt_tokens"] > first[row["row"]]["num_prompt_tokens"] + TOKENS / 2 for row in second)


def test_figures_equal_the_tables_statistics_recomputed(throughput_output: Path, record: dict[str, Any]) -> None:
    frame = pq.read_table(throughput_output / RESULTS).to_pandas()
    for slots in SLOTS:
        plain = None
        for method in METHODS:
            own = frame[(frame.slots == slots) & (frame.method == method)]
            if slots > 1 and method in ONE_SLOT:
                assert method not in record["slots"][str(slots)]
                continue
            found = record["slots"][str(slots)][method]["sets"]
            for task, part in [("all", own), *own.groupby("task")]:
                assert found[task]["tau"] == pytest.approx(
                    (part.num_output_tokens.sum() - len(part)) / part.rounds.sum(), abs=6e-4
                )
                assert found[task]["nodes"] == pytest.approx(part.drafted.sum() / part.rounds.sum(), abs=6e-3)
            by_source = Counter[str]()
            for pairs in own.accepted_by_source:
                by_source.update(dict(pairs))
            shares = {name: count / own.rounds.sum() for name, count in by_source.items()}
            assert found["all"]["accepted_by_source"] == pytest.approx(shares, abs=6e-5)
            runs = own.drop_duplicates(["sample", "repeat"])
            seconds = runs.groupby("sample").seconds.median()
            tokens = own[own.repeat == 0].num_output_tokens.sum()
            assert found["all"]["tokens_per_second"]["value"] == pytest.approx(tokens / seconds.sum(), abs=6e-3)
            plain = seconds.sum() if method == "plain" else plain
            if method != "plain":
                assert found["all"]["ratio"]["value"] == pytest.approx(plain / seconds.sum(), abs=6e-4)
                low, high = found["all"]["ratio"]["interval"]
                assert low <= found["all"]["ratio"]["value"] <= high
            phases = record["slots"][str(slots)][method]["phases"] or {}
            total = Counter[str]()
            for pairs in runs.phases:
                total.update(dict(pairs))
            expected = {name: 1000 * s / runs.run_rounds.sum() for name, s in total.items()}
            assert phases == pytest.approx(expected, abs=6e-5)


def test_the_report_shows_these_figures(throughput_output: Path, record: dict[str, Any]) -> None:
    page = (throughput_output / "report.html").read_text()
    first = record["slots"]["1"]["rasd"]["sets"]["all"]
    assert f"<span class=figure>{first['ratio']['value']:.2f}" in page
    assert "95% interval {:.2f} to {:.2f}".format(*first["ratio"]["interval"]) in page
    for slots, methods in record["slots"].items():
        section = page.split(f'<section id="speed-{slots}"')[1].split("</section>")[0]
        cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in re.findall(r"<tr>(.*?)</tr>", section)]
        shown = {(line[0], line[1]): line[2:] for line in cells[1:]}
        assert len(shown) == sum(len(own["sets"]) for own in methods.values())
        for method, own in methods.items():
            for task, figures in own["sets"].items():
                speed, ratio = figures["tokens_per_second"], figures["ratio"]
                line = shown[task, method]
                assert line[0] == ("\u2013" if speed is None else f"{speed['value']:.2f}")
                assert line[1] == ("\u2013" if ratio is None else f"{ratio['value']:.3f}")
                assert line[3:] == [f"{figures['tau']:.3f}", f"{figures['nodes']:.2f}"]
    assert (throughput_output / "speedup.png").read_bytes().startswith(b"\x89PNG")


def test_trails_are_the_outputs(rows: list[dict[str, Any]]) -> None:
    trails = [row for row in rows if row["trail"]]
    assert {row["method"] for row in trails} == {"plain", "context", "draft", "rasd"}
    assert {(row["repeat"], row["slots"]) for row in trails} == {(0, 1)}
    assert len({row["row"] for row in trails}) == 2 and {row["turn"] for row in trails} == {0, 1}
    for row in trails:
        assert [token["token_id"] for token in row["trail"]] == row["token_ids"]
        sources = Counter(token["source"] for token in row["trail"])
        assert sources.total() - sources["target"] == row["accepted"]


def test_a_killed_run_goes_on(tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    questions, output = write_questions(tmp_path / "question.jsonl"), tmp_path / "out"
    fewer = ("--slots", "1", "--max-new-tokens", "6", "--methods")
    arguments = words(questions, output, cluster, *fewer, "plain,context")
    with subprocess.Popen([sys.executable, "-m", "jobs.cli", *arguments], cwd=ROOT) as process:
        deadline = time.monotonic() + 250
        journal = output / JOURNAL
        while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    kept = journal.read_bytes()
    journal.write_bytes(kept + kept.splitlines()[0][:200])  # as a crash while writing leaves it
    assert main(words(questions, output, cluster, *fewer, "plain,draft")) == 2
    assert 'methods: ["plain", "context"] -> ["plain", "draft"]' in capsys.readouterr().err
    assert main(arguments) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["resumed_samples"] >= 2 and record["state"] == "done"
    assert journal.read_bytes().startswith(kept)
    keys = Counter((r["method"], r["slots"], r["repeat"], r["row"], r["turn"]) for r in read_rows(output / RESULTS))
    assert len(keys) == 2 * REPEATS * NUM_REQUESTS and set(keys.values()) == {1}
    assert main(arguments) == 0, "all is measured: only the report is written again"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["resumed_samples"] == 3 * REPEATS


def test_a_whole_model_drafts_for_us_and_for_assisted_generation(tmp_path: Path, cluster: str) -> None:
    """Here the target itself, so that nearly all it drafts is right."""
    questions, output = write_questions(tmp_path / "question.jsonl"), tmp_path / "out"
    fewer = ("--slots", "1", "--repeats", "1", "--tasks", "listing", "--draft", "smollm2-135m", "--methods")
    assert main(words(questions, output, cluster, *fewer, "plain,draft:5,hf-assisted")) == 0
    rows = {row["method"]: row for row in read_rows(output / RESULTS)}
    assert rows.keys() == {"plain", "draft:5", "hf-assisted"}
    assert rows["plain"]["token_ids"] == rows["draft:5"]["token_ids"] == rows["hf-assisted"]["token_ids"]
    assert rows["plain"]["rounds"] == len(rows["plain"]["token_ids"]) - 1
    for name in ("draft:5", "hf-assisted"):
        assert 0 < rows[name]["rounds"] <= rows["plain"]["rounds"] / 2
        assert rows[name]["rounds"] + rows[name]["accepted"] == rows["plain"]["rounds"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--methods", "plain,rsad"), "'rsad'"),
        (("--methods", "draft:many"), "'draft:many'; behind the colon"),
        (("--methods", "hf-beam"), "'hf-beam'; peers are hf-generate"),
        (("--methods", "hf-assisted"), "hf-assisted drafts with a whole model"),
        (("--methods", "corpus"), "which needs --datastore"),
        (("--slots", "1,0"), "--slots is 0; it must be whole numbers"),
        (("--quick", "--full"), "choose one"),
        (("--tasks", "cooking"), "--tasks names 'cooking'"),
    ],
)
def test_mistakes_are_told_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    questions = write_questions(tmp_path / "question.jsonl")
    assert main(words(questions, tmp_path / "out", "nowhere:1", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_long_a_question_is_named(tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    questions = tmp_path / "question.jsonl"
    questions.write_text(json.dumps({"id": "long", "task": "t", "prompt": "word " * 9000}) + "\n")
    assert main(words(questions, tmp_path / "out", cluster)) == 2
    assert "question 'long' of t and its answers need up to" in capsys.readouterr().err


@pytest.mark.parametrize("name", METHODS)
def test_seconds_are_positive_and_shared_by_a_sample(rows: list[dict[str, Any]], name: str) -> None:
    runs = defaultdict(set)
    for row in rows:
        if row["method"] == name:
            runs[row["slots"], row["repeat"], row["sample"]].add(row["seconds"])
    assert all(len(found) == 1 and found.pop() > 0 for found in runs.values())
    assert statistics.median(Counter(slots for slots, _, _ in runs).values()) > 0
