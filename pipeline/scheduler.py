"""Who is in a slot and what each brings to the round: admission, prefill chunks, pages, and who gives way.

Requests join and leave at any round. Pages follow actual lengths; when they run out the youngest slot is requeued, its
output so far kept. A prompt prefix that another slot is just computing is waited for, not computed twice.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.forest import Forest
from pipeline.packing import LONG_CHAIN, Runs
from pipeline.pages import ChainKey, PagePool, block_table
from pipeline.proposal import Drafter, NullDrafter, Retriever
from pipeline.slots import Slot

MIN_CHUNK = 32  # prefill tokens a round below which `Scheduler.halve` does not go


@dataclass(frozen=True, slots=True)
class Work:
    """A round's part of S slots, side by side: those that decode, then chunks of prompts, long ones last.

    Attributes:
        slots: [S].
        trees: [S] what is verified below the root of each; nothing in prefill.
        runs: [S] what the pass computes of each.
    """

    slots: Sequence[Slot]
    trees: Forest
    runs: Runs

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def num_rows(self) -> int:
        """Rows of the round's pass."""
        return int(self.runs.lengths.sum())

    @property
    def num_prefill(self) -> int:
        """How many of them belong to slots in prefill."""
        return int(self.runs.num_known[self.runs.num_known > 1].sum())


