"""Fetching a benchmark from where its authors publish it into the folder of sources, at the pinned commit."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import re
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from jmedlora.config import clock
from jmedlora.config.benchmark import BenchmarkConfig, DatasetSource, GithubSource
from jmedlora.config.faults import BadInput, Fault, first_line
from jmedlora.config.parts import URL
from jmedlora.data.atomic import appearing, write_json
from jmedlora.data.files import kind_of, place_of

GITHUB = "https://codeload.github.com"
GITHUB_VARIABLE = "JMEDLORA_GITHUB"
"""Environment variable with the address of a mirror of codeload.github.com."""
RECORD = ".fetched.json"
"""File that says what was fetched, and when: inside a fetched folder, or with a fetched file's name in front."""
KEPT_ENDINGS = (".json", ".jsonl", ".csv", ".md", ".txt")
MAX_ARCHIVE_BYTES = 200 * 2**20
MAX_CONTENT_BYTES = 2**30
MAX_FILES = 20_000
TIMEOUT_S = 30
_BLOCK = 2**16


def fetch_benchmark(config: BenchmarkConfig, sources: Path, offline: bool = False) -> Path:
    """The benchmark's file or folder below `sources`, fetched if it is not there yet: whole, or not at all.

    Raises BadInput with one fault where it cannot be fetched: no network allowed or no answer, an unknown commit, a cut
    connection, an archive that is damaged, too large, or would write elsewhere.
    """
    place = place_of(config, sources)
    if kind_of(place):
        return place
    source = config.source
    if source is None or source.kind == "named":
        raise _failed(config, f"{place} is not here, and nothing says where it is published", "bring it there, or name a path")
    if offline:
        raise _failed(config, f"{place} is not here, and the network is not to be used", "bring it there, or fetch without offline")
    try:
        with _alone(place):
            if not kind_of(place):  # another process may have brought it meanwhile
                if source.kind == "github":
                    _fetch_repository(config, source, place)
                else:
                    _fetch_dataset(config, source, place)
    except OSError as error:
        raise _failed(config, f"{place}: {error.strerror or first_line(error)}", "a folder that can be written") from None
    return place


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Keeps other processes from bringing the same; where nothing has come to the place, folders made for it go again.

    The lock's file goes while the lock is held: whoever waited for it notices, and locks the next one.
    """
    made = [folder for folder in (place.parent, *place.parent.parents) if not kind_of(folder)]
    lock = place.parent / f".{place.name}.lock"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    finally:
        if not kind_of(place):
            for folder in made:
                with suppress(OSError):  # another process has put something there
                    folder.rmdir()


# ---------------------------------------------------------------- GitHub


def _fetch_repository(config: BenchmarkConfig, source: GithubSource, place: Path) -> None:
    host = (os.environ.get(GITHUB_VARIABLE) or GITHUB).rstrip("/")
    if not re.fullmatch(URL, host):
        raise BadInput(
            [Fault("environment", GITHUB_VARIABLE, f"{host!r} is not allowed", "an address that begins with http:// or https://")]
        )
    address = f"{host}/{source.repo}/tar.gz/{source.revision}"
    with appearing(place) as aside:
        archive = aside / ".archive"
        try:
            digest = _download(address, archive)
            _extract(archive, aside, source.revision)
        except urllib.error.HTTPError as error:
            reason = f"{address} answers {error.code} {error.reason}"
            raise _failed(config, reason, "a repository and commit that exist, and can be read by everyone") from None
        except (_Refused, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
            raise _failed(config, f"{address}: {first_line(error)}", "the archive of a repository, whole and undamaged") from None
        except (OSError, http.client.HTTPException) as error:
            allowed = f"an address that can be reached (a mirror: {GITHUB_VARIABLE}), and room on the disk"
            cause = error.reason if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception) else error
            raise _failed(config, f"{address}: {first_line(cause)}", allowed) from None
        archive.unlink()
        write_json(aside / RECORD, _record(source.repo, source.revision, digest))


class _Refused(Exception):
    """An archive that must not be unpacked, or is not whole."""


def _download(address: str, target: Path) -> str:
    """Writes what the address answers into a file; returns its SHA-256."""
    total, digest = 0, hashlib.sha256()
    request = urllib.request.Request(address, headers={"User-Agent": "jmedlora"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer, target.open("wb") as file:
        while block := answer.read(_BLOCK):
            total += len(block)
            if total > MAX_ARCHIVE_BYTES:
                raise _Refused(f"more than {MAX_ARCHIVE_BYTES // 2**20} MB")
            digest.update(block)
            file.write(block)
        declared = answer.headers.get("Content-Length", "")
    if declared.isdigit() and total != int(declared):
        raise _Refused(f"the connection ended {int(declared) - total} bytes early")
    return digest.hexdigest()


def _extract(archive: Path, folder: Path, revision: str) -> None:
    """Unpacks the files that are data or text, without the folder at the archive's top."""
    files = size = 0
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if member.name.startswith("/") or ".." in parts:
                raise _Refused(f"{member.name!r} would lie outside the folder")
            files, size = files + 1, size + member.size
            if files > MAX_FILES or size > MAX_CONTENT_BYTES:
                raise _Refused(f"more than {MAX_FILES} files or {MAX_CONTENT_BYTES // 2**20} MB inside")
            if member.isreg() and len(parts) > 1 and member.name.lower().endswith(KEPT_ENDINGS):
                inner = member.replace(name="/".join(parts[1:]), deep=False)
                tar.extract(inner, folder, filter="data")
        commit = tar.pax_headers.get("comment", revision)
    if commit != revision:
        raise _Refused(f"it is of commit {commit}, not of {revision}")
    if not any(path.is_file() for path in folder.rglob("*") if path != archive):
        raise _Refused(f"no file that ends with {', '.join(KEPT_ENDINGS)}")


