"""The benchmark for GPUs, on the CPU: what it replays is what was recorded, and it needs nothing of Ray or FAISS."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu_markdown import markdown
from benchmarks.gpu_passes import random_model
from benchmarks.gpu_played import played_engine, played_requests
from benchmarks.gpu_race import Deadline, race
from benchmarks.recorded_lookups import RecordedLookups
from datastore.live import LiveStore
from datastore.lookup import CONTEXT_TOKENS, LookupOptions
from pipeline.lookup import Lookup
from pipeline.methods import METHODS
from pipeline.replay import ReplayEngine
from pipeline.request import Generation
from tests.pipeline.test_replay import GREEDY, recording_of

NOTHING = RecordedLookups(np.empty((0, CONTEXT_TOKENS), np.int32), Lookup.empty(0))


def store_of(sequences: list[list[int]]) -> LiveStore:
    store = LiveStore(512)
    store.append([np.array(sequence, np.int32) for sequence in sequences])
    return store


def test_recorded_lookups_are_those_of_the_store_and_nothing_else(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    store = store_of(random.integers(0, 6, (40, 60)).tolist())
    contexts = [random.integers(0, 6, length).astype(np.int32) for length in (1, 5, 16, 17, 18, 40)]
    depths = np.full(len(contexts), 16, np.int32)
    wanted = store.lookup(contexts, LookupOptions(), depths)
    whole = lambda ends: store.lookup(ends, LookupOptions(), np.full(len(ends), 16, np.int32))  # noqa: E731
    RecordedLookups.record([*contexts, contexts[0]], CONTEXT_TOKENS, whole).save(tmp_path / "lookups.npz")
    recorded = RecordedLookups.load(tmp_path / "lookups.npz")
    assert len(recorded) == len(contexts)
    unknown = np.array([5] * 30, np.int32)
    recorded.send([*contexts[::-1], unknown], np.append(depths, 16))
    found = recorded.receive()["corpus"]
    assert found.match_lengths[-1] == 0 and found.offsets[-1] == found.offsets[-2]
    assert len(wanted.tokens) > 50
    for row in range(len(contexts)):
        back = len(contexts) - 1 - row
        assert found.match_lengths[back] == wanted.match_lengths[row]
        for name in ("tokens", "parents", "counts"):
            np.testing.assert_array_equal(
                getattr(found, name)[slice(*found.offsets[back : back + 2])],
                getattr(wanted, name)[slice(*wanted.offsets[row : row + 2])],
            )


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("name", ["plain", "context", "draft", "rasd-fixed"])
def test_a_played_model_accepts_what_was_recorded(name: str, is_static: bool) -> None:
    recording = recording_of(GREEDY)
    sources = tuple(source for source in METHODS[name].sources if source in ("draft", "context"))
    replay = ReplayEngine(recording, replace(METHODS[name], sources=sources), num_slots=2, budget=6)
    model = random_model("tiny", torch.device("cpu"), torch.float32)
    engine = played_engine(model, recording, name, 2, NOTHING, budget=6, is_static=is_static)
    count = len(recording.prompts)
    for got, wanted in zip(
        by_id(engine.generate(played_requests(recording, count))),
        by_id(replay.generate(replay.requests())),
        strict=True,
    ):
        assert got.token_ids == wanted.token_ids == recording.outputs[got.request_id]
        if name != "rasd-fixed":  # which asks the draft model itself about retrieved tokens
            assert (got.rounds, got.drafted) == (wanted.rounds, wanted.drafted)
            assert got.accepted_by_source == wanted.accepted_by_source


def by_id(generations: object) -> list[Generation]:
    return sorted(generations, key=lambda generation: generation.request_id)  # type: ignore[call-overload, no-any-return]


def test_a_race_tells_what_each_engine_did_and_a_page_shows_it() -> None:
    recording = recording_of(GREEDY)
    model = random_model("tiny", torch.device("cpu"), torch.float32)
    engines = {name: played_engine(model, recording, name, 2, NOTHING) for name in ("plain", "rasd")}
    count = 2 * len(recording.prompts)
    rows = race(engines, played_requests(recording, count), 2, {"peer": lambda: 7})
    assert [row["method"] for row in rows] == ["plain", "rasd", "peer"]
    assert rows[0]["of_plain"] == rows[0]["tau"] == 1.0 and rows[1]["tau"] > 1.0
    assert rows[0]["differing"] == rows[1]["differing"] == 0.0
    for row in rows[:2]:
        assert sum(row["phases"].values()) == pytest.approx(1.0, abs=0.01)
        assert row["beside_passes"] == pytest.approx(
            1.0 - row["phases"]["verify"] - row["phases"].get("draft", 0.0), abs=0.01
        )
    machine = {"gpu": "a card", "torch": "2", "transformers": "5", "cores": 1, "date": "today"}
    equality = [{"prompts": 10, "wrong": 1, "differ_by_rounding": 2}]
    results = {"machine": machine, "model": "m", "shape": "s", "equality": equality, "skipped": ["much"]}
    text = markdown({**results, "speed": [{"slots": 2, **row} for row in rows], "played": []})
    assert "10 outputs, 1 wrong, 2 that differ" in text and "No time was left for: much." in text
    assert f"| 2 | rasd | {rows[1]['tokens_per_second']} |" in text


def test_what_there_is_no_time_for_is_named() -> None:
    deadline = Deadline(60.0)
    assert deadline.allows("a little", 10.0) and not deadline.allows("more", 70.0)
    assert deadline.skipped == ["more"]


def test_it_imports_nothing_of_ray_faiss_or_arrow() -> None:
    code = (
        "import json, sys; from benchmarks import gpu_check;"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert "torch" in loaded and not {"ray", "faiss", "pyarrow", "datasets", "datastore", "jobs"} & set(loaded)
