"""The corpus: every format gives the same documents, in one order, each once; what is bad is counted and told."""

import gzip
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from actors.parts import PartWriter, finish_shard
from actors.records import failed_record, generated_record, output_schema
from actors.rows import InputRow, RowFailure, ShardTask
from jobs.commit import CommitLog
from jobs.corpus.corpus import Corpus, open_corpus
from jobs.corpus.digest_set import DigestSet
from jobs.corpus.document import TOKEN_ID, Document
from jobs.files import write_json
from jobs.lease import Lease
from pipeline.errors import DatastoreError, InputError, ModelError
from pipeline.models import load_tokenizer, resolve_model
from pipeline.request import Generation
from tests.jobs.stores import tiny_model

TEXTS = ["One.", 'Two,\n\n"quoted" and ünïcode.', "Three \u2028 with a line separator."]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    path = tiny_model(tmp_path_factory.mktemp("model"), chat=True)
    return load_tokenizer(resolve_model(str(path)))


@pytest.fixture
def open_(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Corpus]:
    def opened(*specs: Path | str, text_column: str = "text", is_chat: bool = False) -> Corpus:
        return open_corpus(
            [str(spec) for spec in specs],
            text_column=text_column,
            is_chat=is_chat,
            tokenizer=tokenizer,
            tokenizer_hash="mine",
        )

    return opened


def read(corpus: Corpus) -> list[Document]:
    return list(corpus.documents(DigestSet()))


def texts_of(corpus: Corpus) -> list[str]:
    return [document.content.decode() for document in read(corpus)]


def jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def write(directory: Path, form: str) -> Path:
    """TEXTS as one input of that form."""
    rows = [{"text": text} for text in TEXTS]
    path = directory / f"c.{form}"
    match form:
        case "jsonl" | "ndjson":
            jsonl(path, rows)
        case "jsonl.gz" | "jsonl.zst":
            plain = jsonl(directory / "plain", rows).read_bytes()
            with pa.output_stream(path, compression={"gz": "gzip", "zst": "zstd"}[form[6:]]) as out:
                out.write(plain)
            (directory / "plain").unlink()
        case "json":
            path.write_text(json.dumps(rows, indent=1))
        case "csv":
            path.write_bytes("\r\n".join(["text", *map(quoted, TEXTS)]).encode())
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case "dataset":
            datasets.Dataset.from_list(rows).save_to_disk(path)
        case _:
            path.mkdir()
            for number, text in enumerate(TEXTS):
                (path / f"{number}.{form}").write_bytes(text.encode())
    return path


FORMS = ["jsonl", "ndjson", "jsonl.gz", "jsonl.zst", "json", "csv", "parquet", "dataset", "txt", "md", "py"]


@pytest.mark.parametrize("form", FORMS)
def test_every_format_gives_the_same_documents(tmp_path: Path, open_: Callable[..., Corpus], form: str) -> None:
    corpus = open_(write(tmp_path, form))
    assert texts_of(corpus) == TEXTS
    assert (corpus.num_documents, corpus.num_duplicates, corpus.skipped) == (3, 0, {})


def test_a_document_is_named_by_id_or_path_or_its_place(tmp_path: Path, open_: Callable[..., Corpus]) -> None:
    rows = [{"id": 7, "path": "p"}, {"path": "a/b.rst"}, {"id": None}, {"id": ["x"]}, {"id": "\ud800"}, {"id": True}]
    jsonl(tmp_path / "rows.jsonl", [{**row, "text": str(i)} for i, row in enumerate(rows)])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "code.py").write_text("pass")
    names = [document.name for document in read(open_(tmp_path))]
    assert names == ["7", "a/b.rst", "rows.jsonl:2", "rows.jsonl:3", "\\ud800", "rows.jsonl:5", "sub/code.py"]


BAD = {
    "malformed_json": b'{"text": "a',
    "not_an_object": b'["text"]',
    "missing_field": b'{"prompt": "x"}',
    "wrong_type": b'{"text": 5}',
    "empty_text": b'{"text": ""}',
    "invalid_unicode": rb'{"text": "a\ud800b"}',
}


