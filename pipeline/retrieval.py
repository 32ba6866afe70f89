"""One round's retrieval: what can be had at once comes before drafting, the rest while the draft model works; so do
long lookups of this process where the model works on a device."""

from collections.abc import Sequence

from pipeline.forest import Forest, fuse_forests
from pipeline.proposal import Retriever, SlotView


class Retrieval:
    """Sends all lookups of a round, and takes the answers of those that are ready.

    Args:
        waits: take all answers at once, however long that takes.
        is_beside: the draft model works beside this process, which makes long lookups of its own meanwhile.

    Attributes:
        trees: what is known so far, one tree a view.
        is_beside: see above.
    """

    def __init__(
        self,
        retrievers: Sequence[Retriever],
        views: Sequence[SlotView],
        *,
        waits: bool = False,
        is_beside: bool = False,
    ) -> None:
        for retriever in retrievers:
            retriever.send(views)
        self._views = views
        self.is_beside = is_beside
        self._pending = list(retrievers)
        self.trees = Forest.empty(len(views))
        if waits:
            self.finish()
        else:
            self._take([one for one in retrievers if one.is_ready and not (is_beside and one.takes_long)])

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
