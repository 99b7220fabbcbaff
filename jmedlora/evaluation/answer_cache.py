"""Answers that a server has given are kept on disk, so that nothing is asked, or paid, twice."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jmedlora.config.clock import now
from jmedlora.config.digest import digest
from jmedlora.config.faults import BadInput, Fault, first_line
from jmedlora.data.atomic import write_json


@dataclass(frozen=True)
class Answer:
    """What a server said to one prompt, as it came, and what it took."""

    text: str
    prompt_tokens: int | None
    """None where the server does not tell."""
    new_tokens: int | None
    cached: bool
    """True where this call did not have to ask for it."""
    finish_reason: str | None
    """The server's word for why the answer ended, such as `stop` or `length`."""


@dataclass(frozen=True)
class Request:
    """What is sent, and where: all that an answer depends on. No key, time-out or price belongs to it."""

    base_url: str
    endpoint: str
    body: dict[str, Any]
    """The request's JSON: model, messages or prompt, and how to decode."""

    @cached_property
    def key(self) -> str:
        """SHA-256 in hex."""
        return digest({"base_url": self.base_url.rstrip("/"), "endpoint": self.endpoint, "body": self.body})


class AnswerCache:
    """A folder with a file per answered request, found by the request's SHA-256; several processes may share it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def check(self) -> None:
        """Raises BadInput where answers, which may cost money, could not be kept."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            problem = "" if os.access(self.folder, os.W_OK | os.X_OK) else "cannot be written"
        except OSError as error:
            problem = f"cannot be made: {error.strerror or first_line(error)}"
        if problem:
            allowed = "a folder that you may write to: answers are kept there"
            raise BadInput([Fault("environment", "JMEDLORA_CACHE", f"{self.folder} {problem}", allowed)])

    def get(self, request: Request) -> Answer | None:
        """The kept answer, or None; a damaged file counts as none and is replaced by the next `put`."""
        try:
            kept = json.loads(self._file(request).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return _answer(kept) if isinstance(kept, dict) else None

    def put(self, request: Request, answer: Answer) -> None:
        """Keeps an answer; the file appears complete or not at all."""
        kept = {
            "model": request.body["model"],
            "text": answer.text,
            "prompt_tokens": answer.prompt_tokens,
            "new_tokens": answer.new_tokens,
            "finish_reason": answer.finish_reason,
            "time": now(),
        }
        write_json(self._file(request), kept)

    def _file(self, request: Request) -> Path:
        key = request.key
        return self.folder / key[:2] / f"{key}.json"


def _answer(kept: dict[str, Any]) -> Answer | None:
    """The answer that a file holds; None where a part is missing or of another kind."""
    text, finish_reason = kept.get("text"), kept.get("finish_reason")
    tokens = [kept.get("prompt_tokens"), kept.get("new_tokens")]
    if not isinstance(text, str) or not isinstance(finish_reason, str | None):
        return None
    if not all(count is None or type(count) is int for count in tokens):
        return None
    return Answer(text, tokens[0], tokens[1], True, finish_reason)
