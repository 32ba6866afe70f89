"""`rasd datastore`: what its commands print, and that every mistake is one clear line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from datastore import Datastore
from jobs.cli import main
from jobs.config import GenerateConfig
from jobs.plan import ModelFacts
from jobs.retrieval import provided_sources
from pipeline.errors import ConfigError
from pipeline.models import load_tokenizer, resolve_model
from tests.jobs.stores import content_of, run_build, tiny_model, write_rows

ROOT = Path(__file__).parents[2]
TEXTS = ["the quick brown fox jumps", "the quick brown dog sleeps", "the quick fox"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Two segments without passages."""
    directory = tmp_path_factory.mktemp("store")
    run_build(model, directory / "s", write_rows(directory / "r.jsonl", TEXTS), segment_tokens=13)
    return directory / "s"


def last_line(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["datastore", *words]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("rasd: error: ")]
    assert captured.out == "" and "Traceback" not in captured.err
    return line


def test_build_append_and_merge_run_on_a_cluster(
    tmp_path: Path, model: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, more = write_rows(tmp_path / "r.jsonl", TEXTS), write_rows(tmp_path / "m.jsonl", [*TEXTS, "a new one"])
    common = ["--ray-address", cluster, "--num-threads", "1"]
    corpus = ["--model", str(model), "--output", str(tmp_path / "s"), *common]
    build = ["datastore", "build", "--corpus", str(rows), "--dense", "off", "--segment-tokens", "13", *corpus]
    assert main(build) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["state", "done"]
    assert json.loads(lines[-1])["segments"] == 2
    run_build(model, tmp_path / "inline", rows, segment_tokens=13)
    assert content_of(tmp_path / "s") == content_of(tmp_path / "inline")

    assert main(["datastore", "append", "--corpus", str(more), *corpus]) == 0
    assert last_line(capsys)["documents"] == 4
    merge = ["datastore", "merge", str(tmp_path / "s"), str(tmp_path / "inline"), "--output", str(tmp_path / "m")]
    assert main([*merge, *common]) == 0
    record = last_line(capsys)
    assert (record["documents"], record["duplicates"], record["segments"]) == (4, 3, 1)
    assert main(["datastore", "verify", str(tmp_path / "m")]) == 0


def test_inspect_shows_what_there_is(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["datastore", "inspect", str(store)]) == 0
    text = capsys.readouterr().out
    record = json.loads(text.splitlines()[-1])
    manifest = Datastore.open(store).manifest
    assert (record["fingerprint"], record["tokens"]) == (manifest.fingerprint, manifest.tokens)
    assert (record["documents"], record["segments"], record["dense"]) == (3, 2, None)
    assert all(segment.name in text for segment in manifest.segments)
    assert "310 tokens, 2 bytes each" in text


def test_query_prints_the_lookup(store: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = Datastore.open(store)
    document = opened.segments[0].segment.document(0).tolist()
    words = [",".join(map(str, document[:3])), "309", str(document[0])]
    assert main(["datastore", "query", str(store), "--json", "--tokens", *words]) == 0
    found = last_line(capsys)
    lookup = opened.lookup([document[:3], [309], document[:1]])
    assert found == {name: getattr(lookup, name).tolist() for name in found}
    assert set(found) == {"match_lengths", "offsets", "tokens", "parents", "counts"}
    assert found["match_lengths"] == [3, 0, 1]

    assert main(["datastore", "query", str(store), "--tokens", words[0]]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "context 0: the longest match has 3 tokens"
    assert sorted(printed_paths(lines)) == sorted(paths_of(found, 0))

    assert main(["datastore", "query", str(store), "--tokens", words[0], "--model", str(model)]) == 0
    shown = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()[1:]]
    tokenizer = load_tokenizer(resolve_model(str(model)))
    assert shown == [repr(tokenizer.decode([path[-1]])) for path, _ in printed_paths(lines)]


def printed_paths(lines: list[str]) -> list[tuple[tuple[int, ...], int]]:
    """Tokens from the root, and count, of each node of a printed tree: a child stands two columns further in."""
    found: list[tuple[tuple[int, ...], int]] = []
    path: tuple[int, ...] = ()
    for line in lines:
        count, token = line.split()
        depth = (len(line) - len(token) - 10) // 2
        path = (*path[:depth], int(token))
        found.append((path, int(count)))
    return found


def paths_of(lookup: dict[str, list[int]], context: int) -> list[tuple[tuple[int, ...], int]]:
    """The same from the fields of a lookup."""
    begin, end = lookup["offsets"][context : context + 2]
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(lookup["tokens"][begin:end], lookup["parents"][begin:end], strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return list(zip(paths, lookup["counts"][begin:end], strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("buld", "unknown command datastore 'buld'; did you mean build?"),
        ("query {store} --tokens 1,x", "'1,x' is no list of token ids such as 1,2,3"),
        ("query {store} --tokens -3", "'-3' is no list of token ids such as 1,2,3"),
        ("query {store}", "one of the arguments --tokens --text is required"),
        ("query {store} --text x --k 0", "'0' is no number of at least 1"),
        ("query {store} --text x", "{store} has no passages (it was built with --dense off)"),
        ("query {store} --tokens 1 --model {other}", "was built with tokenizer"),
        ("inspect {tmp}", "manifest.json does not exist"),
        ("verify {tmp}", "manifest.json does not exist"),
        ("inspect", "the following arguments are required: DIR"),
        ("merge {store} --output {store}", "one of the datastores to merge"),
        ("merge {store} {tmp} --output {tmp}/m", "manifest.json does not exist"),
        ("build --model m --output o", "--corpus is missing; it must be at least one file"),
        ("build --corpus c --model m --output o --dense maybe", "--dense is 'maybe'; it must be on or off"),
        ("build --corpus c --model m --output o --overlap 128", "--overlap is 128; it must be a whole number of at"),
        (
            "build --corpus c --model m --output o --segment-tokens 1G",
            "--segment-tokens is 1000000000; it must",
        ),
        ("build --corpus c --model m --output o --segment-token 1", "did you mean --segment-tokens?"),
        ("build --corpus {tmp}/c.jsonl --model {model} --output {tmp}/o", "c.jsonl does not exist"),
        ("build --corpus {tmp}/r.jsonl --model {tmp}/none --output {tmp}/o", "none"),
        ("append --corpus {tmp}/r.jsonl --model {model} --output {tmp}/o", "is no datastore"),
    ],
)
def test_every_mistake_is_one_line(
    tmp_path: Path, model: Path, store: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    write_rows(tmp_path / "r.jsonl", TEXTS)
    other = tiny_model(tmp_path / "other", merges=10)
    names = {"tmp": tmp_path, "model": model, "store": store, "other": other}
    assert message.format(**names) in error_of(capsys, *words.format(**names).split())
    assert not (tmp_path / "o").exists()


def test_yaml_may_hold_the_options(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bare `off` is false to YAML."""
    rows, store = write_rows(tmp_path / "r.jsonl", TEXTS), tmp_path / "s"
    run_build(model, store, rows)
    (tmp_path / "c.yaml").write_text(f"corpus: {rows}\nmodel: {model}\noutput: {store}\ndense: off\nquiet: true\n")
    assert main(["datastore", "build", "--config", str(tmp_path / "c.yaml")]) == 0
    assert last_line(capsys)["state"] == "complete"


@pytest.mark.parametrize("command", [[], ["build"], ["append"], ["merge"], ["inspect"], ["verify"], ["query"]])
def test_help_is_there_and_instant(command: list[str]) -> None:
    code = (
        "import sys; from jobs.cli import main\n"
        f"try: main(['datastore', *{command!r}, '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: rasd datastore")


def test_a_datastore_on_an_object_store_is_refused_with_what_to_do(
    tmp_path: Path, model: Path, store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was built in a directory `s3:` of the working directory."""
    monkeypatch.chdir(tmp_path)
    corpus = ["--corpus", str(write_rows(tmp_path / "r.jsonl", TEXTS)), "--model", str(model)]
    for command in (["build", *corpus], ["append", *corpus], ["merge", str(store), str(store)]):
        error = error_of(capsys, *command, "--output", "s3://bucket/store")
        assert "--output is 's3://bucket/store'; a datastore is files that are mapped into memory. Build it in" in error
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]
    config = GenerateConfig(model=str(model), prompts=("p",), output="o", datastore="s3://bucket/store")
    with pytest.raises(ConfigError, match=r"--datastore is 's3://bucket/store'.* Copy it to a directory"):
        provided_sources(config, ModelFacts("m", None, "weights", "tokenizer", None))
