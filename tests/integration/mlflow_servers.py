"""An MLflow server that can be killed, stopped and started again, and a line to it that can be cut in several ways."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Literal

HOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Server:
    """`mlflow server` over a sqlite database below `folder`, in a process group of its own; artifacts go through it as well."""

    def __init__(self, folder: Path):
        self.database = folder / "server.db"
        self.port = free_port()
        self.uri = f"http://{HOST}:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it answers."""
        where = ["--backend-store-uri", f"sqlite:///{self.database}", "--artifacts-destination", str(self._folder / "artifacts")]
        command = [sys.executable, "-m", "mlflow", "server", *where, "--host", HOST, "--port", str(self.port), "--workers", "1"]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        for _ in range(1200):
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            assert self._process.poll() is None, (self._folder / "server.log").read_text()[-4000:]
            time.sleep(0.1)
        raise AssertionError("the server did not come up")

    def signal(self, number: int) -> None:
        """To the server and all that it started."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


Line = Literal["whole", "refused", "503", "silent", "deaf"]
"""`refused`: connections are closed at once; `silent`: they are taken and never answered; `deaf`: what is asked arrives, answers do not."""


class Proxy:
    """Passes connections on to a server, or does what `cut` says; what is open then is closed."""

    def __init__(self, port: int):
        self._target = port
        self._line: Line = "whole"
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server((HOST, 0), backlog=64)
        self.uri = f"http://{HOST}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, line: Line) -> None:
        """How the line is from now on."""
        self._line = line
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut("refused")

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection, self._line), daemon=True).start()

    def _serve(self, client: socket.socket, line: Line) -> None:
        self._open.add(client)
        with client, suppress(OSError):
            if line == "503":
                client.recv(65536)
                client.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            elif line == "silent":
                while client.recv(65536):
                    pass
            elif line in ("whole", "deaf"):
                self._pass_on(client, answers=line == "whole")
        self._open.discard(client)

    def _pass_on(self, client: socket.socket, answers: bool) -> None:
        with socket.create_connection((HOST, self._target)) as server:
            self._open.add(server)
            back = threading.Thread(target=_copy, args=(server, client if answers else None), daemon=True)
            back.start()
            _copy(client, server)
            if not answers:
                time.sleep(1.0)  # the request has arrived; the server gets the time to do it
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            back.join()
            self._open.discard(server)


def _copy(source: socket.socket, target: socket.socket | None) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            if target is not None:
                target.sendall(data)
    if target is not None:
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
