"""Fetching benchmarks from a real HTTP server on this machine: what is kept, what is refused, and that it is whole or not there."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jmedlora.config import clock
from jmedlora.config.benchmark import BenchmarkConfig, DatasetSource, GithubSource
from jmedlora.config.faults import BadInput
from jmedlora.config.parts import NamedSource
from jmedlora.data import fetch
from jmedlora.data.benchmarks import load_benchmark
from jmedlora.data.fetch import GITHUB_VARIABLE, RECORD, fetch_benchmark

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = BenchmarkConfig(name="exam", source=GithubSource(kind="github", repo="owner/Exam", revision=COMMIT, name="exam"))
ROW = {"problem_id": "112A1", "problem_text": "どれか。", "choices": ["甲", "乙"], "answer": ["b"], "text_only": True, "points": "1"}
EXAMPLE = {**ROW, "problem_id": "100E5", "problem_text": "例題"}
FILES = {
    "README.md": b"# Exam",
    "data/2018/112-A.jsonl": json.dumps(ROW).encode(),
    "scripts/prompts/prompt.jsonl": json.dumps(EXAMPLE).encode(),
    "scripts/run.py": b"raise SystemExit",
    "figure.png": b"\x89PNG",
}

Answer = tuple[int, dict[str, str], bytes]


class Server:
    """Answers requests with what `answers` holds for their path; remembers what was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                status, headers, body = outer.answers.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def archive(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answers[f"/owner/Exam/tar.gz/{COMMIT}"] = (status, headers or {}, body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv(GITHUB_VARIABLE, server.address)
    yield server
    server.server.shutdown()
    server.server.server_close()


def tarball(files: dict[str, bytes], commit: str = COMMIT, change: Callable[[tarfile.TarFile], None] | None = None) -> bytes:
    """An archive as GitHub makes it: everything in one folder, the commit in a comment."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT, pax_headers={"comment": commit}) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name if name.startswith("/") else f"Exam-{commit}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if change:
            change(tar)
    return buffer.getvalue()


def refusal(sources: Path, config: BenchmarkConfig = CONFIG, offline: bool = False) -> str:
    """The one line that a failing fetch tells; nothing must be left of it, no lock and no folder that was made for it."""
    before = sorted(sources.parent.rglob("*"))
    with pytest.raises(BadInput) as caught:
        fetch_benchmark(config, sources, offline)
    assert len(caught.value.faults) == 1
    assert sorted(sources.parent.rglob("*")) == before
    return str(caught.value.faults[0])


def test_a_repository_is_fetched_once_and_can_be_read(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now", lambda: 1_700_000_000.0)
    body = tarball(FILES)
    server.archive(body)
    place = fetch_benchmark(CONFIG, tmp_path)
    assert place == tmp_path / "benchmarks" / "exam"
    kept = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert kept == {RECORD, "README.md", "data/2018/112-A.jsonl", "scripts/prompts/prompt.jsonl"}
    assert json.loads((place / RECORD).read_text()) == {
        "repo": "owner/Exam",
        "revision": COMMIT,
        "fetched": "2023-11-14T22:13:20+00:00",
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    benchmark = load_benchmark(CONFIG, tmp_path)
    assert [question.problem_id for question in (*benchmark.questions, *benchmark.examples)] == ["112A1", "100E5"]
    assert fetch_benchmark(CONFIG, tmp_path) == place
    assert len(server.asked) == 1
    assert fetch_benchmark(CONFIG, tmp_path, offline=True) == place


def test_two_who_fetch_at_once_fetch_once(server: Server, tmp_path: Path) -> None:
    server.archive(tarball(FILES))
    threads = [threading.Thread(target=fetch_benchmark, args=(CONFIG, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.asked) == 1
    assert len(load_benchmark(CONFIG, tmp_path).questions) == 1


def test_what_the_server_refuses_is_told_in_one_line(server: Server, tmp_path: Path) -> None:
    address = f"{server.address}/owner/Exam/tar.gz/{COMMIT}"
    assert refusal(tmp_path) == (
        f"benchmark exam: source: cannot be fetched: {address} answers 404 Not Found; "
        "allowed: a repository and commit that exist, and can be read by everyone"
    )
    server.archive(b"", status=503)
    assert "answers 503" in refusal(tmp_path)


def test_a_cut_connection_leaves_nothing(server: Server, tmp_path: Path) -> None:
    body = tarball({**FILES, "big.txt": os.urandom(300_000)})
    server.archive(body[:200_000], headers={"Content-Length": str(len(body))})
    assert f"the connection ended {len(body) - 200_000} bytes early" in refusal(tmp_path)
    server.archive(body[:200_000])
    assert "cannot be fetched" in refusal(tmp_path)  # without a length, the archive itself tells
    server.archive(body)
    assert fetch_benchmark(CONFIG, tmp_path).is_dir()


@pytest.mark.parametrize("body", [b"", b"<html>", gzip.compress(b"not a tar"), tarball(FILES)[:-200]])
def test_what_is_no_archive_is_told(server: Server, tmp_path: Path, body: bytes) -> None:
    server.archive(body)
    assert "allowed: the archive of a repository, whole and undamaged" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../evil.json", "../../evil.json", "data/../../../evil.json", "/tmp/jmedlora-evil.json"])
def test_an_archive_that_would_write_elsewhere_is_refused(server: Server, tmp_path: Path, name: str) -> None:
    server.archive(tarball({**FILES, name: b"{}"}))
    assert "would lie outside the folder" in refusal(tmp_path / "sources")
    assert list(tmp_path.rglob("*evil*")) == []
    assert not Path("/tmp/jmedlora-evil.json").exists()


def test_links_are_not_unpacked(server: Server, tmp_path: Path) -> None:
    def add_links(tar: tarfile.TarFile) -> None:
        for kind, name in ((tarfile.SYMTYPE, "data/link.json"), (tarfile.LNKTYPE, "data/hard.json"), (tarfile.FIFOTYPE, "data/pipe.json")):
            member = tarfile.TarInfo(f"Exam-{COMMIT}/{name}")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)

    server.archive(tarball(FILES, change=add_links))
    assert {path.name for path in (fetch_benchmark(CONFIG, tmp_path) / "data").iterdir()} == {"2018"}


def test_an_archive_of_another_commit_or_without_data_is_refused(server: Server, tmp_path: Path) -> None:
    server.archive(tarball(FILES, commit="f" * 40))
    assert f"it is of commit {'f' * 40}, not of {COMMIT}" in refusal(tmp_path)
    server.archive(tarball({"run.py": b""}))
    assert "no file that ends with .json" in refusal(tmp_path)


@pytest.mark.parametrize(("limit", "value"), [("MAX_ARCHIVE_BYTES", 100), ("MAX_CONTENT_BYTES", 1000), ("MAX_FILES", 3)])
def test_what_is_too_large_is_refused(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    server.archive(tarball({**FILES, "bomb.txt": bytes(1_000_000)}))
    monkeypatch.setattr(fetch, limit, value)
    assert "more than" in refusal(tmp_path)


def test_without_a_network_the_place_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv(GITHUB_VARIABLE, f"http://127.0.0.1:{free.getsockname()[1]}")
        assert "allowed: an address that can be reached (a mirror: JMEDLORA_GITHUB)" in refusal(tmp_path)
    assert f"{tmp_path}/benchmarks/exam is not here, and the network is not to be used" in refusal(tmp_path, offline=True)
    monkeypatch.setenv(GITHUB_VARIABLE, "file:///etc")
    with pytest.raises(BadInput, match="environment: JMEDLORA_GITHUB: 'file:///etc' is not allowed"):
        fetch_benchmark(CONFIG, tmp_path)


def test_what_nobody_publishes_and_a_place_that_cannot_be_written_are_told(server: Server, tmp_path: Path) -> None:
    mine = BenchmarkConfig(name="mine", source=NamedSource(kind="named", name="mine.jsonl"))
    assert "nothing says where it is published" in refusal(tmp_path, mine)
    server.archive(tarball(FILES))
    (tmp_path / "sources").write_text("a file")
    with pytest.raises(BadInput, match="allowed: a folder that can be written"):
        fetch_benchmark(CONFIG, tmp_path / "sources")


# ---------------------------------------------------------------- data sets

DATASET = BenchmarkConfig(
    name="set", source=DatasetSource(kind="dataset", repo="owner/Set", revision="main", file="a/test.jsonl", name="set.jsonl")
)
RESOLVE = "/datasets/owner/Set/resolve/main/a/test.jsonl"
REFUSED = "benchmark set: source: cannot be fetched: a/test.jsonl of owner/Set: "
FETCH = """
import sys
from pathlib import Path
from jmedlora.config.benchmark import BenchmarkConfig
from jmedlora.config.faults import BadInput
from jmedlora.data.fetch import fetch_benchmark
try:
    print(fetch_benchmark(BenchmarkConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2])))
