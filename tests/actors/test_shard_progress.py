"""Progress of a shard: whatever is torn, flipped or foreign ends the reading, and what is before it is as it was."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors import shard_progress
from actors.records import Record, failed_record, generated_record, output_schema, restored_record
from actors.rows import InputRow, ProgressPlace, RowFailure, ShardTask
from actors.shard_output import ShardOutput
from actors.shard_progress import PROGRESS, ShardProgress, frame, payloads, progress_key
from tests.fakes import fake_generation
from tests.jobs.test_commit import full_disk

KEY = progress_key({"seed": 1})
PAYLOADS = (b"", b"one", b"\x00" * 9, bytes(range(40)))
FILE = b"".join(frame(payload, KEY) for payload in PAYLOADS)
ENDS = [len(b"".join(frame(payload, KEY) for payload in PAYLOADS[:n])) for n in range(len(PAYLOADS) + 1)]
SCHEMA = output_schema(["prompt"], pa.schema([("n", pa.int64())]), logprobs=True)


def whole_frames(size: int) -> int:
    """How many frames the first `size` bytes of the file hold."""
    return sum(end <= size for end in ENDS[1:])


def test_a_file_cut_anywhere_gives_its_whole_frames() -> None:
    for size in range(len(FILE) + 1):
        assert tuple(payloads(FILE[:size], KEY)) == PAYLOADS[: whole_frames(size)]


def test_a_flipped_bit_ends_the_file_at_the_frame_before() -> None:
    for bit in range(8 * len(FILE)):
        damaged = bytearray(FILE)
        damaged[bit // 8] ^= 1 << bit % 8
        assert tuple(payloads(bytes(damaged), KEY)) == PAYLOADS[: whole_frames(bit // 8)]


@given(st.binary(max_size=200), st.integers(0, len(FILE)))
def test_garbage_in_a_file_gives_no_payload(garbage: bytes, at: int) -> None:
    data = FILE[:at] + garbage
    right = next((place for place, pair in enumerate(zip(FILE, data, strict=False)) if pair[0] != pair[1]), len(data))
    assert tuple(payloads(data, KEY)) == PAYLOADS[: whole_frames(right)]


def test_frames_of_a_job_with_other_options_are_none() -> None:
    assert list(payloads(FILE, progress_key({"seed": 2}))) == []
    assert progress_key({"a": 1, "b": 2}) == progress_key({"b": 2, "a": 1})


def a_row(index: int) -> InputRow:
    return InputRow(index, f"id{index}", prompt=f"prompt \U0001f600 {index}", extra={"n": index})


def a_record(index: int, sample: int = 0) -> Record:
    generation = fake_generation(f"prompt {index}", index)
    logprobs = tuple(-0.1 * index - place for place in range(len(generation.token_ids)))
    generation = replace(generation, text="\x00\n\U0001f600", logprobs=logprobs)
    return generated_record(a_row(index), sample, (1 << 64) - 1 - index, generation)


@pytest.fixture
def place(tmp_path: Path) -> ProgressPlace:
    """Of the first attempt at shard 3."""
    (tmp_path / PROGRESS).mkdir()
    return ProgressPlace(str(tmp_path / PROGRESS / "000003" / "001000"), KEY)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is written when it comes."""
    monkeypatch.setattr(shard_progress._Files, "seconds", 0.0)
    monkeypatch.setattr(shard_progress, "REST", 0.0)


def task(directory: Path, place: ProgressPlace | None, *rows: InputRow) -> ShardTask:
    return ShardTask(3, 1000, rows, str(directory / "part.parquet"), SCHEMA.serialize().to_pybytes(), place)


@pytest.mark.usefixtures("at_once")
def test_rows_of_all_attempts_come_back_as_they_were(place: ProgressPlace) -> None:
    records = {(index, sample): a_record(index, sample) for index in range(3) for sample in range(2)}
    for attempt, sample in (("001000", 0), ("001001", 1)):
        progress = ShardProgress(ProgressPlace(place.path.replace("001000", attempt), KEY), SCHEMA)
        for index in range(3):
            progress.add(records[index, sample])
    found = ShardProgress(place, SCHEMA).read()
    assert found.keys() == records.keys()
    restored = [restored_record(a_row(i), k, (1 << 64) - 1 - i, found[i, k]) for i, k in records]
    assert pa.Table.from_pylist(restored, SCHEMA).equals(pa.Table.from_pylist(list(records.values()), SCHEMA))
    strange = ShardProgress(ProgressPlace(place.path, progress_key({"seed": 2})), SCHEMA)
    assert strange.read() == {} and strange.is_there


