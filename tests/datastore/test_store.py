"""A datastore on disk: what is written is what is read, and what does not fit is refused with the reason."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datastore import Datastore
from datastore.format import (
    FORMAT,
    Manifest,
    check_digests,
    read_manifest,
    read_record,
    token_dtype,
    write_manifest,
)
from datastore.segment import open_segment, write_segment
from pipeline.errors import DatastoreError
from tests.datastore.naive import arrays_of, counts_of, naive_lookup

VOCABULARY = 100
TOKENIZER = "a" * 64
DOCUMENTS = [
    [[1, 2, 3, 4, 5, 1, 2, 3, 6], [], [7, 8], [9]],
    [[1, 2, 3, 4, 7, 8, 1, 2, 3, 4], [2, 3, 4, 5]],
]
NAMES = [["first", "", "größe", "x/y"], ["second", "third"]]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two segments without passages."""
    records = [
        write_segment(
            tmp_path / "segments" / f"{i:06d}",
            *arrays_of(documents),
            names,
            vocab_size=VOCABULARY,
            num_threads=2,
        )
        for i, (documents, names) in enumerate(zip(DOCUMENTS, NAMES, strict=True))
    ]
    write_manifest(tmp_path, Manifest(TOKENIZER, VOCABULARY, None, tuple(records)))
    return tmp_path


def test_what_is_written_is_found(store: Path) -> None:
    opened = Datastore.open(store, tokenizer=TOKENIZER)
    contexts = [[1, 2, 3], [9, 1, 2, 3, 4], [7, 8], [9], [50]]
    found = opened.lookup(contexts, max_depth=5, max_samples=100, max_nodes=1000)
    for b, context in enumerate(contexts):
        length, counts = naive_lookup(DOCUMENTS, context, opened.depth, 5, 100)
        assert (found.match_lengths[b], counts_of(found, b)) == (length, counts)
    assert opened.manifest.tokens == 26
    assert [list(segment.names) for segment in opened.segments] == NAMES
    for segment, documents in zip(opened.segments, DOCUMENTS, strict=True):
        assert [segment.segment.document(d).tolist() for d in range(len(documents))] == documents


def test_the_same_documents_give_the_same_files(store: Path, tmp_path: Path) -> None:
    again = write_segment(
        tmp_path / "again" / "000000", *arrays_of(DOCUMENTS[0]), NAMES[0], vocab_size=VOCABULARY, num_threads=1
    )
    assert again == read_record(store / "segments" / "000000")


def test_bytes_a_token(tmp_path: Path) -> None:
    """2 of the token and 4 of its place, and next to nothing else: documents of 400 tokens, vocabulary of 49,152."""
    tokens = np.random.default_rng(0).integers(0, 49_152, 2_000_000)
    offsets = np.arange(0, 2_000_001, 400)
    names = [f"document-{i}" for i in range(5000)]
    record = write_segment(tmp_path / "s", tokens, offsets, names, vocab_size=49_152, num_threads=2)
    assert record.bytes / record.tokens < 6.5


def rewrite(store: Path, vocab_size: int) -> None:
    """A manifest that is whole but does not fit the files."""
    write_manifest(store, replace(read_manifest(store), vocab_size=vocab_size))


def edit_manifest(store: Path, change: Callable[[dict[str, object]], None]) -> None:
    path = store / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def truncate(store: Path, name: str) -> None:
    path = store / "segments" / "000001" / name
    path.write_bytes(path.read_bytes()[:-1])


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda s: (s / "manifest.json").unlink(), "is no datastore"),
    "no JSON": (lambda s: (s / "manifest.json").write_text("{"), "cannot be read"),
    "a list": (lambda s: (s / "manifest.json").write_text("[]"), "no JSON object"),
    "other format": (lambda s: edit_manifest(s, lambda m: m.update(format=99)), f"format 99; .* reads format {FORMAT}"),
    "field lost": (lambda s: edit_manifest(s, lambda m: m.pop("segments")), "damaged .*segments"),
    "other vocabulary": (lambda s: rewrite(s, 101), "buckets.bin does not fit"),
    "wider tokens": (lambda s: rewrite(s, 70_000), "does not fit"),
    "segment gone": (lambda s: shutil.rmtree(s / "segments" / "000001"), "is missing, the manifest says"),
    **{
        name: (lambda s, name=name: truncate(s, name), rf"{name} has [\d,]+ bytes, the manifest says [\d,]+")
        for name in ("tokens.bin", "places.bin", "buckets.bin", "samples.bin", "documents.bin", "names.bin")
    },
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_and_named(store: Path, case: str) -> None:
    damage, message = REFUSALS[case]
    damage(store)
    with pytest.raises(DatastoreError, match=message):
        Datastore.open(store, tokenizer=TOKENIZER)


