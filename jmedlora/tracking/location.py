"""Where MLflow keeps a storage's runs; asked for without importing mlflow."""

from __future__ import annotations

import os

from jmedlora.plan.layout import Storage

VIEW = "jmedlora"
"""Name of the view that a sweep's experiment is opened with."""


def tracking_uri(storage: Storage) -> str:
    """MLFLOW_TRACKING_URI, or the storage's own sqlite database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.mlflow_database.absolute()}"


def is_server(uri: str) -> bool:
    """True where an MLflow server answers, False for a database that this process opens itself."""
    return uri.startswith(("http://", "https://"))


def artifact_location(uri: str, storage: Storage, sweep: str) -> str | None:
    """Where a sweep's artifacts go: below the storage, or (None) wherever the server keeps them."""
    return None if is_server(uri) else (storage.root / "mlartifacts" / sweep).absolute().as_uri()
