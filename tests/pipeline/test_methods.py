"""Methods by name: with what a job has, with some sources only, and clear errors for the rest."""

import pytest

from pipeline.errors import ConfigError
from pipeline.methods import METHODS, method_named
from pipeline.rules import Calibrated, FixedPruning


def test_auto_is_rasd_with_what_there_is() -> None:
    method = method_named("auto", {"live"})
    assert (method.name, method.sources, method.lacks) == ("rasd", ("context", "live"), ("draft", "passages", "corpus"))
    assert method.rule is Calibrated
    assert method_named("auto", {"draft", "corpus", "passages", "live"}).sources == METHODS["rasd"].sources


def test_a_method_can_be_left_with_some_of_its_sources() -> None:
    method = method_named("rasd-fixed@context+draft")
    assert (method.name, method.sources) == ("rasd-fixed@draft+context", ("draft", "context"))
    assert method.rule is FixedPruning
    assert method_named(method.name, {"draft"}) == method, "a replica is told this name"
    assert method_named("rasd@context+corpus", {"draft"}).sources == ("context",)


@pytest.mark.parametrize("name", ["rsad", "", "context@corpus", "rasd@", "rasd@draft+passage", "rasd@draft,context"])
def test_what_is_no_method_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--method is"):
        method_named(name)


@pytest.mark.parametrize("name", ["draft", "corpus", "rasd@corpus"])
def test_a_method_with_nothing_to_draft_from_names_what_is_missing(name: str) -> None:
    with pytest.raises(ConfigError, match=r"which needs --(draft|datastore)"):
        method_named(name, {"live"})
