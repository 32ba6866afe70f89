"""How far a datastore is, on stderr: a bar on a terminal, else a log line now and then."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from jobs.logs import is_json
from jobs.progress import LOG_SECONDS
from jobs.segments.making import Made

log = logging.getLogger(__name__)


class SegmentProgress:
    """Shows sources read and segments made; how many segments there will be is known only at the end.

    Args:
        total: sources to be read.
        is_quiet: show nothing.
    """

    def __init__(self, total: int, *, is_quiet: bool) -> None:
        self._total = total
        self._is_quiet = is_quiet
        self._begin = time.monotonic()
        self._log_at = self._begin + LOG_SECONDS
        self._bar: tqdm[NoReturn] | None = None

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """From here on there is something to see."""
        if self._is_quiet or is_json() or not sys.stderr.isatty():
            yield
            return
        with tqdm(total=self._total, unit="source", dynamic_ncols=True) as self._bar, logging_redirect_tqdm():
            yield
        self._bar = None

    def show(self, num_read: int, documents: int, made: Made) -> None:
        """Take the state.

        Args:
            num_read: sources read to the end.
            documents: read so far.
        """
        tokens = sum(built.record.tokens for built in made.built if built.record is not None)
        speed = tokens / max(time.monotonic() - self._begin, 1e-3)
        text = f"{documents} documents, {len(made.built)} segments, {tokens / 1e6:.1f}M tokens, {speed:.0f} tokens/s"
        if self._bar is not None:
            self._bar.n = num_read
            self._bar.set_postfix_str(text)
        elif not self._is_quiet and time.monotonic() >= self._log_at:
            self._log_at = time.monotonic() + LOG_SECONDS
            log.info("%d/%d sources read, %s", num_read, self._total, text)
