"""Methods by name: which drafter and which retrievers work together. Named configurations, not code paths."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pipeline.acceptance import AcceptanceTable
from pipeline.context import ContextRetriever
from pipeline.errors import ConfigError
from pipeline.proposal import Drafter, NullDrafter, Retriever
from pipeline.search import Searcher, SearchRetriever

# Sources that search text outside the request, and the option that provides them.
PROVIDED_BY = {"passages": "--datastore", "corpus": "--datastore", "live": "--live on"}


@dataclass(frozen=True, slots=True)
class Method:
    """A way of drafting.

    Attributes:
        name: as in flags, tables and reports.
        summary: one line for help texts.
        sources: retrieval sources it uses, see `pipeline.tree.SOURCES`.
        lacks: those of its sources that this job does not have.
    """

    name: str
    summary: str
    sources: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What it lacks, one line for the user; none if it lacks nothing."""
        if not self.lacks:
            return ()
        options = dict.fromkeys(PROVIDED_BY[source] for source in self.lacks)
        return (f"method {self.name} without {', '.join(self.lacks)}: give {' and '.join(options)} for more speed",)


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
        Method("corpus", "trees of what followed them in the datastore's corpora", ("corpus",)),
        Method(
            "retrieval",
            "trees from the context, the passages nearest to the prompt, the corpora, and the job's own outputs",
            ("context", "passages", "corpus", "live"),
        ),
    )
}
BEST_METHOD = "retrieval"


def build(method: Method, acceptance: AcceptanceTable, searchers: Sequence[Searcher] = ()) -> Proposers:
    """The drafter and retrievers of a method.

    Args:
        searchers: of the sources that search text outside the request.
    """
    retrievers: list[Retriever] = []
    if "context" in method.sources:
        retrievers.append(ContextRetriever(acceptance))
    if searchers:
        retrievers.append(SearchRetriever(searchers, acceptance))
    return Proposers(NullDrafter(), tuple(retrievers))


def method_named(name: str, provided: Collection[str] = tuple(PROVIDED_BY)) -> Method:
    """The method called `name`, or the best there is for `auto`.

    Args:
        provided: which sources of `PROVIDED_BY` the job has; the method comes without the others.

    Raises:
        ConfigError: there is none of that name, or the job has nothing for it to search.
    """
    chosen = METHODS.get(BEST_METHOD if name == "auto" else name)
    if chosen is None:
        raise ConfigError(f"--method is {name!r}; it must be auto or one of {', '.join(METHODS)}.")
    lacks = tuple(source for source in chosen.sources if source in PROVIDED_BY and source not in provided)
    if lacks and lacks == chosen.sources:
        raise ConfigError(f"--method is {name!r}, which needs {PROVIDED_BY[lacks[0]]}; give it, or choose another.")
    return Method(chosen.name, chosen.summary, tuple(s for s in chosen.sources if s not in lacks), lacks)
