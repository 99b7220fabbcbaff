"""Where presets and bundled files lie, and how relative paths and named sources are found."""

from __future__ import annotations

from pathlib import Path

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