# ---------------------------------------------------------------- Hugging Face


def _fetch_dataset(config: BenchmarkConfig, source: DatasetSource, place: Path) -> None:
    try:
        with _hub_is_silent():
            cached = _from_hub(source)
        content = cached.read_bytes()
    except Exception as error:  # the hub's client lets errors of many libraries through
        answer = getattr(error, "response", None)
        reason = first_line(error) if answer is None else f"{answer.url.host} answers {answer.status_code} {answer.reason_phrase}"
        told = f"{source.file} of {source.repo}: {reason:.160}"
        raise _failed(config, told, "a data set, file and revision that exist and can be reached") from None
    record = _record(source.repo, _commit_of(cached) or source.revision or "", hashlib.sha256(content).hexdigest())
    beside, aside = place.with_name(place.name + RECORD), place.with_name(f".{place.name}.part")
    try:
        write_json(beside, {**record, "file": source.file})
        shutil.copyfile(cached, aside)
        aside.replace(place)
    finally:
        aside.unlink(missing_ok=True)
        if not kind_of(place):
            beside.unlink(missing_ok=True)


def _from_hub(source: DatasetSource) -> Path:
    """The file in the hub's cache, downloaded where it is not there yet.

    The hub is asked once before the download, which would try for half a minute where there is no network.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url  # slow to import
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(source.repo, source.file, repo_type="dataset", revision=source.revision))
    except HfHubHTTPError:
        raise
    except Exception as unreachable:  # of the network's libraries, or the client is told to stay offline
        try:
            return Path(hf_hub_download(source.repo, source.file, repo_type="dataset", revision=source.revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise unreachable from None
    return Path(hf_hub_download(source.repo, source.file, repo_type="dataset", revision=source.revision))


@contextmanager
def _hub_is_silent() -> Iterator[None]:
    """Without what the hub's client logs: what matters of it is told in our one line."""
    from huggingface_hub.utils import logging  # slow to import

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _commit_of(cached: Path) -> str:
    """The commit of a file in the hub's cache, which lies in `snapshots/<commit>/`."""
    parts = cached.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else ""


# ---------------------------------------------------------------- both


def _record(repo: str, revision: str, digest: str) -> dict[str, Any]:
    return {
        "repo": repo,
        "revision": revision,
        "fetched": datetime.fromtimestamp(clock.now(), UTC).isoformat(timespec="seconds"),
        "sha256": digest,
    }


def _failed(config: BenchmarkConfig, reason: str, allowed: str) -> BadInput:
    return BadInput([Fault(f"benchmark {config.name}", "source", f"cannot be fetched: {reason}", allowed)])
