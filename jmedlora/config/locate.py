"""Where presets, bundled files and caches lie, and how paths and addresses are told apart."""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

_PACKAGE = Path(__file__).resolve().parent.parent


def conf_dir() -> Path:
    """The shipped presets: inside an installed package, or beside it in a checkout."""
    installed = _PACKAGE / "conf"
    return installed if installed.is_dir() else _PACKAGE.parent / "conf"


def job_script(name: str) -> Path:
    """An entry script of `jobs/`: inside an installed package, or beside it in a checkout."""
    installed = _PACKAGE / "jobs" / name
    return installed if installed.is_file() else _PACKAGE.parent / "jobs" / name


def bundled_file(name: str) -> Path:
    """A data file shipped with the package, by its path below `jmedlora/data/`."""
    return _PACKAGE / "data" / name


def is_remote(path: str) -> bool:
    """True for `s3://…`, `gs://…` and the like."""
    return "://" in path


def absolute(path: str, base: Path) -> str:
    """`path` made absolute: `~` expanded, relative paths taken from `base`; remote paths stay as they are."""
    if is_remote(path):
        return path
    return str((base / Path(path).expanduser()).resolve())


def cache_dir() -> Path:
    """Where converted models and tokenised data are kept: `$JMEDLORA_CACHE`, or `~/.cache/jmedlora`."""
    return Path(os.environ.get("JMEDLORA_CACHE") or Path.home() / ".cache" / "jmedlora").expanduser()


def is_loopback(url: str) -> bool:
    """True for an address on this machine."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or host.endswith(".localhost") or ip_address(host).is_loopback
    except ValueError:  # a name, or no address at all
        return False
