"""A real MLflow server that goes away and comes back while a sweep is written to it."""

from __future__ import annotations

import random
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import Plan
from jmedlora.tracking.rebuilding import rebuild
from jmedlora.tracking.writer import TrackingWriter
from tests.integration.mlflow_servers import Proxy, Server
from tests.made_up import base_spec, plan_of, run_spec
from tests.replay import Replay, disorder, run_ids, tracked, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def _in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outages in the tests last seconds, not minutes."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setattr("jmedlora.tracking.writer.LONGEST_PAUSE_S", 2.0)
    monkeypatch.setattr("jmedlora.tracking.writer.CLOSING_PAUSE_S", 2.0)


def planned(sweep: str) -> Plan:
    runs = [run_spec("aaaaaaaaaaaa", rank=4), run_spec("bbbbbbbbbbbb", epochs=4)]
    return plan_of([base_spec()], runs, sweep=sweep)


def replay_of(sweep: str, folder: Path, uri: str) -> Replay:
    storage, plan = Storage(folder / "results"), planned(sweep)
    return Replay(plan, folder / "scratch", storage, TrackingWriter(uri, plan, storage))


def told_at_once(events: Iterator[None], count: int, pause_s: float = 0.0) -> None:
    """Advances a replay; nobody who tells something waits for MLflow."""
    for _ in range(count):
        if next(events, "over") == "over":
            return
        time.sleep(pause_s)


def assert_whole(server: Server, replay: Replay) -> None:
    found = tracked(server.database, replay.plan.sweep)
    assert disorder(found, replay.plan, replay.storage) == []
    assert found.keys() == {"parent", "base00000032", "aaaaaaaaaaaa", "bbbbbbbbbbbb"}


def test_away_at_the_start_and_killed_in_the_middle(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    proxy.cut("refused")
    replay = replay_of("killed", tmp_path, proxy.uri)
    events = replay.events()
    told_at_once(events, 8)
    wait_until(lambda: replay.writer.trouble() is not None)
    assert "MLflow unreachable since" in (replay.writer.trouble() or "")
    proxy.cut("whole")
    told_at_once(events, 2)
    wait_until(lambda: replay.writer.trouble() is None)
    told_at_once(events, 4, 0.1)
    server.kill()
    told_at_once(events, 5, 0.1)
    wait_until(lambda: replay.writer.trouble() is not None)
    server.start()
    told_at_once(events, 1000, 0.02)
    assert replay.writer.finish("finished") == []
    assert_whole(server, replay)


def test_a_server_that_hangs_and_then_does_what_it_was_asked_long_ago(server: Server, tmp_path: Path) -> None:
    replay = replay_of("hangs", tmp_path, server.uri)
    events = replay.events()
    told_at_once(events, 8, 0.1)
    for _ in range(2):
        server.signal(signal.SIGSTOP)
        try:
            told_at_once(events, 6, 0.1)
            wait_until(lambda: replay.writer.trouble() is not None)
            time.sleep(3)  # so that it is tried again meanwhile
        finally:
            server.signal(signal.SIGCONT)
        told_at_once(events, 6, 0.1)
    told_at_once(events, 1000, 0.02)
    assert replay.writer.finish("finished") == []
    assert_whole(server, replay)


def test_a_bad_line(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    luck = random.Random(4)
    replay = replay_of("line", tmp_path, proxy.uri)
    events = replay.events()
    for line in luck.sample(["refused", "503", "silent", "deaf", "deaf", "deaf"], 6):
        told_at_once(events, 3, 0.1)
        proxy.cut(line)
        told_at_once(events, 3, 0.1)
        time.sleep(luck.uniform(0.2, 3.0))
        proxy.cut("whole")
        time.sleep(luck.uniform(0.2, 3.0))
    told_at_once(events, 1000, 0.02)
    assert replay.writer.finish("finished") == []
    assert_whole(server, replay)


def test_away_at_the_end_and_delivered_afterwards(server: Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jmedlora.tracking.writer.PATIENCE_S", {"finished": 3.0})
    others = set(threading.enumerate())
    replay = replay_of("ends", tmp_path, proxy.uri)
    events = replay.events()
    told_at_once(events, 8, 0.1)
    proxy.cut("silent")
    told_at_once(events, 1000)
    [problem] = replay.writer.finish("finished")
    assert "`jmedlora report ends --rebuild-mlflow`" in problem
    proxy.cut("whole")
    wait_until(lambda: not any(thread.name == "tracking" for thread in set(threading.enumerate()) - others))
    report = tmp_path / "report"
    report.mkdir()
    (report / "index.html").write_text("<p>report</p>")
    rebuild(proxy.uri, replay.plan, replay.storage, report, [])
    assert_whole(server, replay)
    held = tracked(server.database, "ends"), run_ids(server.database)
    assert held[0]["parent"]["status"] == "FINISHED"
    rebuild(proxy.uri, replay.plan, replay.storage, report, [])
    assert (tracked(server.database, "ends"), run_ids(server.database)) == held


@pytest.mark.slow
def test_a_database_that_somebody_else_has_locked(tmp_path: Path) -> None:
    """MLflow itself waits 20 seconds for a lock."""
    database = tmp_path / "results/mlflow.db"
    replay = replay_of("locked", tmp_path, f"sqlite:///{database}")
    events = replay.events()
    wait_until(lambda: database.is_file() and "parent" in tracked(database, "locked"))
    told_at_once(events, 8, 0.1)
    with closing(sqlite3.connect(database, isolation_level=None, timeout=60)) as other:
        other.execute("begin exclusive")
        told_at_once(events, 8, 0.1)
        wait_until(lambda: replay.writer.trouble() is not None)
        other.execute("rollback")
    told_at_once(events, 1000)
    assert replay.writer.finish("finished") == []
    found = tracked(database, "locked")
    assert disorder(found, replay.plan, replay.storage) == []
