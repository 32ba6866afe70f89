"""What a replica can tell of how its tokens came about, once it ends: counts of all rows, trails of the first few."""

import threading
from typing import Any

from transformers import PreTrainedTokenizerBase

from actors.rows import WITNESSED, InputRow
from pipeline.provenance import Counts, Recorder
from pipeline.request import Generation

_FOLLOWED = 6


class Witness:
    """Follows the first requests of a replica. Called from the threads of several shards."""

    def __init__(self, recorder: Recorder, tokenizer: PreTrainedTokenizerBase) -> None:
        self._recorder = recorder
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._num_followed = 0
        self._counts = Counts()
        self._trails: list[dict[str, Any]] = []

    def submitted(self, request_id: int) -> None:
        """A request is about to be handed to the engine."""
        with self._lock:
            if self._num_followed < _FOLLOWED:
                self._num_followed += 1
                self._recorder.follow(request_id)

    def finished(self, row: InputRow, generation: Generation) -> None:
        """A request's outcome."""
        counts, trail = self._recorder.take(generation.request_id)
        with self._lock:
            self._counts += counts
            if trail:
                tokens = [token.record(str(self._tokenizer.decode([token.token_id]))) for token in trail]
                said = row.prompt or str((row.messages or ({"content": ""},))[-1]["content"])
                task = str(row.extra.get("task") or "")
                self._trails.append(
                    {"id": row.id, "task": task, "row_index": row.row_index, "said": said, "trail": tokens}
                )

    def event(self, replica: int, seconds: dict[str, float]) -> dict[str, Any]:
        """All of it as a metadata event of the Trace Event Format.

        Args:
            seconds: of the engine's rounds by phase.
        """
        with self._lock:
            told = {
                "seconds": seconds,
                "predicted": self._counts.predicted.tolist(),
                "trails": self._trails,
                **self._counts.by_depth(),
            }
        return {"name": WITNESSED, "ph": "M", "pid": replica, "args": told}
