"""How far the job is, on stderr: a bar on a terminal, else a log line now and then."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from actors.rows import ShardStats
from jobs.logs import is_json

LOG_SECONDS = 30.0

log = logging.getLogger(__name__)


class Progress:
    """Shows output rows done and the speed of this run.

    Args:
        total: output rows of the job.
        is_quiet: show nothing.
    """

    def __init__(self, total: int, *, is_quiet: bool) -> None:
        self._total = total
        self._is_quiet = is_quiet
        self._done = 0
        self._begin = self._log_at = 0.0
        self._bar: tqdm[NoReturn] | None = None

    @contextlib.contextmanager
    def shown(self, done: int) -> Iterator[None]:
        """From here on there is something to see; `done` rows are from earlier runs."""
        self._done = done
        self.restart()
        if self._is_quiet or is_json() or not sys.stderr.isatty():
            yield
            return
        with (
            tqdm(total=self._total, initial=done, unit="row", dynamic_ncols=True) as self._bar,
            logging_redirect_tqdm(),
        ):
            yield
        self._bar = None

    def restart(self) -> None:
        """Count speed from now on: the model is loaded."""
        self._begin = time.monotonic()
        self._log_at = self._begin + LOG_SECONDS
        if self._bar is not None:
            self._bar.unpause()

    def show(self, stats: ShardStats) -> None:
        """Take the totals of this run."""
        seconds = max(time.monotonic() - self._begin, 1e-3)
        # What an earlier attempt had generated is done, but no sign of this run's speed.
        rows, own_rows = self._done + stats.rows, stats.rows - stats.resumed_rows
        speed = (stats.output_tokens - stats.resumed_tokens) / seconds
        if self._bar is not None:
            # A lost replica's unfinished rows are done again, so the count can fall.
            self._bar.n = rows
            self._bar.set_postfix_str(f"{speed:.0f} tok/s, tau {stats.tau:.2f}, {stats.errors} errors")
        elif not self._is_quiet and time.monotonic() >= self._log_at:
            self._log_at = time.monotonic() + LOG_SECONDS
            log.info(
                "%d/%d rows, %.2f rows/s, %.0f tokens/s, tau %.2f, %d errors",
                *(rows, self._total, own_rows / seconds, speed, stats.tau, stats.errors),
                extra={"rows": rows, "num_rows": self._total, "tokens": stats.output_tokens, "errors": stats.errors},
            )