def test_bad_rows_are_skipped_counted_and_the_first_of_a_kind_is_told(
    tmp_path: Path, open_: Callable[..., Corpus], caplog: pytest.LogCaptureFixture
) -> None:
    lines = [*BAD.values(), b'{"text": "good"}', *BAD.values(), b'{"text": "caf\xe9"}']
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    corpus = open_(tmp_path / "rows.jsonl")
    with caplog.at_level(logging.WARNING):
        assert texts_of(corpus) == ["good"]
    assert corpus.skipped == {**dict.fromkeys(BAD, 2), "invalid_unicode": 3}
    for line, kind in enumerate(BAD, 1):
        told = [message for message in caplog.messages if kind in message]
        assert len(told) == 1 and f"rows.jsonl line {line}: " in told[0]


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("c.jsonl", b"{}\n", "1 x missing_field"),
        ("c.csv", b"question\nwhy\n", "1 x missing_column"),
        ("c.py", b"", "1 x empty_text"),
        ("c.txt", "text".encode("utf-16"), "1 x invalid_unicode"),
        ("c.jsonl", b"\n", "no row at all"),
    ],
)
def test_a_corpus_without_a_usable_document_is_an_error(
    tmp_path: Path, open_: Callable[..., Corpus], name: str, content: bytes, kind: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"no usable document in {name} \({kind}"):
        read(open_(tmp_path / name))


def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, open_: Callable[..., Corpus]) -> None:
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "good"}\n' * 9999)[:-9])
    (tmp_path / "d.md.gz").write_bytes(gzip.compress(b"good\n" * 9999)[:-9])
    for name in ("c.jsonl.gz", "d.md.gz"):
        with pytest.raises(InputError, match=f"cannot read .*{name}: Truncated"):
            read(open_(tmp_path / name))


def test_directories_are_walked_in_order_without_markers_jobs_and_datastores(
    tmp_path: Path, open_: Callable[..., Corpus]
) -> None:
    names = ("b.md", "a/z.PY", "a/y.txt", ".git/x.py", "a/_draft.md", "a/.hidden.md", "a/image.png", "job/part.txt")
    for name in (*names, "job/_commits/0.json", "store/segments/s/names.txt", "store/manifest.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(open_(tmp_path)) == ["a/y.txt", "a/z.PY", "b.md"]
    assert texts_of(open_(tmp_path / "b.md", f"{tmp_path}/*/*.txt", tmp_path / "a" / "y.txt")) == [
        "a/y.txt",
        "b.md",
        "job/part.txt",
    ]
    with pytest.raises(InputError, match="is a datastore, which holds no documents"):
        open_(tmp_path / "store")


def test_a_json_file_of_one_object_is_a_text(tmp_path: Path, open_: Callable[..., Corpus]) -> None:
    (tmp_path / "package.json").write_text('{\n "name": "x"\n}')
    (document,) = read(open_(tmp_path))
    assert (document.name, document.content) == ("package.json", b'{\n "name": "x"\n}')


def test_equal_texts_come_once_whatever_their_file_and_name(tmp_path: Path, open_: Callable[..., Corpus]) -> None:
    jsonl(tmp_path / "b.jsonl", [{"id": i, "text": f"text {i % 10}"} for i in range(1000)])
    (tmp_path / "a.md").write_text("text 3")
    corpus = open_(tmp_path)
    assert texts_of(corpus) == ["text 3", *(f"text {i}" for i in range(10) if i != 3)]
    assert (corpus.num_documents, corpus.num_duplicates) == (10, 991)


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 1 << 40])), max_size=50), max_size=8))
def test_the_digest_set_is_a_set(batches: list[list[tuple[int, int]]]) -> None:
    """Digests with few low bits collide in the table."""
    table, known = DigestSet(), set[tuple[int, int]]()
    for batch in batches:
        digests = [(low * 1024 + 1, high) for low, high in batch]
        expected = [digest not in known and digest not in digests[:i] for i, digest in enumerate(digests)]
        known |= set(digests)
        assert table.add_all(np.array(digests, np.uint64).reshape(-1, 2)).tolist() == expected
        assert len(table) == len(known)