def test_another_tokenizer_is_refused_with_both_hashes(store: Path) -> None:
    with pytest.raises(DatastoreError, match=f"{TOKENIZER[:16]}, the model has {'b' * 16}"):
        Datastore.open(store, tokenizer="b" * 64)


def test_every_flipped_byte_changes_a_digest(store: Path) -> None:
    manifest = Datastore.open(store).manifest
    assert check_digests(store, manifest.segments) == []
    for segment in manifest.segments:
        for name, file in segment.files.items():
            path = store / "segments" / segment.name / name
            whole = path.read_bytes()
            for at in {0, file.bytes // 2, file.bytes - 1}:
                path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
                (problem,) = check_digests(store, manifest.segments)
                assert str(path) in problem
            path.write_bytes(whole)


@pytest.mark.parametrize("name", ["tokens.bin", "places.bin", "buckets.bin", "samples.bin"])
def test_a_damaged_index_is_refused_or_stays_within_its_bounds(store: Path, name: str) -> None:
    """Compiled lookups check no bounds: what could lead them outside must not open."""
    path = store / "segments" / "000001" / name
    whole = path.read_bytes()
    refused = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :])
        try:
            opened = Datastore.open(store, tokenizer=TOKENIZER)
        except DatastoreError as error:
            assert "index of segment 000001 is damaged" in str(error) or "does not fit" in str(error)
            refused += 1
            continue
        found = opened.lookup([[1, 2, 3], [2, 3, 4], [7]], max_depth=5)
        assert bool((found.match_lengths <= 3).all())
    assert refused > 0 or name in {"samples.bin", "tokens.bin"}
    path.write_bytes(whole)


def test_a_manifest_whose_content_was_changed_is_refused(store: Path) -> None:
    path = store / "manifest.json"
    path.write_text(path.read_text().replace('"tokens": 14', '"tokens": 15'))
    with pytest.raises(DatastoreError, match="damaged: its content has the fingerprint"):
        Datastore.open(store, tokenizer=TOKENIZER)


def test_search_without_passages_says_how_to_get_them(store: Path) -> None:
    with pytest.raises(DatastoreError, match="--dense on"):
        Datastore.open(store).search(["x"], 1)


def test_one_name_a_document(tmp_path: Path) -> None:
    with pytest.raises(DatastoreError, match="1 names were given for 2 documents"):
        write_segment(tmp_path / "s", *arrays_of([[1], [2]]), ["a"], vocab_size=10, num_threads=1)


def test_spans_of_passages_survive_the_separators(tmp_path: Path) -> None:
    """Written relative to the documents' tokens alone, read in the array with separators, given back as written."""
    documents = [[1, 2, 3], [], [4, 5, 6, 7], [8]]
    spans = np.array([[0, 3], [3, 6], [4, 7], [7, 8]], np.uint32)
    vectors = np.eye(4, 8, dtype=np.float32)
    record = write_segment(
        tmp_path / "segments" / "s",
        *arrays_of(documents),
        list("abcd"),
        vocab_size=10,
        num_threads=1,
        dense=(spans, vectors),
    )
    stored = open_segment(tmp_path, record, 10, dimension=8)
    assert stored.dense is not None
    assert [stored.tokens[a:b].tolist() for a, b in stored.dense.spans.tolist()] == [
        [1, 2, 3],
        [4, 5, 6],
        [5, 6, 7],
        [8],
    ]
    assert stored.plain_spans().tolist() == spans.tolist()
    assert stored.tokens.dtype == token_dtype(10)
