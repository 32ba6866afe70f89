"""The client of object stores against a real S3 server, with answers that get lost and settings that are wrong."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, GenericError

from actors import object_store
from actors.object_store import ObjectStore, ObjectStoreError, open_store
from jobs.storage import open_storage
from pipeline.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_PAUSES", (0.0, 0.0))


def once(monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any]) -> list[str]:
    """Let the next conditional write go to `fault(put, *arguments)`; returns the keys that it had."""
    put, hit = obstore.put, []

    def replaced(store: Any, key: str, data: bytes, **options: Any) -> Any:
        if hit or "mode" not in options:
            return put(store, key, data, **options)
        hit.append(key)
        return fault(put, store, key, data, **options)

    monkeypatch.setattr(obstore, "put", replaced)
    return hit


def lose_the_answer(put: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    put(*arguments, **options)
    raise GenericError("connection reset")


def conflict(put: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    raise AlreadyExistsError("409 ConditionalRequestConflict")


def test_create_writes_once_and_replace_only_what_was_read(uri: str) -> None:
    store = ObjectStore(uri)
    first = store.create("k", b"1")
    assert first is not None and store.create("k", b"2") is None
    second = store.replace("k", b"3", first)
    assert second is not None and store.replace("k", b"4", first) is None
    assert store.replace("absent", b"4", first) is None
    found = store.read("k")
    assert found is not None and (found.data, found.version) == (b"3", second)
    assert store.read("absent") is None and store.head("absent") is None
    store.remove(["k", "absent"])
    assert store.names() == []


@pytest.mark.parametrize("fault", [lose_the_answer, conflict])
def test_conditional_write_is_known_by_what_is_there(
    uri: str, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any]
) -> None:
    """The client reports a lost answer as an error, its own write on a second try as another's, and a 409 likewise."""
    store = ObjectStore(uri)
    with monkeypatch.context() as patch:
        assert once(patch, fault) == [] and store.create("k", b"mine") is not None
    found = store.read("k")
    assert found is not None and found.data == b"mine"
    with monkeypatch.context() as patch:
        once(patch, fault)
        replaced = store.replace("k", b"mine too", found.version)
    again = store.read("k")
    assert again is not None and (again.data == b"mine too") == (replaced is not None) == (fault is lose_the_answer)


def test_a_store_that_does_not_answer_is_an_error_that_says_so(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_RETRY_SECONDS", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    store = ObjectStore(uri)
    with pytest.raises(ObjectStoreError, match=r"cannot read s3://.*/k: .*127\.0\.0\.1:1"):
        store.read("k")
    with pytest.raises(ObjectStoreError, match=r"cannot write s3://.*/k: "):
        store.create("k", b"")


def test_a_conditional_write_is_not_tried_again_when_its_time_is_up(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client tries for a minute by itself; five times that kept a driver from ending."""
    tries: list[str] = []

    def unanswered(store: Any, key: str, data: bytes, **options: Any) -> Any:
        tries.append(key)
        raise GenericError("operation timed out")

    monkeypatch.setattr(obstore, "put", unanswered)
    for seconds, expected in ((60, 3), (-1, 1)):
        tries.clear()
        monkeypatch.setattr(object_store, "_RETRY_SECONDS", seconds)
        with pytest.raises(ObjectStoreError, match="operation timed out"):
            open_store(uri).create("k", b"")
        assert len(tries) == expected


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    for scheme, extra in {"s3": "s3", "gs": "gcs", "az": "azure"}.items():
        with pytest.raises(ConfigError, match=rf"needs the package obstore.*pip install '\.\[{extra}\]'"):
            ObjectStore(f"{scheme}://bucket/out")


def test_unknown_scheme_and_incomplete_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="hdfs://host/out is on no known kind of object store"):
        open_storage("hdfs://host/out")
    with pytest.raises(ConfigError, match=r"az://container/out cannot be used: .*Account must be specified"):
        open_storage("az://container/out")