def test_the_digest_set_grows_and_forgets_nothing() -> None:
    digests = np.random.default_rng(0).integers(1, 1 << 63, (100_000, 2), np.uint64)
    table = DigestSet()
    assert all(table.add_all(part).all() for part in np.split(digests, np.arange(1, 8) * 12_000))
    assert not table.add_all(digests).any()
    assert not table.add(digests[0].tobytes())
    assert table.num_bytes <= 48 * len(table)


def test_conversations_are_written_as_the_template_says(tmp_path: Path, open_: Callable[..., Corpus]) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    jsonl(tmp_path / "c.jsonl", [{"messages": turns, "text": "t"}, {"messages": []}, {"text": "t"}])
    (tmp_path / "d.md").write_text("no conversation")
    corpus = open_(tmp_path, is_chat=True)
    assert texts_of(corpus) == ["<user>Hi<assistant>Hello"]
    assert corpus.skipped == {"bad_messages": 1, "missing_field": 1, "missing_column": 1}


def test_chat_needs_a_template(tmp_path: Path) -> None:
    bare = load_tokenizer(resolve_model(str(tiny_model(tmp_path / "m"))))
    with pytest.raises(ModelError, match="no chat template"):
        open_corpus(["x.jsonl"], text_column="text", is_chat=True, tokenizer=bare, tokenizer_hash="mine")


def write_job(output: Path, *, tokenizer: str = "mine", num_samples: int = 1) -> list[list[int]]:
    """Two committed shards of a generation job, and a third part that no commit names; returns all good ids."""
    output.mkdir()
    schema = output_schema(["prompt"], pa.schema([]), logprobs=False)
    fingerprint = {"tokenizer": tokenizer, "num_samples": num_samples}
    write_json(output / "plan.json", {"fingerprint": fingerprint, "num_shards": 3})
    expected = []
    with Lease(output) as lease:
        log = CommitLog(output, lease)
        log.open()
        for shard in range(3):
            path = str(log.part_path(shard, 1))
            writer = PartWriter(path, schema.serialize().to_pybytes())
            for row in (InputRow(shard * 2 + i, f"r{shard * 2 + i}", prompt="p") for i in range(2)):
                for sample in range(num_samples):
                    if row.row_index == 1:
                        writer.add(failed_record(row, sample, 0, RowFailure("empty_prompt", "empty")))
                        continue
                    ids = (5, row.row_index, sample, 2)
                    generation = Generation(0, ids, "text", "eos", 1, 1, 0, 0, {}, 0)
                    writer.add(generated_record(row, sample, 0, generation))
                    expected += [list(ids)] if shard < 2 else []
            result = finish_shard(ShardTask(shard, 1, (), path, b""), writer, 0.0)
            if shard < 2:
                log.commit(result)
            else:
                Path(result.path).rename(output / "part-000002.parquet")
    return expected


@pytest.mark.parametrize("num_samples", [1, 2])
def test_generations_are_the_committed_good_rows(
    tmp_path: Path, open_: Callable[..., Corpus], caplog: pytest.LogCaptureFixture, num_samples: int
) -> None:
    expected = write_job(tmp_path / "job", num_samples=num_samples)
    (tmp_path / "a.md").write_text("text")
    corpus = open_(f"generations:{tmp_path}/job", tmp_path / "a.md")
    text, *documents = read(corpus)
    assert text.is_text and not any(document.is_text for document in documents)
    assert [np.frombuffer(document.content, TOKEN_ID).tolist() for document in documents] == expected
    assert documents[0].name == ("r0" if num_samples == 1 else "r0#0")
    assert corpus.skipped == {"error_row": num_samples}
    assert "is not finished: 2 of 3 shards" in caplog.text


def test_generations_of_another_tokenizer_or_a_changed_file_are_refused(
    tmp_path: Path, open_: Callable[..., Corpus]
) -> None:
    write_job(tmp_path / "other", tokenizer="theirs")
    with pytest.raises(DatastoreError, match="made with another tokenizer: theirs, that of --model is mine"):
        open_(f"generations:{tmp_path}/other")
    with pytest.raises(InputError, match="is no output of `rasd generate`"):
        open_(f"generations:{tmp_path}/none")
    write_job(tmp_path / "job")
    part = tmp_path / "job" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"part-000001\.parquet has [\d,]+ bytes, its commit says"):
        read(open_(f"generations:{tmp_path}/job"))
