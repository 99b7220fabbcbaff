"""Holding a sweep in an object store: against moto's S3, with drivers in processes of their own."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import pytest
import s3fs

from jmedlora.config import clock
from jmedlora.config.compose import load_sweep
from jmedlora.config.faults import BadInput
from jmedlora.orchestrator.ledger import HeldByAnother
from jmedlora.orchestrator.lock_objects import StoreUnusable
from jmedlora.orchestrator.locks import sweep_lock
from jmedlora.orchestrator.object_lock import object_lock
from tests.integration.mlflow_servers import free_port
from tests.integration.object_store import BUCKET, CREDENTIALS, Driver, Fault, Store, stop_all

SHORT_S, LONG_S = 2.0, 60.0
"""A hold that ends while a test waits, and one that does not."""


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.kill()


@pytest.fixture(autouse=True)
def _reached_from_here(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": store.endpoint}.items():
        monkeypatch.setenv(name, value)
    yield
    store.behaves()


@pytest.fixture(scope="module")
def _pool(store: Store) -> Iterator[list[Driver]]:
    drivers: list[Driver] = []
    yield drivers
    stop_all(drivers)


@pytest.fixture
def drivers(store: Store, _pool: list[Driver]) -> list[Driver]:
    """Two that hold nothing."""
    alive = [driver for driver in _pool if driver.is_alive()]
    fresh = [Driver(store) for _ in range(2 - len(alive))]
    assert [driver.told() for driver in fresh] == ["ready"] * len(fresh)
    _pool[:] = alive + fresh
    for driver in alive:
        driver.forget()
    return _pool


@pytest.fixture
def ledger() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}/ledger"


def refuse(why: str) -> None:
    raise AssertionError(f"lost: {why}")


def the_files() -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(use_listings_cache=False)


def written(ledger: str, generation: int) -> datetime:
    """When, by the store's clock, a lock object was written last."""
    time_told: datetime = the_files().info(f"{ledger}/driver-{generation:06d}.json")["LastModified"]
    return time_told


def stored(ledger: str) -> dict[str, dict[str, object]]:
    """name -> content, of every object of a ledger."""
    files = the_files()
    return {path.rpartition("/")[2]: json.loads(files.cat_file(path)) for path in files.find(ledger)}


def test_of_two_that_race_one_wins(drivers: list[Driver], ledger: str) -> None:
    first, second = drivers
    for race in range(1, 16):
        for driver in drivers:
            driver.ask(ledger=ledger, expires_s=LONG_S)
        told = {driver: driver.told() for driver in drivers}
        (winner,) = [driver for driver in drivers if told[driver] == "held"]
        (loser,) = {first, second} - {winner}
        assert told[loser].startswith(f"refused: held by process {winner.pid} on ")
        # the loser may have come so late that a clock object is there
        assert [name for name in stored(ledger) if "clock" not in name][-1] == f"driver-{race:06d}.json"
        assert winner.release() == "released"
    assert list(stored(ledger)) == ["driver-000015.json"]
    assert stored(ledger)["driver-000015.json"]["released"] is True


def test_a_killed_holder_is_succeeded_when_its_hold_has_ended_and_not_before(drivers: list[Driver], ledger: str) -> None:
    killed, next_one = drivers
    assert killed.acquire(ledger, SHORT_S) == "held"
    killed.kill()
    refusals = next_one.acquire_in_the_end(ledger, SHORT_S)
    assert refusals
    assert all(re.search(rf"held by process {killed.pid} on .* its hold ends in \d s", refusal) for refusal in refusals)
    assert (written(ledger, 2) - written(ledger, 1)).total_seconds() >= SHORT_S
    assert next_one.release() == "released"
    assert list(stored(ledger)) == ["driver-000002.json"]


@pytest.mark.slow
def test_a_holder_that_renews_is_not_succeeded(drivers: list[Driver], ledger: str) -> None:
    holder, other = drivers
    assert holder.acquire(ledger, 2 * SHORT_S) == "held"
    ends = time.monotonic() + 3 * SHORT_S
    while time.monotonic() < ends:
        assert other.acquire(ledger, SHORT_S).startswith("refused")
        time.sleep(0.5)
    assert holder.says_nothing()


