"""Appending and merging: what is there stays, what is new comes once, and one store answers as several together."""

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from datastore import Datastore
from datastore.embed_files import DEFAULT_EMBEDDER
from datastore.format import read_manifest
from jobs.corpus.document import token_document
from jobs.segments.documents import DIGESTS
from pipeline.errors import ConfigError, DatastoreError
from pipeline.models import load_tokenizer, resolve_model
from tests.jobs.stores import (
    content_of,
    documents_of,
    encoded,
    outcome,
    run_append,
    run_build,
    run_merge,
    tiny_model,
    write_rows,
)

TEXTS = [f"the quick brown fox {i} jumps\nover the lazy dog, ünï {i * i}" for i in range(30)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve_model(str(model)))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", TEXTS)


def test_append_adds_what_is_new_and_then_nothing(
    tmp_path: Path,
    model: Path,
    rows: Path,
    tokenizer: PreTrainedTokenizerBase,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "s"
    run_build(model, store, rows, segment_tokens=100)
    old = read_manifest(store).segments
    more = write_rows(tmp_path / "more.jsonl", [*TEXTS[:5], "new one", "new two", "new one"])
    capsys.readouterr()
    run_append(model, store, more)
    record = outcome(capsys)
    assert (record["state"], record["duplicates"], record["documents"]) == ("done", 6, 32)
    assert read_manifest(store).segments[: len(old)] == old
    new = [(f"d{i}", ids) for i, (_, ids) in enumerate(encoded(tokenizer, ["new one", "new two"]), 5)]
    assert documents_of(store) == encoded(tokenizer, TEXTS) + new
    before = content_of(store)
    run_append(model, store, more)
    assert outcome(capsys)["state"] == "complete"
    assert run_build(model, store, rows, segment_tokens=100) == 0
    assert outcome(capsys)["state"] == "complete"
    assert content_of(store) == before


def test_append_knows_documents_of_segments_without_digests_by_their_tokens(
    tmp_path: Path, model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a frozen live segment, which has no texts."""
    from jobs.segments import documents

    store = tmp_path / "s"
    run_build(model, store, rows)
    (stored,) = Datastore.open(store).segments
    monkeypatch.setattr(documents, "DIGESTS", "none.bin")
    digests = documents.stored_digests(store, stored)
    assert digests[3].tobytes() == token_document("", stored.segment.document(3).astype(np.int64)).digest
    assert len({row.tobytes() for row in digests}) == 30


def test_append_refuses_another_tokenizer_and_a_store_that_is_not_there(
    tmp_path: Path, model: Path, rows: Path
) -> None:
    run_build(model, tmp_path / "s", rows)
    other = tiny_model(tmp_path / "m", merges=10)
    with pytest.raises(DatastoreError, match=r"was built with tokenizer [0-9a-f]{64} and .* has [0-9a-f]{64} and 310"):
        run_append(other, tmp_path / "s", rows)
    with pytest.raises(DatastoreError, match=r"does not exist, so .* is no datastore"):
        run_append(model, tmp_path / "none", rows)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("segment_tokens", [1, 300, 100_000])
def test_merging_keeps_every_document_once(
    tmp_path: Path, model: Path, tokenizer: PreTrainedTokenizerBase, segment_tokens: int
) -> None:
    texts = [f"{text} {'x' * i}" for i, text in enumerate(TEXTS)]
    run_build(model, tmp_path / "a", write_rows(tmp_path / "a.jsonl", texts[:20]), segment_tokens=50)
    run_build(model, tmp_path / "b", write_rows(tmp_path / "b.jsonl", texts[10:]), segment_tokens=200)
    assert run_merge(tmp_path / "ab", tmp_path / "a", tmp_path / "b", segment_tokens=segment_tokens) == 0
    names = [f"d{i}" for i in (*range(20), *range(10, 20))]
    found = documents_of(tmp_path / "ab")
    assert found == [(name, ids) for name, (_, ids) in zip(names, encoded(tokenizer, texts), strict=True)]
    segments = read_manifest(tmp_path / "ab").segments
    assert all(segment.tokens <= segment_tokens or segment.documents == 1 for segment in segments)
    assert all(DIGESTS in segment.files for segment in segments)
    # Full: no segment could have taken in the next one's first document.
    lengths = iter([len(ids) for _, ids in found])
    first = [next(lengths) for segment in segments for _ in range(segment.documents)]
    begins = np.cumsum([0, *(segment.documents for segment in segments)])[1:-1].tolist()
    assert all(segments[i].tokens + first[begin] > segment_tokens for i, begin in enumerate(begins))


def test_a_merged_store_answers_as_its_inputs_together(tmp_path: Path, model: Path) -> None:
    run_build(model, tmp_path / "a", write_rows(tmp_path / "a.jsonl", TEXTS[:15]), segment_tokens=50)
    run_build(model, tmp_path / "all", write_rows(tmp_path / "all.jsonl", TEXTS), segment_tokens=50)
    run_merge(tmp_path / "m", tmp_path / "a", tmp_path / "all")
    merged, whole = Datastore.open(tmp_path / "m"), Datastore.open(tmp_path / "all")
    contexts = [ids[: 1 + i % 20] for i, (_, ids) in enumerate(documents_of(tmp_path / "all"))]
    ours, theirs = merged.lookup(contexts, max_samples=10_000), whole.lookup(contexts, max_samples=10_000)
    assert ours.match_lengths.tolist() == theirs.match_lengths.tolist()
    assert sorted(ours.counts.tolist()) == sorted(theirs.counts.tolist())


def test_merging_resumes_and_refuses_what_does_not_fit(
    tmp_path: Path, model: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_build(model, tmp_path / "a", rows, segment_tokens=100)
    other = tiny_model(tmp_path / "m", merges=10)
    run_build(other, tmp_path / "b", rows)
    with pytest.raises(DatastoreError, match=r"b has the tokenizer [0-9a-f]{64}, .*a has [0-9a-f]{64}"):
        run_merge(tmp_path / "ab", tmp_path / "a", tmp_path / "b")
    with pytest.raises(ConfigError, match="one of the datastores to merge"):
        run_merge(tmp_path / "a", tmp_path / "a", tmp_path / "b")
    run_merge(tmp_path / "aa", tmp_path / "a", tmp_path / "a")
    before = content_of(tmp_path / "aa")
    capsys.readouterr()
    run_merge(tmp_path / "aa", tmp_path / "a", tmp_path / "a")
    record = outcome(capsys)
    assert (record["state"], record["documents"], record["duplicates"]) == ("complete", 30, 30)
    assert content_of(tmp_path / "aa") == before


def test_passages_are_embedded_and_survive_appending_and_merging(tmp_path: Path, model: Path) -> None:
    texts = [f"Document {i} about {subject}. " * 12 for i, subject in enumerate(["bread", "chess", "copper", "rain"])]
    dense = {"dense": "on", "passage_tokens": 64, "overlap": 16, "segment_tokens": 250}
    run_build(model, tmp_path / "a", write_rows(tmp_path / "a.jsonl", texts[:3]), **dense)
    run_append(model, tmp_path / "a", write_rows(tmp_path / "b.jsonl", texts))
    run_merge(tmp_path / "m", tmp_path / "a")
    appended, merged = Datastore.open(tmp_path / "a"), Datastore.open(tmp_path / "m")
    assert len(appended.segments) > len(merged.segments) == 1
    spec = merged.manifest.dense
    assert spec is not None and (spec.embedder, spec.passage_tokens, spec.overlap) == (DEFAULT_EMBEDDER, 64, 16)
    for store in (appended, merged):
        (passages,) = store.search(["Who plays chess?"], 3)
        tokenizer = load_tokenizer(resolve_model(str(model)))
        assert "chess" in tokenizer.decode(passages[0].tokens.tolist())
        assert passages[0].document == "d1" and passages[0].end - passages[0].begin == 64
    ours, theirs = (store.search(texts, 100) for store in (appended, merged))
    for left, right in zip(ours, theirs, strict=True):
        assert {(p.document, p.begin, p.end) for p in left} == {(p.document, p.begin, p.end) for p in right}
        assert [p.score for p in left] == pytest.approx([p.score for p in right], abs=1e-6)