@pytest.mark.usefixtures("at_once")
def test_damage_to_a_file_costs_its_later_rows_alone(place: ProgressPlace) -> None:
    path, other = Path(place.path), Path(place.path).with_name("000999")
    progress, sizes = ShardProgress(place, SCHEMA), []
    for index in range(4):
        progress.add(a_record(index))
        sizes.append(path.stat().st_size)
    data = path.read_bytes()
    other.write_bytes(os.urandom(5000))
    path.with_name("000998").write_bytes(b"")
    for size in range(0, len(data), 97):
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in sizes)
        assert list(ShardProgress(place, SCHEMA).read()) == [(index, 0) for index in range(whole)]
    path.write_bytes(data[: sizes[1]] + bytes([data[sizes[1]] ^ 1]) + data[sizes[1] + 1 :])
    assert list(ShardProgress(place, SCHEMA).read()) == [(0, 0), (1, 0)]


def test_nothing_is_written_of_a_shard_that_ends_soon(tmp_path: Path, place: ProgressPlace) -> None:
    output = ShardOutput(task(tmp_path, place))
    for index in range(50):
        output.add(a_record(index))
    left = output.seconds_left()
    assert left is not None and 0 < left <= shard_progress.FILE_SECONDS
    assert not output.finish().has_progress
    assert list((tmp_path / PROGRESS).iterdir()) == []


@pytest.mark.usefixtures("at_once")
def test_rows_that_failed_are_not_kept(tmp_path: Path, place: ProgressPlace) -> None:
    output = ShardOutput(task(tmp_path, place))
    output.add(failed_record(a_row(0), 0, 0, RowFailure("prompt_too_long", "too long")))
    output.add(a_record(1))
    again = ShardOutput(task(tmp_path, place))
    assert again.resume(a_row(0), 0, 0) is None
    assert again.resume(a_row(1), 1, 0) is None, "another sample"
    blamed = InputRow(1, "id1", prompt="p", error=RowFailure("killed_replica", "ended 3 replicas"))
    assert again.resume(blamed, 0, 0) is None
    stats = again.resume(a_row(1), 0, (1 << 64) - 2)
    assert stats is not None and (stats.rows, stats.resumed_rows, stats.resumed_tokens) == (1, 1, 8)


def test_rest_between_writes_is_a_hundred_times_what_one_takes(
    place: ProgressPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(shard_progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(shard_progress._Files, "append", lambda *_: clock.__setitem__(0, clock[0] + 0.5))
    progress = ShardProgress(place, SCHEMA)
    progress.add(a_record(0))
    assert progress.seconds_left() == shard_progress.FILE_SECONDS
    clock[0] = shard_progress.FILE_SECONDS
    progress.save_if_due()
    assert progress.seconds_left() is None
    progress.add(a_record(1))
    assert progress.seconds_left() == shard_progress.REST * 0.5


@pytest.mark.usefixtures("at_once")
def test_a_full_disk_is_told_once_and_ends_nothing(
    tmp_path: Path, place: ProgressPlace, caplog: pytest.LogCaptureFixture
) -> None:
    output = ShardOutput(task(tmp_path, place))
    with full_disk(), caplog.at_level(logging.WARNING):
        for index in range(5):
            output.add(a_record(index))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "are not kept from now on" in caplog.text and "File too large" in caplog.text
    result = output.finish()
    assert (result.rows, result.has_progress) == (5, True)
    assert ShardProgress(place, SCHEMA).read() == {}, "a part of a frame is none"


@pytest.mark.usefixtures("at_once")
def test_progress_that_cannot_be_read_is_none(
    tmp_path: Path, place: ProgressPlace, caplog: pytest.LogCaptureFixture
) -> None:
    Path(place.path).parent.mkdir()
    Path(place.path).mkdir()  # a directory where a file should be
    assert ShardProgress(place, SCHEMA).read() == {}
    assert "cannot be read" in caplog.text


@pytest.mark.usefixtures("at_once")
def test_a_replica_whose_job_has_ended_makes_no_folders(tmp_path: Path, place: ProgressPlace) -> None:
    (tmp_path / PROGRESS).rmdir()
    progress = ShardProgress(place, SCHEMA)
    progress.add(a_record(0))
    assert not (tmp_path / PROGRESS).exists()
