"""Building, appending and merging: a store holds exactly the tokens of its documents, and nothing is made twice."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from datastore.embed_files import DEFAULT_EMBEDDER
from datastore.format import read_manifest
from jobs.build_datastore import build
from jobs.datastore_config import BuildConfig
from jobs.lease import Lease
from jobs.segments import encode
from jobs.segments.pool import Order
from jobs.segments.task import Built
from pipeline.errors import ConfigError, InputError, JobError, ModelError
from pipeline.models import load_tokenizer, resolve_model, tokenizer_hash
from tests.jobs.stores import (
    VOCABULARY,
    InlinePool,
    build_config,
    content_of,
    documents_of,
    encoded,
    no_pool,
    outcome,
    run_build,
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


@pytest.mark.parametrize("segment_tokens", [1, 100, 10_000])
def test_a_store_holds_the_tokens_of_its_documents_in_order(
    tmp_path: Path, model: Path, tokenizer: PreTrainedTokenizerBase, rows: Path, segment_tokens: int
) -> None:
    assert run_build(model, tmp_path / "s", rows, segment_tokens=segment_tokens) == 0
    assert documents_of(tmp_path / "s") == encoded(tokenizer, TEXTS)
    manifest = read_manifest(tmp_path / "s")
    # Bytes are counted, four a token: here a token has about two.
    assert len(manifest.segments) == {1: 30, 100: 5, 10_000: 1}[segment_tokens]
    assert (manifest.tokenizer, manifest.vocab_size) == (tokenizer_hash(tokenizer), VOCABULARY)


def test_the_outcome_counts_everything(
    tmp_path: Path, model: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows.write_text(rows.read_text() + '{"text": "' + TEXTS[0].replace("\n", "\\n") + '"}\n{"text": 5}\n')
    run_build(model, tmp_path / "s", rows, segment_tokens=100)
    record = outcome(capsys)
    manifest = read_manifest(tmp_path / "s")
    assert (record["state"], record["documents"], record["duplicates"]) == ("done", 30, 1)
    assert record["skipped"] == {"wrong_type": 1}
    assert (record["segments"], record["tokens"]) == (len(manifest.segments), manifest.tokens)
    assert record["bytes"] == sum(path.stat().st_size for path in (tmp_path / "s").rglob("*.bin"))
    assert record["tokenised_per_second"] > 0 and record["indexed_per_second"] > 0


def test_a_long_text_is_tokenised_in_pieces_cut_after_lines(
    tmp_path: Path, model: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 40)
    text = "the quick brown fox\n" * 9 + "no line end for more than forty characters, as in a table" * 2
    run_build(model, tmp_path / "s", write_rows(tmp_path / "r.jsonl", ["first", text, "last"]))
    found = documents_of(tmp_path / "s")
    assert [name for name, _ in found] == ["d0", "d1", "d2"]
    assert [tokenizer.decode(ids) for _, ids in found] == ["first", text, "last"]
    lines = tokenizer("the quick brown fox\n" * 2, add_special_tokens=False)["input_ids"]
    assert found[1][1][: 4 * len(lines)] == lines * 4


def test_a_document_longer_than_a_segment_is_one_of_its_own(tmp_path: Path, model: Path) -> None:
    run_build(model, tmp_path / "s", write_rows(tmp_path / "r.jsonl", ["a", "b" * 1000, "c"]), segment_tokens=10)
    assert [segment.documents for segment in read_manifest(tmp_path / "s").segments] == [1, 1, 1]


def test_a_document_beyond_the_limit_is_named(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MAX_DOCUMENT_TOKENS", 100)
    with pytest.raises(InputError, match="the document d1 has 300 tokens"):
        run_build(model, tmp_path / "s", write_rows(tmp_path / "r.jsonl", ["fits", "1" * 300]))


def test_a_second_run_makes_nothing_and_changes_nothing(
    tmp_path: Path, model: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_build(model, tmp_path / "s", rows, segment_tokens=100)
    before = content_of(tmp_path / "s")
    assert build(build_config(model, tmp_path / "s", rows, segment_tokens=100), no_pool) == 0
    record = outcome(capsys)
    assert (record["state"], record["kept_segments"], record["new_tokens"]) == ("complete", 5, 0)
    assert content_of(tmp_path / "s") == before


def test_equal_corpora_give_equal_bytes_wherever_they_are(tmp_path: Path, model: Path, rows: Path) -> None:
    (tmp_path / "moved").mkdir()
    for name, corpus in (("a", rows), ("b", write_rows(tmp_path / "moved" / "rows.jsonl", TEXTS))):
        run_build(model, tmp_path / name, corpus, segment_tokens=100)
    first, second = content_of(tmp_path / "a"), content_of(tmp_path / "b")
    assert first.pop("build.json") != second.pop("build.json")
    assert first == second


def test_changed_options_are_refused_with_the_difference(
    tmp_path: Path, model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = tmp_path / "s"
    run_build(model, store, rows, segment_tokens=100)
    before = content_of(store)
    with pytest.raises(ConfigError, match=r"other content: segment_tokens: 100 -> 200; text_column: \"text\" -> \"t\""):
        run_build(model, store, rows, segment_tokens=200, text_column="t")
    other = tiny_model(tmp_path_factory.mktemp("other"), merges=10)
    with pytest.raises(ConfigError, match=r"tokenizer: \"[0-9a-f]{64}\" -> \"[0-9a-f]{64}\""):
        run_build(other, store, rows, segment_tokens=100)
    write_rows(rows, [*TEXTS[:-1], "changed"])
    with pytest.raises(ConfigError, match=r"complete datastore of other documents: its segment 000004-\w+ would now"):
        run_build(model, store, rows, segment_tokens=100)
    assert content_of(store) == before


def test_before_the_first_segment_an_option_can_be_corrected(tmp_path: Path, model: Path, rows: Path) -> None:
    with pytest.raises(InputError, match="no usable document"):
        run_build(model, tmp_path / "s", rows, text_column="wrong")
    assert run_build(model, tmp_path / "s", rows) == 0


class _OneSegmentPool(InlinePool):
    """Fails after the first segment."""

    made = 0

    def done(self) -> Iterator[tuple[Order, Built]]:
        if self.made:
            raise JobError("enough")
        self.made += 1
        yield from super().done()


def test_segments_of_a_corpus_that_changed_before_the_end_are_made_again(
    tmp_path: Path, model: Path, rows: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    store = tmp_path / "s"
    pool = _OneSegmentPool()
    with pytest.raises(JobError, match="enough"):
        build(build_config(model, store, rows, segment_tokens=100), lambda: nullcontext(pool))
    (first,) = (store / "segments").iterdir()
    texts = ["changed", *TEXTS[1:]]
    write_rows(rows, texts)
    run_build(model, store, rows, segment_tokens=100)
    assert not first.exists()
    assert documents_of(store) == encoded(tokenizer, texts)


def test_memory_is_bounded_by_segments_in_flight(tmp_path: Path, model: Path, rows: Path) -> None:
    pool = InlinePool(capacity=3)
    build(build_config(model, tmp_path / "s", rows, segment_tokens=1), lambda: nullcontext(pool))
    assert pool.most_pending == 3
    assert len(read_manifest(tmp_path / "s").segments) == 30


def test_foreign_directories_are_refused_and_left_alone(tmp_path: Path, model: Path, rows: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"it holds 'thesis\.tex', which is no part of a datastore"):
        run_build(model, tmp_path / "mine", rows)
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    with pytest.raises(ConfigError, match="cannot be written"):
        run_build(model, rows, rows)


def test_a_second_live_driver_is_refused(tmp_path: Path, model: Path, rows: Path) -> None:
    (tmp_path / "s").mkdir()
    with Lease(tmp_path / "s"), pytest.raises(ConfigError, match="is in use by process"):
        run_build(model, tmp_path / "s", rows)


def test_the_default_embedder_is_the_embedded_one() -> None:
    assert BuildConfig.model_fields["embedder"].default == DEFAULT_EMBEDDER


def test_a_missing_embedder_is_an_error_before_any_work(tmp_path: Path, model: Path, rows: Path) -> None:
    with pytest.raises(ModelError, match=r"embedder '.*nowhere'"):
        run_build(model, tmp_path / "s", rows, dense="on", embedder=str(tmp_path / "nowhere"))
    assert not (tmp_path / "s").exists()
