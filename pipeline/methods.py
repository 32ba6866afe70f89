"""Methods by name: which drafter and which retrievers work together. Named configurations, not code paths."""

from dataclasses import dataclass

from pipeline.acceptance import AcceptanceTable
from pipeline.context import ContextRetriever
from pipeline.errors import ConfigError
from pipeline.proposal import Drafter, NullDrafter, Retriever


@dataclass(frozen=True, slots=True)
class Method:
    """A way of drafting.

    Attributes:
        name: as in flags, tables and reports.
        summary: one line for help texts.
        sources: retrieval sources it uses, see `pipeline.tree.SOURCES`.
        lacks: one line each, for the user: what would make it faster.
    """

    name: str
    summary: str
    sources: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Proposers:
    """A method's parts, ready for an engine."""

    drafter: Drafter
    retrievers: tuple[Retriever, ...]


METHODS = {
    method.name: method
    for method in (
        Method("plain", "the target alone, one token a round"),
        Method("context", "trees of what followed the last tokens earlier in prompt and output", ("context",)),
    )
}
BEST_METHOD = "context"


def build(method: Method, acceptance: AcceptanceTable) -> Proposers:
    """The drafter and retrievers of a method."""
    retrievers = {"context": ContextRetriever}
    return Proposers(NullDrafter(), tuple(retrievers[source](acceptance) for source in method.sources))


def method_named(name: str) -> Method:
    """The method called `name`, or the best there is for `auto`.

    Raises:
        ConfigError: there is none of that name.
    """
    chosen = METHODS.get(BEST_METHOD if name == "auto" else name)
    if chosen is None:
        raise ConfigError(f"--method is {name!r}; it must be auto or one of {', '.join(METHODS)}.")
    return chosen
