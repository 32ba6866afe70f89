"""Damage and death: what is broken is refused or found, and a build that was killed at any moment can be finished."""

import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from datastore import Datastore
from jobs.cli import main
from pipeline.errors import DatastoreError, InputError, JobError
from pipeline.models import load_tokenizer, resolve_model, tokenizer_hash
from tests.jobs.stores import content_of, run_build, tiny_model, write_rows

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {i} of the quick brown fox" for i in range(8)]
SEGMENT_FILES = ["tokens", "places", "buckets", "samples", "documents", "names", "digests", "passages", "vectors"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A datastore with passages."""
    directory = tmp_path_factory.mktemp("whole")
    run_build(model, directory / "s", write_rows(directory / "r.jsonl", TEXTS), dense="on", segment_tokens=60)
    return directory / "s"


@pytest.fixture
def store(tmp_path: Path, whole: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "s"))


def verify(store: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    code = main(["datastore", "verify", str(store)])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["state"] == ("damaged" if code else "intact")
    return code, record["problems"]


def segment_file(store: Path, name: str) -> Path:
    (path, *_) = sorted((store / "segments").glob(f"*/{name}"))
    return path


def test_what_is_whole_is_found_whole(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(store, capsys) == (0, [])
    written = {path.name for path in (store / "segments").glob("*/*")}
    assert written == {*(f"{name}.bin" for name in SEGMENT_FILES), "dense.faiss", "segment.json"}


@pytest.mark.parametrize("name", [*(f"{name}.bin" for name in SEGMENT_FILES), "dense.faiss", "segment.json"])
def test_a_flipped_bit_in_any_file_of_a_segment_is_found(
    store: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = segment_file(store, name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    code, problems = verify(store, capsys)
    assert code == 1
    assert len(problems) == 1 and str(path if name != "segment.json" else path.parent) in problems[0]


def test_a_changed_manifest_is_found(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store / "manifest.json"
    text = path.read_text()
    sha256 = json.loads(text)["segments"][0]["files"]["tokens.bin"]["sha256"]
    path.write_text(text.replace(sha256, "0" * 64))
    assert main(["datastore", "verify", str(store)]) == 2
    assert "manifest.json is damaged: its content has the fingerprint" in capsys.readouterr().err
    path.write_text(text[:-9])
    assert main(["datastore", "verify", str(store)]) == 2
    assert "manifest.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*(f"{name}.bin" for name in SEGMENT_FILES), "dense.faiss"])
def test_a_store_with_a_truncated_or_missing_file_is_not_opened(
    store: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = segment_file(store, name)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(DatastoreError, match=rf"{path} has {size - 1:,} bytes, the manifest says {size:,}"):
        Datastore.open(store)
    path.unlink()
    with pytest.raises(DatastoreError, match=rf"{path} is missing"):
        Datastore.open(store)
    code, problems = verify(store, capsys)
    assert (code, problems) == (1, [f"{path} is missing"])


def test_a_damaged_segment_is_made_again_by_the_command_that_built_it(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "r.jsonl", TEXTS)
    run_build(model, tmp_path / "s", rows, segment_tokens=40)
    before = content_of(tmp_path / "s")
    segment_file(tmp_path / "s", "places.bin").unlink()
    run_build(model, tmp_path / "s", rows, segment_tokens=40)
    assert content_of(tmp_path / "s") == before
    assert verify(tmp_path / "s", capsys) == (0, [])


def test_a_store_of_another_tokenizer_is_not_opened(store: Path, tmp_path: Path) -> None:
    other = tokenizer_hash(load_tokenizer(resolve_model(str(tiny_model(tmp_path / "m", merges=10)))))
    ours = json.loads((store / "manifest.json").read_text())["tokenizer"]
    with pytest.raises(DatastoreError, match=f"was built with tokenizer {ours[:16]}, the model has {other[:16]}"):
        Datastore.open(store, tokenizer=other)


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file may grow beyond `most` bytes, which fails writes as a full disk does.

    Not a fixture: pytest reports a test while its fixtures stand, and its own output may be a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# What does not fit is the manifest; the buckets, of which numpy's tofile lost the end and said nothing; the record; the
# places; the tokens; build.json; the lease. With passages, the FAISS index and the vectors.
@pytest.mark.parametrize(
    ("dense", "most"), [("off", most) for most in (1248, 1000, 800, 500, 350, 300, 8)] + [("on", 7000), ("on", 5000)]
)
def test_a_full_disk_is_an_error_and_the_same_command_goes_on(
    tmp_path: Path, model: Path, dense: str, most: int
) -> None:
    rows = write_rows(tmp_path / "r.jsonl", TEXTS)
    run_build(model, tmp_path / "undisturbed", rows, dense=dense)
    store = tmp_path / "s"
    store.mkdir()
    with (
        pytest.raises((DatastoreError, JobError), match=r"File too large|requested") as raised,
        full_disk(most),
    ):
        run_build(model, store, rows, dense=dense)
    assert str(store) in str(raised.value)
    with pytest.raises(DatastoreError, match="is no datastore"):
        Datastore.open(store)
    run_build(model, store, rows, dense=dense)
    assert content_of(store) == content_of(tmp_path / "undisturbed")


def test_a_corpus_cut_short_stops_the_build_and_once_mended_is_finished(tmp_path: Path, model: Path) -> None:
    """More than a block of it is good, so that segments are made before the end is missed."""
    rows = write_rows(tmp_path / "r.jsonl", [f"{text} {i}, " * 20 for i in range(300) for text in TEXTS])
    packed = tmp_path / "r.jsonl.gz"
    content = gzip.compress(rows.read_bytes())
    packed.write_bytes(content)
    run_build(model, tmp_path / "undisturbed", packed, segment_tokens=100_000)
    packed.write_bytes(content[:-9])
    with pytest.raises(InputError, match=r"cannot read .*r\.jsonl\.gz: Truncated"):
        run_build(model, tmp_path / "s", packed, segment_tokens=100_000)
    assert list((tmp_path / "s" / "segments").iterdir())
    assert not (tmp_path / "s" / "manifest.json").exists()
    packed.write_bytes(content)
    run_build(model, tmp_path / "s", packed, segment_tokens=100_000)
    assert content_of(tmp_path / "s") == content_of(tmp_path / "undisturbed")


@pytest.mark.chaos
@pytest.mark.parametrize("command", ["build", "append"])
def test_a_kill_before_any_step_costs_nothing_but_time(tmp_path: Path, model: Path, command: str) -> None:
    old, more = write_rows(tmp_path / "r.jsonl", TEXTS[:5]), write_rows(tmp_path / "m.jsonl", TEXTS)
    words = [command, str(model), str(tmp_path / "stores"), str(old), *([str(more)] if command == "append" else [])]
    (tmp_path / "stores").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.jobs.crashing_build", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (_, most), *crashes, last = map(json.loads, done.stdout.splitlines())
    undisturbed = content_of(tmp_path / "stores" / "0")
    for step, _ in (*crashes, last):
        assert content_of(tmp_path / "stores" / str(step)) == undisturbed, f"after a kill before step {step}"
    # Each state was met: none of the new segments, some of them, all of them without a manifest that names them.
    seen = [segments for _, segments in crashes]
    assert seen == sorted(seen) and set(seen) == set(range(seen[0], most + 1))
    assert (seen[0], most) == {"build": (0, 2), "append": (2, 3)}[command]
    assert len(crashes) > 30


def start(model: Path, rows: Path, store: Path, cluster: str) -> "subprocess.Popen[str]":
    words = ["--model", str(model), "--corpus", str(rows), "--output", str(store), "--dense", "off", "--quiet"]
    command = [sys.executable, "-m", "jobs.build_datastore", *words, "--segment-tokens", "200"]
    command += ["--ray-address", cluster, "--num-threads", "1"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: "subprocess.Popen[str]", store: Path, pattern: str) -> None:
    deadline = time.monotonic() + 120
    while not list(store.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.chaos
def test_a_build_on_ray_survives_sigkill_and_sigterm(
    tmp_path: Path, model: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "r.jsonl", [f"{text} {i}" for i in range(100) for text in TEXTS])
    run_build(model, tmp_path / "undisturbed", rows, segment_tokens=200)
    store = tmp_path / "s"

    killed = start(model, rows, store, cluster)
    wait_for(killed, store, "_tmp/*/*/tokens.bin")
    killed.kill()
    killed.communicate()
    assert not (store / "manifest.json").exists()

    stopped = start(model, rows, store, cluster)
    wait_for(stopped, store, "segments/*2-*")
    stopped.send_signal(signal.SIGTERM)
    stdout, stderr = stopped.communicate(timeout=60)
    assert stopped.returncode == 143, stderr
    assert json.loads(stdout.splitlines()[-1])["state"] == "stopped"
    assert not (store / "manifest.json").exists() and not (store / "_lease").exists()

    capsys.readouterr()
    run_build(model, store, rows, segment_tokens=200)  # whoever makes the rest
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["state"] == "done" and 0 < record["kept_segments"] < record["segments"]
    assert content_of(store) == content_of(tmp_path / "undisturbed")