except BadInput as bad:
    print(bad)
"""


def fetch_dataset(address: str, sources: Path, cache: Path, offline: bool = False) -> str:
    """Fetches in a process of its own: the hub's client reads its address when it is imported. Only we may tell of a failure."""
    change = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", FETCH, DATASET.model_dump_json(), str(sources)]
    done = subprocess.run(command, env={**os.environ, **change}, capture_output=True, text=True, timeout=120, check=True)
    if "cannot be fetched" in done.stdout:
        assert (done.stderr, done.stdout.count("\n")) == ("", 1)
        assert not sources.exists()
    return done.stdout.strip()


def test_a_hub_that_does_not_answer_is_told_at_once(server: Server, tmp_path: Path) -> None:
    server.answers[RESOLVE] = (503, {}, b"")
    assert fetch_dataset(server.address, tmp_path / "new" / "sources", tmp_path / "cache").startswith(
        f"{REFUSED}127.0.0.1 answers 503 Service Unavailable; allowed"
    )
    assert server.asked.count(RESOLVE) == 1  # not again and again
    assert not (tmp_path / "new").exists()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
        told = fetch_dataset(dead, tmp_path / "sources", tmp_path / "cache")
        assert told == f"{REFUSED}[Errno 111] Connection refused; allowed: a data set, file and revision that exist and can be reached"


