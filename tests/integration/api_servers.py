"""Servers that speak the OpenAI protocol: one in this process that fails on demand, and `transformers serve` in its own."""

from __future__ import annotations

import json
import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

OK = "ok"
PASSING_FAULTS = ["silence", "429", "408", "409", "500", "503", "cut", "broken json", "no choices", "null", "closed"]
"""What a client should ask again after."""


def reply_to(prompt: str) -> str:
    """What the server answers when it is well."""
    return f"答え {prompt}"


@dataclass
class ServerState:
    """What the server is to do, and what it saw."""

    fault_of: Callable[[str, int], str]
    """The fault for a prompt at its n-th attempt, counted from 0; `ok` for none."""
    gather: int = 1
    """The first requests wait until this many are under way at once."""
    work_s: float = 0.0
    """How long an answer takes that has the server's processor for itself; also for those who no longer wait."""
    usage: bool = True
    url: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    times: dict[str, list[float]] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    authorisations: set[str] = field(default_factory=set)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Condition = field(default_factory=threading.Condition)
    computing: int = 0

    @property
    def requests(self) -> int:
        return sum(self.asked.values())


def seeded_faults(seed: int, most: int) -> Callable[[str, int], str]:
    """At most `most` passing faults for each prompt, drawn from seed and prompt; then answers."""

    def fault_of(prompt: str, attempt: int) -> str:
        luck = random.Random(f"{seed} {prompt}")
        faults = luck.choices(PASSING_FAULTS, k=luck.randrange(most + 1))
        return faults[attempt] if attempt < len(faults) else OK

    return fault_of


@contextmanager
def api_server(fault_of: Callable[[str, int], str] = lambda prompt, attempt: OK, **options: Any) -> Iterator[ServerState]:
    """A server on a free port of this machine; `url` is its base_url."""
    state = ServerState(fault_of, **options)

    class Handler(_Handler):
        pass

    Handler.state = state
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: ServerState

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        state = self.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_chat = self.path.endswith("/chat/completions")
        prompt = body["messages"][-1]["content"] if is_chat else body["prompt"]
        with state.lock:
            attempt = state.asked[prompt]
            state.asked[prompt] += 1
            state.times.setdefault(prompt, []).append(time.monotonic())
            state.bodies.append(body)
            state.authorisations.add(self.headers["Authorization"])
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
            state.lock.notify_all()
            state.lock.wait_for(lambda: state.most_at_once >= state.gather, timeout=5)
        fault = state.fault_of(prompt, attempt)
        if fault == "silence":  # until the client has had enough
            select.select([self.connection], [], [], 30)
        if state.work_s:
            self._compute()
        with state.lock:  # before the client can know that it may send the next one
            state.at_once -= 1
        self._respond(fault, prompt, is_chat)

    def _compute(self) -> None:
        """Takes its time, longer the more are at it."""
        state, done = self.state, 0.0
        with state.lock:
            state.computing += 1
        while done < state.work_s:
            time.sleep(0.01)
            done += 0.01 / state.computing
        with state.lock:
            state.computing -= 1

    def _respond(self, fault: str, prompt: str, is_chat: bool) -> None:
        text: str | None = None if fault == "null" else reply_to(prompt)
        choice = {
            "index": 0,
            "finish_reason": "stop",
            **({"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}),
        }
        reply: dict[str, Any] = {"object": "x", "choices": [] if fault == "no choices" else [choice]}
        if self.state.usage:
            reply["usage"] = {"prompt_tokens": len(prompt), "completion_tokens": len(text or ""), "total_tokens": 0}
        content = json.dumps(reply).encode()
        if fault in ("silence", "closed"):
            self.close_connection = True
        elif fault == "cut":
            self._send(200, content, length=len(content) + 100)
            self.close_connection = True
        elif fault == "broken json":
            self._send(200, content[: len(content) // 2])
        elif fault.isdigit() or fault.startswith("401 "):
            status, _, message = fault.partition(" ")
            told = message.replace("AUTHORISATION", self.headers["Authorization"]) or f"fault {status}"
            self._send(int(status), json.dumps({"error": {"message": told, "code": None}}).encode(), retry_after="0.01")
        elif fault.startswith("wait "):
            self._send(429, b"{}", retry_after=fault.removeprefix("wait "))
        elif fault == "no credit":
            self._send(429, json.dumps({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}).encode())
        else:
            self._send(200, content)

    def _send(self, status: int, content: bytes, length: int | None = None, retry_after: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(content)))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def transformers_server(folder: Path, log: Path) -> Iterator[str]:
    """`transformers serve` with the model in `folder`, on the CPU and without network; yields its base_url."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "float32"],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text(encoding="utf-8")[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the server did not come up: {log.read_text(encoding='utf-8')[-3000:]}")
