"""Reading what an OpenAI-compatible server replies: answers, refusals, and whether to ask again."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from jmedlora.config.parts import ApiSource
from jmedlora.evaluation.answer_cache import Answer

LONGEST_WAIT_S = 600.0
"""A server that asks to wait longer is taken to mean that today's allowance is used up."""


@dataclass(frozen=True)
class Trouble:
    """Why an attempt brought no answer."""

    told: str
    """What happened, in a few words."""
    again: bool
    """Whether asking again may help."""
    said: str = ""
    """The server's own words; they may quote what it was sent, the key included."""
    advice: str = ""
    """What the user can do."""
    wait_s: float = 0.0
    """How long the server asks to wait."""
    unreachable: bool = False
    """Whether nobody was there."""
    overwhelmed: bool = False
    """Whether the server seems to be asked for more at once than it can do."""


def read_answer(text: str) -> Answer | Trouble:
    """The answer in the body of a successful reply, of either endpoint.

    Servers and proxies also send half a body, no choices, or no text with status 200; that is worth another attempt. A model
    that declines, is stopped by a filter, or spends all its tokens before it answers has answered: with nothing.
    """
    try:
        reply = json.loads(text)
    except ValueError:
        return Trouble("the reply is no JSON", True, text)
    choices = _dict(reply).get("choices")
    if not isinstance(choices, list) or not choices:
        return Trouble("the reply holds no choices", True, server_message(reply))
    choice, usage = _dict(choices[0]), _dict(reply.get("usage"))
    message, reason = _dict(choice.get("message")), choice.get("finish_reason")
    said = choice.get("text", message.get("content"))
    if said is None and (message.get("refusal") or reason in ("content_filter", "length")):
        said = message.get("refusal") or ""
    if not isinstance(said, str):
        return Trouble(f"the reply holds no text (finish_reason {reason})", True)
    tokens = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    return Answer(_valid_unicode(said), *tokens, cached=False, finish_reason=reason if isinstance(reason, str) else None)


def read_refusal(source: ApiSource, status: int, headers: Mapping[str, str], body: object, has_key: bool) -> Trouble:
    """What a reply with an error status means, and what the user can do about it."""
    told, said = f"status {status}", server_message(body)
    if status == 429 and isinstance(body, dict) and body.get("code") == "insufficient_quota":
        return Trouble(told, False, said, f"the account of {source.key_env} has no credit left")
    if status in (408, 409, 429) or status >= 500:
        wait_s = retry_after_s(headers)
        if wait_s > LONGEST_WAIT_S:
            return Trouble(told, False, said, f"the server asks to come back in {wait_s:.0f} s")
        return Trouble(told, True, said, wait_s=wait_s, overwhelmed=status in (429, 503, 504, 529))
    key = f"the key in {source.key_env}" if has_key else f"{source.key_env} is not set: the server wants a key"
    advice = {
        401: f"{key} is refused" if has_key else key,
        403: f"{key} may not use {source.model}" if has_key else key,
        404: f"the server does not know the model {source.model}, or base_url is not the one above /{source.endpoint}",
        413: "the prompt is too long",
    }
    return Trouble(told, False, said, advice.get(status, "check model, endpoint, max_tokens_field, temperature and seed"))


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait (`retry-after-ms`, or `retry-after` in seconds or as a date); 0 where it asks nothing."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        return max(0.0, seconds) if seconds == seconds else 0.0  # `nan` is a number to float()
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def server_message(body: object) -> str:
    """The message in an error body, whichever of the usual shapes it has; empty where there is none."""
    if isinstance(body, dict):
        return next((found for key in ("error", "message", "detail") if (found := server_message(body.get(key)))), "")
    return body if isinstance(body, str) else ""


def _dict(value: Any) -> dict[str, Any]:
    """The value where it is an object; servers put anything in its place."""
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _valid_unicode(text: str) -> str:
    """The text itself; half a surrogate pair, which JSON can spell and no file can hold, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
