"""One round's retrieval: what can be had at once comes before drafting, the rest while the draft model works."""

from collections.abc import Sequence

from pipeline.forest import Forest, fuse_forests
from pipeline.proposal import Retriever, SlotView


class Retrieval:
    """Sends all lookups of a round, and takes the answers of those that are ready.

    Args:
        waits: take all answers at once, however long that takes.

    Attributes:
        trees: what is known so far, one tree a view.
    """

    def __init__(self, retrievers: Sequence[Retriever], views: Sequence[SlotView], *, waits: bool = False) -> None:
        for retriever in retrievers:
            retriever.send(views)
        self._views = views
        self._pending = list(retrievers)
        self.trees = Forest.empty(len(views))
        if waits:
            self.finish()
        else:
            self.poll()

    def poll(self) -> bool:
        """Takes the answers that have come; whether there were any."""
        ready = [retriever for retriever in self._pending if retriever.is_ready]
        self._take(ready)
        return bool(ready)

    def finish(self) -> Forest:
        """Waits for the answers that are missing; returns the trees."""
        self._take(list(self._pending))
        return self.trees

    def _take(self, retrievers: Sequence[Retriever]) -> None:
        for retriever in retrievers:
            self._pending.remove(retriever)
            self.trees = fuse_forests([self.trees, Forest.of(retriever.lookup(self._views))])