def test_a_file_of_a_data_set_is_fetched_once(server: Server, tmp_path: Path) -> None:
    assert fetch_dataset(server.address, tmp_path / "none", tmp_path / "cache").startswith(
        f"{REFUSED}127.0.0.1 answers 404 Not Found; allowed"
    )
    body = json.dumps(ROW).encode()
    headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
    server.answers[RESOLVE] = (200, headers, body)
    place = tmp_path / "benchmarks" / "set.jsonl"
    assert fetch_dataset(server.address, tmp_path, tmp_path / "cache") == str(place)
    assert place.read_bytes() == body
    assert {path.name for path in place.parent.iterdir()} == {"set.jsonl", f"set.jsonl{RECORD}"}
    record = json.loads((tmp_path / "benchmarks" / f"set.jsonl{RECORD}").read_text())
    assert (record["repo"], record["revision"], record["file"]) == ("owner/Set", COMMIT, "a/test.jsonl")
    assert record["sha256"] == hashlib.sha256(body).hexdigest()
    assert len(load_benchmark(DATASET, tmp_path).questions) == 1
    asked = len(server.asked)
    assert fetch_dataset(server.address, tmp_path, tmp_path / "cache") == str(place)
    assert len(server.asked) == asked
    again = fetch_dataset(server.address, tmp_path / "again", tmp_path / "cache", offline=True)
    assert Path(again).read_bytes() == body  # the hub's own cache has it
    assert "cannot be fetched" in fetch_dataset(server.address, tmp_path / "other", tmp_path / "empty", offline=True)
