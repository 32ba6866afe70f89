"""Methods by name: which drafter and which retrievers work together. Named configurations, not code paths."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from pipeline.acceptance import AcceptanceTable
from pipeline.context import ContextRetriever
from pipeline.economy import Economy
from pipeline.errors import ConfigError
from pipeline.proposal import Drafter, NullDrafter, Retriever
from pipeline.rules import Calibrated, FixedPruning, Rule, Switch
from pipeline.search import Searcher, SearchRetriever

# Sources that need more than the request, and the option that provides them.
PROVIDED_BY = {"draft": "--draft", "passages": "--datastore", "corpus": "--datastore", "live": "--live on"}


@dataclass(frozen=True, slots=True)
class Method:
    """A way of drafting.

    Attributes:
        name: as in flags, tables and reports.
        summary: one line for help texts.
        sources: who proposes, see `pipeline.tree.SOURCES`.
        lacks: those of its sources that this job does not have.
        rule: how draft and retrieved trees are joined.
    """

    name: str
    summary: str
    sources: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    rule: type[Rule] = Rule

    @property
    def notes(self) -> tuple[str, ...]:
        """What it lacks, one line for the user; none if it lacks nothing."""
        if not self.lacks:
            return ()
        options = dict.fromkeys(PROVIDED_BY[source] for source in self.lacks)
        return (f"method {self.name} works without {' and '.join(self.lacks)}; see {' and '.join(options)}",)


@dataclass(frozen=True, slots=True)
class Proposers:
    """A method's parts, ready for an engine."""

    drafter: Drafter
    retrievers: tuple[Retriever, ...]
    rule: Rule = field(default_factory=Rule)


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
        Method("draft", "trees of a draft model", ("draft",)),
        Method(
            "switch",
            "SAM-Decoding's rule: a chain of what followed a match of 5 tokens or more, else the draft model's tree",
            ("draft", "context", "corpus"),
            rule=Switch,
        ),
        Method(
            "rasd-fixed",
            "RASD as published: what all sources propose, pruned by the draft model, fused with its tree",
            ("draft", "context", "passages", "corpus", "live"),
            rule=FixedPruning,
        ),
        Method(
            "rasd",
            "all sources on one scale of estimated acceptance learned on the way, drafting only as far as it pays",
            ("draft", "context", "passages", "corpus", "live"),
            rule=Calibrated,
        ),
    )
}


def build(
    method: Method,
    acceptance: AcceptanceTable,
    vocab_size: int,
    searchers: Sequence[Searcher] = (),
    drafter: Drafter | None = None,
    economy: Economy | None = None,
) -> Proposers:
    """The drafter and retrievers of a method.

    Args:
        vocab_size: of the target.
        searchers: of the sources that search text outside the request.
        drafter: of the source `draft`.
        economy: decides how far to draft where the budget is tuned.
    """
    retrievers: list[Retriever] = []
    if "context" in method.sources:
        retrievers.append(ContextRetriever(acceptance))
    if searchers:
        retrievers.append(SearchRetriever(searchers, acceptance, vocab_size))
    return Proposers(drafter or NullDrafter(), tuple(retrievers), method.rule.for_engine(economy))


def method_named(name: str, provided: Collection[str] = tuple(PROVIDED_BY)) -> Method:
    """The method called `name`; `auto` is `rasd` with what there is.

    Args:
        name: `METHOD@SOURCE+SOURCE` leaves it with these sources only, for comparisons.
        provided: which sources of `PROVIDED_BY` there are; the method comes without the others.

    Raises:
        ConfigError: there is none of that name, it has no such source, or the job has nothing for it to search.
    """
    base, at, only = name.partition("@")
    chosen = METHODS.get("rasd" if base == "auto" else base)
    if chosen is None:
        raise ConfigError(f"--method is {name!r}; it must be auto or one of {', '.join(METHODS)}.")
    if at:
        wanted = only.split("+")
        if not set(wanted) <= set(chosen.sources):
            raise ConfigError(
                f"--method is {name!r}; behind the @ may stand {'+'.join(chosen.sources)} or some of them."
            )
        sources = tuple(source for source in chosen.sources if source in wanted)
        chosen = replace(chosen, name=f"{chosen.name}@{'+'.join(sources)}", sources=sources)
    lacks = tuple(source for source in chosen.sources if source in PROVIDED_BY and source not in provided)
    if lacks and lacks == chosen.sources:
        raise ConfigError(f"--method is {name!r}, which needs {PROVIDED_BY[lacks[0]]}; give it, or choose another.")
    sources = tuple(source for source in chosen.sources if source not in lacks)
    return replace(chosen, sources=sources, lacks=lacks)
