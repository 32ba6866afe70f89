"""How far the job is, on stderr: a bar on a terminal, else a log line now and then."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from actors.rows import ShardStats

LOG_SECONDS = 30.0

log = logging.getLogger(__name__)


class Progress:
    """Shows output rows done and the speed of this run; a context manager.

    Args:
        total: output rows of the job; done: those committed by earlier runs.
        is_quiet: show nothing.
    """

    def __init__(self, total: int, done: int, *, is_quiet: bool) -> None:
        self._total = total
        self._done = done
        self._start = time.monotonic()
        self._log_at = self._start + LOG_SECONDS
        self._is_quiet = is_quiet
        is_shown = not is_quiet and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit="row", dynamic_ncols=True) if is_shown else None
        self._redirect = logging_redirect_tqdm()

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._redirect.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._redirect.__exit__(kind, error, trace)

    def show(self, stats: ShardStats) -> None:
        """Take the totals of this run."""
        seconds = time.monotonic() - self._start
        rows, speed = self._done + stats.rows, stats.output_tokens / seconds
        if self._bar is not None:
            # A lost replica's unfinished rows are done again, so the count can fall.
            self._bar.n = rows
            self._bar.set_postfix_str(f"{speed:.0f} tok/s, tau {stats.tau:.2f}, {stats.errors} errors")
        elif not self._is_quiet and time.monotonic() >= self._log_at:
            self._log_at = time.monotonic() + LOG_SECONDS
            log.info(
                "%d/%d rows, %.2f rows/s, %.0f tokens/s, tau %.2f, %d errors",
                rows,
                self._total,
                stats.rows / seconds,
                speed,
                stats.tau,
                stats.errors,
            )