class Scheduler:
    """Slots, waiting requests and the page pool.

    Attributes:
        num_slots: requests in the engine at a time, as it is now.

    Args:
        num_slots: as it is at first.
        pool: page bookkeeping; must hold the longest possible sequence.
        prefill_chunk: most prefill tokens a round, over all slots.
        retrievers: told who comes, grows and goes.
        drafter: told who goes.
    """

    def __init__(
        self,
        num_slots: int,
        pool: PagePool,
        prefill_chunk: int,
        retrievers: Sequence[Retriever],
        drafter: Drafter | None = None,
    ) -> None:
        self.pool = pool
        self._prefill_chunk = prefill_chunk
        self._retrievers = retrievers
        self._drafter = drafter or NullDrafter()
        self.num_slots = num_slots
        self._free = list(range(num_slots))[::-1]
        self._waiting: deque[Slot] = deque()
        self._active: list[Slot] = []  # by admission order, oldest first
        self._admitted = 0
        self._most = num_slots  # requests for which there were pages when last one was to come in
        self._copies: dict[int, tuple[int, int, int]] = {}  # slot number -> copy to make before the next forward pass

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._active)

    @property
    def active(self) -> list[Slot]:
        """Slots with a request, by admission order, oldest first."""
        return list(self._active)

    @property
    def num_under_way(self) -> int:
        """Requests in slots once `admit` has let in as many as it can, as far as that is known."""
        others = min(len(self._waiting), len(self._free), max(self._most - len(self._active), 0))
        return len(self._active) + others

    def submit(self, slot: Slot) -> None:
        """Queues a new request."""
        self._waiting.append(slot)

    def admit(self) -> None:
        """Moves waiting requests into free slots while their known tokens find pages."""
        self._most = self.num_slots
        while self._waiting and self._free:
            slot = self._waiting[0]
            slot.cached = self.pool.share(slot.pages, slot.known, 0)  # copies wait until the slot is sure
            needed = self.pool.pages_for(slot.length + 1) - len(slot.pages.pages)
            missing = (self.pool.pages_for(other.length + 1) - len(other.pages.pages) for other in self._active)
            promised = sum(max(0, pages) for pages in missing)
            if self._active and needed + promised > self.pool.num_idle:
                self._evict_pages(slot)
                self._most = len(self._active)
                return
            self._waiting.popleft()
            slot.number = self._free.pop()
            slot.order = self._admitted
            slot.is_followed = True
            self._admitted += 1
            self._active.append(slot)
            for retriever in self._retrievers:
                retriever.admit(slot.number, slot.known, slot.request.passages)

    def decoding(self) -> list[Slot]:
        """Slots that can use a tree: output has begun, and all known tokens but the root are cached."""
        return [slot for slot in self._active if slot.is_decoding and slot.num_output > 0]

    def prefill_rows(self) -> int:
        """Prompt tokens that this round's chunks will hold, if none of them can be shared."""
        return min(self._prefill_chunk, sum(slot.num_pending for slot in self._active if not slot.is_decoding))

    def plan(self, numbers: Sequence[int], trees: Forest) -> Work:
        """The round's runs: a root and its tree for decoding slots, chunks for the others.

        Args:
            trees: of the slots with these numbers; others that decode bring their root alone.
        """
        decoding, own = self._decode(numbers, trees)
        chunks = self._chunks()
        if not decoding and not chunks and self._active:
            self._requeue(self._active[-1])  # every slot waits for pages: the youngest gives its own
            return self.plan(numbers, trees)
        chunks.sort(key=lambda chunk: len(chunk[1]) >= LONG_CHAIN)
        slots, known = [*decoding, *(slot for slot, _ in chunks)], [tokens for _, tokens in chunks]
        num_known = np.array([1] * len(decoding) + [len(tokens) for tokens in known], np.int64)
        own = own.followed_by_empty(len(chunks))
        cached = np.array([slot.cached for slot in slots], np.int32)
        runs = Runs(
            known=np.concatenate([np.array([slot.tokens[slot.cached] for slot in decoding], np.int32), *known]),
            tokens=own.tokens,
            parents=own.parents,
            num_known=num_known,
            num_nodes=np.diff(own.begins),
            num_done=np.zeros(len(slots), np.int32),
            cached=cached,
            wants_logits=cached + num_known == [slot.length for slot in slots],
            block_table=block_table([slot.pages for slot in slots]),
        )
        return Work(slots, own, runs)

    def _decode(self, numbers: Sequence[int], trees: Forest) -> tuple[list[Slot], Forest]:
        """The slots that decode, and their trees, for which there are pages then."""
        pool, places = self.pool, {number: place for place, number in enumerate(numbers)}
        for slot in [slot for slot in self._active if slot.is_decoding]:  # roots first: trees take what is left
            while slot.number >= 0 and not pool.grow(slot.pages, slot.cached + 1):
                self._requeue(self._active[-1])
        decoding = [slot for slot in self._active if slot.is_decoding]
        own = trees.taken([places.get(slot.number, -1) for slot in decoding])
        keep: np.ndarray | None = None
        for slot, begin, end in zip(decoding, own.begins[:-1].tolist(), own.begins[1:].tolist(), strict=True):
            if not pool.grow(slot.pages, slot.cached + 1 + end - begin):
                # Nodes come parents first, so those that find no room can go.
                room = (len(slot.pages.pages) + pool.num_idle) * pool.page_size - slot.cached - 1
                keep = np.ones(own.num_nodes, np.bool_) if keep is None else keep
                keep[begin + room : end] = False
                pool.grow(slot.pages, slot.cached + 1 + room)
        return decoding, own if keep is None else own.pruned(keep)

    def _chunks(self) -> list[tuple[Slot, np.ndarray]]:
        """The known tokens that each slot in prefill computes next."""
        chunks: list[tuple[Slot, np.ndarray]] = []
        chunk_left = self._prefill_chunk
        computing: set[ChainKey] = set()
        for slot in self._active:
            if slot.is_decoding or chunk_left <= 0:
                continue
            slot.cached = self.pool.share(slot.pages, slot.known, slot.cached)
            key = self.pool.next_key(slot.pages, slot.known)
            if key in computing:  # the whole page can be shared next round, which is better than copying a part
                continue
            self._borrow(slot)
            size = min(chunk_left, slot.num_pending)
            if not self.pool.grow(slot.pages, slot.cached + size):
                size = min(size, (len(slot.pages.pages) + self.pool.num_idle) * self.pool.page_size - slot.cached)
                if size <= 0 or not self.pool.grow(slot.pages, slot.cached + size):
                    continue
            if key is not None:
                computing.add(key)
            chunk_left -= size
            chunks.append((slot, slot.known[slot.cached : slot.cached + size]))
        return chunks

    def _borrow(self, slot: Slot) -> None:
        """Copies what another page has in common with the slot's next one, if that is worth it."""
        copy = self.pool.borrow(slot.pages, slot.known, slot.cached)
        if copy is not None:
            self._copies[slot.number] = copy
            slot.cached += copy[2]

    def take_copies(self) -> tuple[np.ndarray, np.ndarray]:
        """Pool token indices to copy from and to, [n] int64 each, before the planned runs are computed."""
        copies = list(self._copies.values())
        self._copies.clear()
        spans = [np.arange(n) for _, _, n in copies]
        sources = [source + span for (source, _, _), span in zip(copies, spans, strict=True)]
        targets = [target + span for (_, target, _), span in zip(copies, spans, strict=True)]
        empty = np.empty(0, np.int64)
        return np.concatenate([empty, *sources]), np.concatenate([empty, *targets])

    def finish(self, slot: Slot) -> None:
        """The request is done: its slot and pages are free, its pages findable while memory lasts."""
        self._leave(slot)

    def forget(self) -> None:
        """Makes no page findable any more; no slot may hold one, and those that wait never do."""
        assert not self._active
        self.pool = PagePool(self.pool.num_pages, self.pool.page_size)

    def halve(self) -> bool:
        """After a round that failed anywhere: requeues all requests, for half as many slots and prefill tokens.

        Returns:
            False, and nothing changes, if there is nothing left to halve.
        """
        if self.num_slots == 1 and self._prefill_chunk <= MIN_CHUNK:
            return False
        for slot in self._active[::-1]:
            self._requeue(slot)
        self.forget()  # what the failed round published may never have been written
        self.num_slots = max(self.num_slots // 2, 1)
        self._most = self.num_slots
        self._prefill_chunk = max(self._prefill_chunk // 2, min(self._prefill_chunk, MIN_CHUNK))
        self._free = list(range(self.num_slots))[::-1]
        return True

    def _requeue(self, slot: Slot) -> None:
        slot.num_requeues += 1
        self._leave(slot)
        self._waiting.appendleft(slot)

    def _leave(self, slot: Slot) -> None:
        self._active.remove(slot)
        self._copies.pop(slot.number, None)
        self._free.append(slot.number)
        for retriever in self._retrievers:
            retriever.release(slot.number)
        self._drafter.release(slot.number)
        slot.number = -1
        self._evict_pages(slot)

    def _evict_pages(self, slot: Slot) -> None:
        self.pool.release(slot.pages)
        slot.cached = 0
