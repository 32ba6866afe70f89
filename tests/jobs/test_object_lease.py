"""The lease of an output on a real S3 server: one live driver, whatever the store's answers and the other hosts do."""

import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

import obstore
import pytest

from actors.object_store import ObjectStore, ObjectStoreError, Version, open_store
from jobs import object_lease
from jobs.commit import CommitLog, read_commits
from jobs.object_lease import LEASE, ObjectLease
from jobs.storage import open_storage
from pipeline.errors import ConfigError, JobError
from tests.jobs.parts import write_part
from tests.jobs.test_object_store import ROOT


def test_live_driver_keeps_others_out_and_releases_its_lease(uri: str) -> None:
    storage = open_storage(uri)
    with storage.lease(), pytest.raises(ConfigError, match=f"{uri} is in use by process {os.getpid()} on "):
        assert storage.holder() is not None
        storage.lease()
    assert storage.holder() is None
    with storage.lease() as lease, lease.held():
        pass


def test_lease_of_a_killed_driver_is_taken_over_at_once(uri: str) -> None:
    script = "import os, sys, jobs.storage as s; s.open_storage(sys.argv[1]).lease(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script, uri], cwd=ROOT, timeout=60, check=False)
    assert json.loads(open_storage(uri).read(LEASE) or b"")["released"] is False
    with open_storage(uri).lease() as lease, lease.held():
        pass


def elsewhere() -> bytes:
    return json.dumps({"token": "t", "host": "elsewhere", "pid": 1, "started": "never"}).encode()


def test_lease_of_another_host_is_taken_over_once_it_is_stale(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(uri).write(LEASE, elsewhere())
    with pytest.raises(ConfigError, match="in use by process 1 on elsewhere"):
        open_storage(uri).lease()
    monkeypatch.setattr(object_lease, "STALE_SECONDS", -1.0)
    with open_storage(uri).lease():
        assert json.loads(open_storage(uri).read(LEASE) or b"")["pid"] == os.getpid()


def test_of_two_that_take_a_stale_lease_over_one_gets_it(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second writes between the first one's look at the stale lease and its write."""
    store = open_store(uri)
    store.write(LEASE, elsewhere())
    put = obstore.put

    def overtaken(handle: Any, key: str, data: bytes, **options: Any) -> Any:
        if key == LEASE and "mode" in options:
            monkeypatch.setattr(obstore, "put", put)
            monkeypatch.setattr(object_lease, "STALE_SECONDS", 30.0)
            put(handle, key, json.dumps({"token": "u", "host": "there", "pid": 2, "started": "now"}).encode())
        return put(handle, key, data, **options)

    monkeypatch.setattr(object_lease, "STALE_SECONDS", -1.0)
    monkeypatch.setattr(obstore, "put", overtaken)
    with pytest.raises(ConfigError, match="in use by process 2 on there"):
        ObjectLease(store)


def test_driver_that_lost_its_lease_cannot_commit(uri: str) -> None:
    storage = open_storage(uri)
    with storage.lease() as lease:
        log = CommitLog(storage, lease)
        log.open()
        result = write_part(log, 0)
        open_store(uri).write(LEASE, elsewhere())
        with pytest.raises(JobError, match="taken over by process 1 on elsewhere"):
            log.commit(result)
    assert list(read_commits(storage)) == []
    assert open_storage(uri).read(LEASE) == elsewhere(), "not released by one who has lost it"


def test_driver_that_could_not_renew_its_lease_must_before_it_commits(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_lease, "MARGIN_SECONDS", object_lease.STALE_SECONDS + 1)
    storage = open_storage(uri)
    with storage.lease() as lease:
        before = storage.read(LEASE)
        with lease.held():
            assert storage.read(LEASE) != before


def test_heartbeat_renews_the_lease_even_when_it_is_not_known_whether_it_did(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_lease, "HEARTBEAT_SECONDS", 0.01)
    storage = open_storage(uri)
    replace, failed = ObjectStore.replace, []

    def fails_once(self: ObjectStore, key: str, data: bytes, version: Version) -> Version | None:
        done = replace(self, key, data, version)
        if not failed:
            failed.append(json.loads(data)["beat"])
            raise ObjectStoreError("no answer")
        return done

    with storage.lease() as lease:
        monkeypatch.setattr(ObjectStore, "replace", fails_once)
        deadline = time.monotonic() + 20
        while not failed or json.loads(storage.read(LEASE) or b"{}")["beat"] < failed[0] + 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with lease.held():
            assert storage.holder() is not None
    assert storage.holder() is None


def test_lease_whose_last_renewal_was_not_answered_is_released(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version that it knows is not the newest: the release went to nobody, and kept others out for 30 s."""
    storage = open_storage(uri)
    with storage.lease():
        found = open_store(uri).read(LEASE)
        assert found is not None
        open_store(uri).write(LEASE, found.data + b" ")
    assert storage.holder() is None
    assert json.loads(storage.read(LEASE) or b"")["released"] is True


def test_lease_that_is_another_drivers_is_not_released_and_that_is_said(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    storage = open_storage(uri)
    with storage.lease():
        open_store(uri).write(LEASE, elsewhere())
    assert f"the lease {uri}/{LEASE} was not ours any more" in caplog.text
    assert storage.read(LEASE) == elsewhere()


def test_a_store_that_hangs_does_not_keep_a_driver_from_ending(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(object_lease, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(object_lease, "JOIN_SECONDS", 0.1)
    hangs, goes_on = threading.Event(), threading.Event()
    replace = ObjectStore.replace

    def hanging(self: ObjectStore, key: str, data: bytes, version: Version) -> Version | None:
        hangs.set()
        assert goes_on.wait(60)
        return replace(self, key, data, version)

    storage = open_storage(uri)
    with storage.lease():
        monkeypatch.setattr(ObjectStore, "replace", hanging)
        assert hangs.wait(20)
    assert "the lease is not released, and keeps others out for 30 s" in caplog.text
    goes_on.set()
