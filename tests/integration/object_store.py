"""An S3 store on this machine that can misbehave, and drivers in processes of their own that hold sweeps in it."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[2]
BUCKET = "sweeps"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "not-so-secret", "AWS_DEFAULT_REGION": "us-east-1"}
_ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "AWS_EC2_METADATA_DISABLED": "true", **CREDENTIALS}
_FAULTS = "/-/faults"

Fault = Literal["busy", "conflict", "lost answer", "silent", "forgets conditions", "terse"]
"""busy: 503, nothing done. conflict: 409, nothing done. lost answer: done, then 503. silent: nothing done, an answer after a long while.
forgets conditions: creates what is there already. terse: says 412 without which condition failed, as not only S3 does."""


class Process:
    """A part of this file in a process of its own, asked by lines and answering in lines."""

    def __init__(self, *arguments: str, **environment: str):
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env={**os.environ, **_ENVIRONMENT, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **what: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(what) + "\n")

    def told(self, timeout_s: float = 60.0) -> str:
        """The next line it says."""
        return self._lines.get(timeout=timeout_s)

    def says_nothing(self) -> bool:
        return self._lines.empty()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()  # a stopped process too
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))


class Store(Process):
    """The store. Its clock is its own."""

    def __init__(self) -> None:
        super().__init__("serve")
        self.endpoint = self.told()

    def misbehaves(self, fault: Fault, *, times: int = 1, method: str = "PUT", path: str = "") -> None:
        """The next `times` requests by `method`, of paths in which the pattern `path` is found, meet the fault."""
        self._control(json.dumps({"fault": fault, "times": times, "method": method, "path": path}).encode())

    def behaves(self) -> int:
        """From now on; returns how many faulty answers were still to come."""
        return int(self._control(b""))

    def _control(self, body: bytes) -> bytes:
        with urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}{_FAULTS}", data=body), timeout=30) as answer:
            return bytes(answer.read())


class Driver(Process):
    """Holds sweeps, one at a time; it says `ready`, then `held`, `refused …`, `unusable …`, `released`, and `lost …` at any time."""

    def __init__(self, store: Store):
        super().__init__("hold", AWS_ENDPOINT_URL=store.endpoint)

    def acquire(self, ledger: str, expires_s: float) -> str:
        self.ask(ledger=ledger, expires_s=expires_s)
        return self.told()

    def acquire_in_the_end(self, ledger: str, expires_s: float) -> list[str]:
        """What it was told until it held the sweep."""
        refusals = []
        while (answer := self.acquire(ledger, expires_s)) != "held":
            refusals.append(answer)
            assert len(refusals) < 200, refusals[-1]
            time.sleep(0.2)
        return refusals

    def release(self) -> str:
        self.ask()
        return self.told()

    def forget(self) -> None:
        """Whatever a test left it in: afterwards it holds nothing and has nothing more to say."""
        self.signal(signal.SIGCONT)
        self.ask()
        while self.told() != "released":
            pass


def stop_all(processes: Iterable[Process]) -> None:
    for process in processes:
        process.kill()


def _serve() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *args: object) -> None:
            pass

    server = make_server(
        "127.0.0.1", 0, _Misbehaving(DomainDispatcherApplication(create_backend_app)), threaded=True, request_handler=Quiet
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT"), timeout=30).close()
    print(endpoint, flush=True)
    sys.stdin.read()  # until the test is over, however it ends


class _Misbehaving:
    """Takes requests one by one, since a store decides on a condition and writes in one step, which moto does not."""

    def __init__(self, app: Any):
        self._app, self._faults = app, list[dict[str, Any]]()
        self._one_by_one = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == _FAULTS:
            return [self._order(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])), start_response)]
        with self._one_by_one:
            fault = self._fault_of(environ)
            if fault == "forgets conditions":
                environ.pop("HTTP_IF_NONE_MATCH", None)
            answer: list[Any] = []
            body = b"" if fault in ("busy", "conflict", "silent") else b"".join(self._app(environ, lambda *told: answer.extend(told)))
        if fault == "silent":
            time.sleep(20)
        if fault in ("busy", "silent", "lost answer"):
            return [_error("503 Service Unavailable", "SlowDown", start_response)]
        if fault == "conflict":
            return [_error("409 Conflict", "ConditionalRequestConflict", start_response)]
        if fault == "terse" and answer[0].startswith("412"):
            return [_error(answer[0], "PreconditionFailed", start_response)]
        start_response(*answer[:2])
        return [body]

    def _order(self, body: bytes, start_response: Any) -> bytes:
        with self._one_by_one:
            left = sum(fault["times"] for fault in self._faults)
            self._faults = [*self._faults, json.loads(body)] if body else []
        start_response("200 OK", [("Content-Type", "text/plain")])
        return str(left).encode()

    def _fault_of(self, environ: dict[str, Any]) -> Fault | None:
        for fault in self._faults:
            if fault["times"] and fault["method"] == environ["REQUEST_METHOD"] and re.search(fault["path"], environ["PATH_INFO"]):
                fault["times"] -= 1
                told: Fault = fault["fault"]
                return told
        return None


def _error(status: str, code: str, start_response: Any) -> bytes:
    start_response(status, [("Content-Type", "application/xml")])
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>so it is</Message></Error>".encode()


def _hold() -> None:
    from jmedlora.orchestrator.ledger import HeldByAnother
    from jmedlora.orchestrator.lock_objects import StoreUnusable
    from jmedlora.orchestrator.object_lock import object_lock

    def say(line: str) -> None:
        print(line, flush=True)

    say("ready")
    stack = ExitStack()
    for line in sys.stdin:
        wish = json.loads(line)
        if not wish:
            stack.close()
            say("released")
            continue
        try:
            stack.enter_context(object_lock(wish["ledger"], lambda why: say(f"lost: {why}"), expires_s=wish["expires_s"]))
            say("held")
        except HeldByAnother as held:
            say(f"refused: {held}")
        except StoreUnusable as why:
            say(f"unusable: {why}")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        {"serve": _serve, "hold": _hold}[sys.argv[1]]()
