"""Making segments: those that are complete are taken as they are, the others are ordered from a pool.

At most one segment a place of the pool is in flight, and one more waits in the driver: memory follows the size of a
segment, not that of the corpus.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from datastore.format import SegmentRecord
from jobs.segments.chunks import Wanted
from jobs.segments.pool import Order, Pool
from jobs.segments.store import StoreWriter
from jobs.segments.task import Built, Recipe
from jobs.signals import StopSignals

OpenPool = Callable[[], contextlib.AbstractContextManager[Pool]]


@dataclass(slots=True)
class Made:
    """What came of it.

    Attributes:
        records: by the segments' names, those taken as they are too.
        order: the names in the segments' order, those without a token included.
        num_kept: segments taken as they are.
        built: what this run made.
    """

    records: dict[str, SegmentRecord] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    num_kept: int = 0
    built: list[Built] = field(default_factory=list)

    @property
    def segments(self) -> tuple[SegmentRecord, ...]:
        """The segments there are now, in order."""
        return tuple(self.records[name] for name in self.order if name in self.records)


def make_segments(
    wanted: Iterable[Wanted],
    function: Callable[..., Built],
    recipe: Recipe,
    store: StoreWriter,
    open_pool: OpenPool,
    signals: StopSignals,
    show: Callable[[Made], None],
) -> Made:
    """Make what is missing of a run of segments, until a signal comes; the pool is opened for the first one.

    Args:
        wanted: in order, read as far as there is room; see `Wanted`. Each is an argument of `function`.
        function: `build_segment` or `merge_segment`.
        signals: listened to while the pool is open, as Ray sets handlers of its own when it starts.
        show: told of the state again and again.

    Raises:
        RasdError: a segment cannot be made; complete ones stay.
    """
    made = Made()
    with contextlib.ExitStack() as stack:
        pool: Pool | None = None
        for chunk in wanted:
            show(made)
            made.order.append(chunk.name)
            if (record := store.finished(chunk.name)) is not None:
                made.records[chunk.name] = record
                made.num_kept += 1
                continue
            if pool is None:
                pool = stack.enter_context(open_pool())
                stack.enter_context(signals)
                recipe = replace(
                    recipe, num_threads=pool.room.num_threads, device="cuda" if pool.room.num_gpus else "cpu"
                )
            while pool.pending >= pool.room.capacity and signals.received is None:
                _collect(pool, store, made)
                show(made)
            if signals.received is not None:
                return made
            pool.submit(Order(chunk.name, function, (recipe, chunk), store.work_directory(chunk.name)))
            del chunk  # the pool has it now
        while pool is not None and pool.pending and signals.received is None:
            _collect(pool, store, made)
            show(made)
    return made


def _collect(pool: Pool, store: StoreWriter, made: Made) -> None:
    for order, built in pool.done():
        if built.record is not None:
            store.promote(order.name)
            made.records[order.name] = built.record
        made.built.append(built)
