"""Where a round's time goes: seconds by phase, and on request every span as an event of a Chrome trace (Perfetto)."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

MOST_SPANS = 200_000  # about 30,000 rounds, 20 MB


class Phases:
    """Times phases; what one within another takes is not the outer one's.

    Attributes:
        seconds: total by phase.
        spans: the newest spans, (phase, begin, seconds); None if they are not kept.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.spans: deque[tuple[str, float, float]] | None = None
        self._inner = 0.0  # seconds of phases within the present one

    def keep_spans(self, most: int = MOST_SPANS) -> None:
        """Keeps the newest `most` spans from now on."""
        self.spans = deque(maxlen=most)

    def events(self, process: int) -> list[dict[str, Any]]:
        """The spans kept, as complete events of the Trace Event Format; times in microseconds of the wall clock."""
        shift = time.time() - self._clock()
        return [
            {"name": name, "ph": "X", "ts": 1e6 * (begin + shift), "dur": 1e6 * seconds, "pid": process, "tid": 0}
            for name, begin, seconds in self.spans or ()
        ]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin, inner_before = self._clock(), self._inner
        self._inner = 0.0
        try:
            yield
        finally:
            duration = self._clock() - begin
            self.seconds[name] += duration - self._inner
            self._inner = inner_before + duration
            if self.spans is not None:
                self.spans.append((name, begin, duration))
