"""The address of a Ray cluster, looked at before Ray tries it for minutes."""

from __future__ import annotations

import os
import re
import socket

from jmedlora.config.faults import BadInput, Fault

REACH_S = 5.0
ALLOWED = "host:port or ray://host:port of a running cluster, auto, local"
_HOST_AND_PORT = re.compile(r"(?:ray://)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")
_LEFT_TO_RAY = ("auto", "local")


def cluster_address(given: str | None) -> str | None:
    """The address as given, or RAY_ADDRESS, or None where Ray is to be started here; raises BadInput where nothing listens."""
    address = given or os.environ.get("RAY_ADDRESS")
    if not address or address in _LEFT_TO_RAY:
        return address or None
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise refused(given, address, "not an address")
    try:
        socket.create_connection((match["host"].strip("[]"), int(match["port"])), timeout=REACH_S).close()
    except OSError as error:
        raise refused(given, address, f"cannot be reached: {error.strerror or error}") from None
    return address


def refused(given: str | None, address: str, problem: str) -> BadInput:
    """The fault of an address, told where it comes from."""
    where, key = ("command line", "--address") if given else ("environment", "RAY_ADDRESS")
    return BadInput([Fault(where, key, f"{address}: {problem}", ALLOWED)])
