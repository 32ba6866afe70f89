"""The search for the row of a shard that ends every replica it is given to.

Halves of the shard are tried alone until one row is left, which has to end a replica by itself before it is blamed.
Each try costs at most one replica; a shard of n rows takes about log2(n) + 1 of them.
"""

from dataclasses import dataclass, replace

from actors.rows import InputRow, RowFailure


@dataclass(frozen=True, slots=True)
class Search:
    """A guilty row is among `rows[low:high]` of a shard; `rows[low:end]` are being tried.

    Attributes:
        rows: of the whole shard.
    """

    rows: tuple[InputRow, ...]
    low: int
    high: int
    end: int

    @staticmethod
    def over(rows: tuple[InputRow, ...]) -> "Search":
        """The first try of a shard."""
        return Search(rows, 0, len(rows), 0)._next()

    @property
    def tried(self) -> tuple[InputRow, ...]:
        """The rows that go to a replica."""
        return self.rows[self.low : self.end]

    @property
    def is_last(self) -> bool:
        """Whether a single row is tried: what it does decides."""
        return self.high - self.low == 1

    def ended_replica(self) -> "Search":
        """The rows tried ended their replica, and were more than one."""
        return replace(self, high=self.end)._next()

    def came_through(self) -> "Search":
        """They did not, and were not all."""
        return replace(self, low=self.end)._next()

    def blamed(self, kills: int) -> tuple[InputRow, ...]:
        """The shard with its guilty row, the only one left, made an error row."""
        row = self.rows[self.low]
        message = (
            f"This row ended {kills} replicas, the last one alone. Look for what needs more memory than a replica has,"
            " such as a very long prompt; shorten it, or lower --slots, and give it to another job."
        )
        guilty = replace(row, error=RowFailure("killed_replica", message))
        return (*self.rows[: self.low], guilty, *self.rows[self.low + 1 :])

    def _next(self) -> "Search":
        middle = (self.low + self.high) // 2
        return replace(self, end=self.high if self.is_last else middle)
