"""One round's retrieval: what can be had at once comes before drafting, the rest while the draft model works; all of it
does where the model works on a device."""

from collections.abc import Callable, Sequence

from pipeline.forest import Forest, fuse_forests
from pipeline.proposal import Retriever, SlotView


class Retrieval:
    """Sends all lookups of a round, and takes the answers of those that are ready.

    Args:
        prepare: called before any answer is taken.
        waits: take all answers at once, however long that takes.
        is_beside: the draft model works beside this process, which begins with the first `poll`.

    Attributes:
        trees: what is known so far, one tree a view.
        is_beside: see above.
    """

    def __init__(
        self,
        retrievers: Sequence[Retriever],
        views: Sequence[SlotView],
        prepare: Callable[[], None] = lambda: None,
        *,
        waits: bool = False,
        is_beside: bool = False,
    ) -> None:
        self._views = views
        self._prepare = prepare
        self.is_beside = is_beside
        self._has_begun = False
        self._pending = list(retrievers)
        self.trees = Forest.empty(len(views))
        if waits:
            self.finish()
        elif not is_beside:
            self.poll()

    def poll(self) -> bool:
        """Takes the answers that have come; whether there were any."""
        self._begin()
        ready = [retriever for retriever in self._pending if retriever.is_ready]
        self._take(ready)
        return bool(ready)

    def _begin(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            for retriever in self._pending:
                retriever.send(self._views)
            self._prepare()

    def finish(self) -> Forest:
        """Waits for the answers that are missing; returns the trees."""
        self._begin()
        self._take(list(self._pending))
        return self.trees

    def _take(self, retrievers: Sequence[Retriever]) -> None:
        for retriever in retrievers:
            self._pending.remove(retriever)
            self.trees = fuse_forests([self.trees, Forest.of(retriever.lookup(self._views))])