def test_a_paused_holder_notices_that_it_was_succeeded_and_leaves_its_successor_alone(drivers: list[Driver], ledger: str) -> None:
    paused, successor = drivers
    assert paused.acquire(ledger, SHORT_S) == "held"
    paused.signal(signal.SIGSTOP)
    assert successor.acquire_in_the_end(ledger, LONG_S)
    paused.signal(signal.SIGCONT)
    assert paused.told().startswith(f"lost: it was taken over by process {successor.pid} on ")
    assert paused.acquire(ledger, SHORT_S).startswith(f"refused: held by process {successor.pid} on ")
    assert paused.release() == "released"
    assert stored(ledger)["driver-000002.json"]["released"] is False
    assert successor.release() == "released"
    assert paused.acquire(ledger, SHORT_S) == "held"


@pytest.mark.slow
def test_a_holder_that_was_paused_for_long_stops_even_where_nobody_came(drivers: list[Driver], ledger: str) -> None:
    paused, _ = drivers
    assert paused.acquire(ledger, SHORT_S) == "held"
    paused.signal(signal.SIGSTOP)
    time.sleep(2 * SHORT_S)
    paused.signal(signal.SIGCONT)
    assert paused.told() == "lost: its lock could not be renewed for 2 s"


def test_what_a_process_creates_that_stood_still_since_it_looked_does_not_count(
    drivers: list[Driver], ledger: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has seen generation 1 released; meanwhile 2 and 3 came and went, 2 for good, and 4 holds."""
    from jmedlora.orchestrator import object_lock as module

    holder, _ = drivers
    holder.acquire(ledger, LONG_S), holder.release()
    look, looks = module._Holding._free, 0

    def slow_look(self: module._Holding) -> int:
        nonlocal looks
        looks += 1
        newest = look(self)
        if looks == 1:
            for _ in range(2):
                assert [holder.acquire(ledger, LONG_S), holder.release()] == ["held", "released"]
            assert holder.acquire(ledger, LONG_S) == "held"
        return newest

    monkeypatch.setattr(module._Holding, "_free", slow_look)
    with ExitStack() as stack, pytest.raises(HeldByAnother, match=f"process {holder.pid} "):
        stack.enter_context(object_lock(ledger, refuse))
    assert looks == 2
    assert holder.says_nothing()


@pytest.mark.parametrize("days", [-10, 10])
def test_the_machines_clock_makes_no_difference(drivers: list[Driver], ledger: str, days: int, monkeypatch: pytest.MonkeyPatch) -> None:
    holder, _ = drivers
    real = time.time
    monkeypatch.setattr(clock, "now", lambda: real() + days * 86400)
    monkeypatch.setattr("jmedlora.orchestrator.object_lock.now", clock.now)
    monkeypatch.setattr(time, "time", clock.now)
    with ExitStack() as stack:
        assert holder.acquire(ledger, 2 * SHORT_S) == "held"
        with pytest.raises(HeldByAnother):
            stack.enter_context(object_lock(ledger, refuse))
        assert holder.release() == "released"
        stack.enter_context(object_lock(ledger, refuse, expires_s=2 * SHORT_S))
        assert holder.acquire(ledger, SHORT_S).startswith("refused")


@pytest.mark.parametrize("fault", ["busy", "conflict", "lost answer", "terse"])
def test_a_busy_store_is_asked_again(ledger: str, store: Store, fault: Fault) -> None:
    store.misbehaves(fault, times=1000 if fault == "terse" else 2, path=r"driver-\d")
    store.misbehaves("busy", method="GET")
    with object_lock(ledger, refuse, expires_s=LONG_S):
        assert store.behaves() == 0 or fault == "terse"
        with ExitStack() as stack, pytest.raises(HeldByAnother):
            stack.enter_context(object_lock(ledger, refuse))
    assert [content["released"] for content in stored(ledger).values()] == [True]


def test_a_holder_outlasts_a_store_that_is_busy_for_a_moment(drivers: list[Driver], ledger: str, store: Store) -> None:
    holder, other = drivers
    assert holder.acquire(ledger, 6 * SHORT_S) == "held"
    since = written(ledger, 1)
    store.misbehaves("busy", times=3, path=r"driver-\d")
    while written(ledger, 1) == since:
        time.sleep(0.2)
    assert store.behaves() == 0
    assert other.acquire(ledger, SHORT_S).startswith("refused")
    assert holder.says_nothing()


@pytest.mark.parametrize("fault", ["busy", "silent"])
def test_a_holder_that_cannot_renew_stops(drivers: list[Driver], ledger: str, store: Store, fault: Fault) -> None:
    holder, _ = drivers
    assert holder.acquire(ledger, SHORT_S) == "held"
    store.misbehaves(fault, times=1000, path=r"driver-\d")
    assert holder.told().startswith("lost: its storage could not be reached for 2 s: ")
    store.behaves()
    assert holder.release() == "released"


def test_a_holder_whose_lock_was_removed_by_hand_stops(drivers: list[Driver], ledger: str) -> None:
    holder, other = drivers
    assert holder.acquire(ledger, SHORT_S) == "held"
    for _ in range(300):
        the_files().rm_file(f"{ledger}/driver-000001.json")  # more than once: it may be about to write
        time.sleep(0.1)
        if not holder.says_nothing():
            break
    assert holder.told() == "lost: its lock was removed from the storage"
    assert other.acquire(ledger, SHORT_S) == "held"


def test_a_lock_that_nobody_can_read_is_waited_for(ledger: str) -> None:
    the_files().pipe_file(f"{ledger}/driver-000007.json", b'{"process": ')
    with ExitStack() as stack, pytest.raises(HeldByAnother, match=r"held by process 0 on an unknown machine"):
        stack.enter_context(object_lock(ledger, refuse))


def test_the_lock_says_who_and_no_secret(ledger: str) -> None:
    with object_lock(ledger, refuse):
        assert set(stored(ledger)["driver-000001.json"]) == {"process", "host", "start", "since", "expires_s", "released"}
        assert not any(secret in json.dumps(stored(ledger)) for name, secret in CREDENTIALS.items() if "REGION" not in name)


def test_a_store_that_creates_an_object_twice_is_refused(ledger: str, store: Store) -> None:
    store.misbehaves("forgets conditions", times=1000)
    with ExitStack() as stack, pytest.raises(StoreUnusable, match="creates an object a second time"):
        stack.enter_context(object_lock(ledger, refuse))
    assert stored(ledger) == {}


def test_a_store_that_cannot_be_reached_is_told_in_one_line(ledger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    s3fs.S3FileSystem.clear_instance_cache()  # they know the other address
    with ExitStack() as stack, pytest.raises(StoreUnusable, match=r"^Could not connect to the endpoint URL: \S+$"):
        stack.enter_context(object_lock(ledger, refuse, patience_s=1))
    s3fs.S3FileSystem.clear_instance_cache()


def test_only_stores_that_are_known_to_refuse_are_used() -> None:
    with ExitStack() as stack, pytest.raises(StoreUnusable, match=r"no lock is known for memory://, only for s3:// and gs://"):
        stack.enter_context(object_lock("memory://sweeps", refuse))


def test_a_client_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with ExitStack() as stack, pytest.raises(StoreUnusable, match=r"gs:// needs `pip install 'jmedlora\[gcs\]'`"):
        stack.enter_context(object_lock("gs://somewhere", refuse))


def test_the_storage_decides_on_the_lock(tmp_path: Path, ledger: str) -> None:
    local = load_sweep("smoke", [f"storage={tmp_path / 'results'}"])
    with sweep_lock(local, "smoke", refuse):
        assert (tmp_path / "results/sweeps/smoke/ledger/driver.lock").is_file()
        with ExitStack() as stack, pytest.raises(HeldByAnother):
            stack.enter_context(sweep_lock(local, "smoke", refuse))
    root = ledger.removesuffix("/ledger")
    remote = local.model_copy(update={"storage": f"{root}/"})
    with sweep_lock(remote, "smoke", refuse):
        assert the_files().exists(f"{root}/sweeps/smoke/ledger/driver-000001.json")
        with ExitStack() as stack, pytest.raises(HeldByAnother):
            stack.enter_context(sweep_lock(remote, "smoke", refuse))
    missing = local.model_copy(update={"storage": "s3://no-such-bucket/x"})
    with ExitStack() as stack, pytest.raises(BadInput) as refused:
        stack.enter_context(sweep_lock(missing, "smoke", refuse))
    (fault,) = refused.value.faults
    assert str(fault).endswith("storage: s3://no-such-bucket/x cannot be used: The specified bucket does not exist")
