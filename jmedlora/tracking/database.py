"""A new sqlite database for MLflow appears complete or not at all."""

from __future__ import annotations

import fcntl
from pathlib import Path

from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

_SQLITE = "sqlite:///"


def make_database(uri: str) -> None:
    """Makes the database of a sqlite address where there is none; other addresses are left alone.

    MLflow makes the schema in dozens of steps, and one that was cut short (its process killed, say) can never be opened again.
    """
    path = Path(uri.removeprefix(_SQLITE))
    if not uri.startswith(_SQLITE) or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.new")
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # sweeps that start together share a database
        if path.exists():
            return
        for left in (aside, aside.with_name(f"{aside.name}-journal")):  # by one that was killed
            left.unlink(missing_ok=True)
        store = SqlAlchemyStore(f"{_SQLITE}{aside}", (path.parent / "mlartifacts").absolute().as_uri())
        store.engine.dispose()
        SqlAlchemyStore._engine_map.pop(store.db_uri)  # it would be used again for another database of this name
        aside.rename(path)
