"""Answers of models behind an OpenAI-compatible address.

The `openai` client sends; asking again is decided here, since the client knows nothing of replies with status 200 that hold
no answer, waits 8 seconds at most between attempts, and would count its attempts apart from ours.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from openai import APIConnectionError, APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient

from jmedlora.config.faults import BadInput, Fault
from jmedlora.config.locate import is_loopback
from jmedlora.config.parts import ApiSource
from jmedlora.evaluation.answer_cache import Answer, AnswerCache, Request
from jmedlora.evaluation.endpoint_replies import Trouble, read_answer, read_refusal

Prompt = list[dict[str, str]] | str
"""Messages for the endpoint `chat`, plain text for `completions`."""

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 60.0
_FIRST_CONTACT = 3
"""Attempts to reach an address that has not answered anything yet."""
_LONGEST_QUOTE = 200
"""Characters of a server's message that are told."""
_NO_KEY = "none"
"""Sent to a server on this machine that asks for no key; the client insists on one."""


class EndpointFailed(Exception):
    """A prompt could not be answered; the answers that there are have been kept, so that the next start asks for the others."""

    def __init__(self, address: str, cause: str, answered: int, asked: int):
        super().__init__(f"{address}: {cause}; {answered} of {asked} answers are kept and will not be asked for again")
        self.address, self.cause, self.answered, self.asked = address, cause, answered, asked

    def __reduce__(self) -> tuple[type[EndpointFailed], tuple[str, str, int, int]]:
        return EndpointFailed, (self.address, self.cause, self.answered, self.asked)  # between processes: not by the message alone


def ask_endpoint(
    source: ApiSource,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    cache: AnswerCache,
    on_answer: Callable[[int], None] | None = None,
) -> list[Answer]:
    """The answers to the prompts, in their order; only what the cache does not hold is asked for, equal prompts once.

    At most `source.max_concurrency` requests are under way at any time. `on_answer` is called with the number of prompts
    answered so far, first with those that the cache knew. Not to be called inside an event loop.
    No stop sequence is sent: a server would stop at a line break that comes before any text, and some models take none;
    what follows the first line is cut when answers are scored.
    Raises BadInput before anything is sent where the key is missing or cannot be one. Raises EndpointFailed once a prompt
    cannot be answered: no further one is begun, those under way come to their end, and each answer is in the cache.
    """
    requests = [_request(source, prompt, max_new_tokens) for prompt in prompts]
    times = Counter(request.key for request in requests)
    distinct = {request.key: request for request in requests}
    answers = {key: answer for key, request in distinct.items() if (answer := cache.get(request)) is not None}
    answered = sum(times[key] for key in answers)

    def tell() -> None:
        if on_answer is not None:
            on_answer(answered)

    def keep(request: Request, answer: Answer) -> None:
        nonlocal answered
        cache.put(request, answer)
        answers[request.key] = answer
        answered += times[request.key]
        tell()

    tell()
    waiting = [request for key, request in distinct.items() if key not in answers]
    if waiting:
        _key(source)
        cause = asyncio.run(_ask_all(source, waiting, keep))
        if cause is not None:
            raise EndpointFailed(address_of(source), cause, answered, len(requests))
    return _in_order([request.key for request in requests], answers)


def address_of(source: ApiSource) -> str:
    """The address to be shown and written: without user names and query, which may be secrets."""
    return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", source.base_url)[0])


def _request(source: ApiSource, prompt: Prompt, max_new_tokens: int) -> Request:
    body: dict[str, Any] = {"model": source.model, "messages" if source.endpoint == "chat" else "prompt": prompt}
    body[source.max_tokens_field] = max_new_tokens
    for name in ("temperature", "seed"):
        if getattr(source, name) is not None:
            body[name] = getattr(source, name)
    return Request(source.base_url, source.endpoint, body)


def _in_order(keys: Sequence[str], answers: dict[str, Answer]) -> list[Answer]:
    """An answer for each key; where a key comes again, nothing was asked for it."""
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    return [answers[key] if first[key] == place else replace(answers[key], cached=True) for place, key in enumerate(keys)]


def _key(source: ApiSource) -> str:
    """The key, read where it is used: it stands in no configuration and in no variable that a traceback might show."""
    where = f"environment variable {source.key_env}"
    key = os.environ.get(source.key_env, "").strip()
    if not key and not is_loopback(source.base_url):
        told = f"not set, and {address_of(source)} is asked with the key that it holds"
        raise BadInput([Fault(where, "", told, "the key; any word for a server that asks for none")])
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        key = ""  # also what is none may be most of one
        raise BadInput([Fault(where, "", "holds blanks or characters that no key has", "the key alone")])
    return key or _NO_KEY


def _without_key(text: str, source: ApiSource) -> str:
    """Servers quote what they were sent."""
    return text.replace(_key(source), "***") if _has_key(source) else text


def _has_key(source: ApiSource) -> bool:
    return _key(source) != _NO_KEY


def _line(trouble: Trouble, source: ApiSource) -> str:
    """The trouble in one line, without the key."""
    said = " ".join(_without_key(trouble.said, source).split())
    quote = f" ({said if len(said) <= _LONGEST_QUOTE else said[:_LONGEST_QUOTE] + '…'})" if said else ""
    return f"{trouble.told}{quote}" + (f"; {trouble.advice}" if trouble.advice else "")


class _Lanes:
    """How many requests may be under way at once: half as many after each sign that the server has too much to do, slowly more
    again while it answers. A server that computes one answer after the other would else let every request of a crowd time out,
    again and again, and never answer one.
    """

    def __init__(self, most: int):
        self._most, self._limit, self._busy = most, float(most), 0
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._busy < int(self._limit))
            self._busy += 1

    async def __aexit__(self, *_: object) -> None:
        async with self._changed:
            self._busy -= 1
            self._changed.notify_all()

    def learn(self, overwhelmed: bool) -> None:
        """Takes an outcome into account."""
        self._limit = max(1.0, self._limit / 2) if overwhelmed else min(float(self._most), self._limit + 1 / self._limit)


@dataclass
class _Conversation:
    """One call's client, and whether and why something has failed for good."""

    source: ApiSource
    client: AsyncOpenAI
    lanes: _Lanes
    heard: bool = False
    """Whether the server has ever said anything."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    cause: str | None = None

    def end(self, trouble: Trouble) -> None:
        """The first trouble is the one to be told."""
        self.cause = self.cause or _line(trouble, self.source)
        self.over.set()


async def _ask_all(source: ApiSource, requests: list[Request], keep: Callable[[Request, Answer], None]) -> str | None:
    """Asks everything and `keep`s each answer as it comes; returns why a request failed for good, None where all went well."""
    # A proxy for the internet that the environment names cannot reach a server on this machine.
    http = DefaultAsyncHttpxClient(trust_env=not is_loopback(source.base_url))
    # The whole attempt is timed below; the client's own time-out starts anew with each byte.
    client = AsyncOpenAI(api_key=_key(source), base_url=source.base_url, max_retries=0, timeout=None, http_client=http)
    conversation = _Conversation(source, client, _Lanes(source.max_concurrency))
    queue = iter(requests)

    async def work() -> None:
        while not conversation.over.is_set() and (request := next(queue, None)) is not None:
            answer = await _ask(conversation, request)
            if answer is not None:
                keep(request, answer)

    async with client:
        workers = [asyncio.create_task(work()) for _ in range(min(source.max_concurrency, len(requests)))]
        try:
            await asyncio.gather(*workers)
        finally:  # where one has raised, the others are of no use any more
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return conversation.cause


async def _ask(conversation: _Conversation, request: Request) -> Answer | None:
    """The answer; None once the conversation is over, be it through this request or another."""
    attempts = 1 + conversation.source.max_retries
    for attempt in range(attempts):
        async with conversation.lanes:
            if conversation.over.is_set():
                return None
            outcome = await _attempt(conversation, request)
        conversation.lanes.learn(overwhelmed=isinstance(outcome, Trouble) and outcome.overwhelmed)
        if isinstance(outcome, Answer):
            conversation.heard = True
            return outcome
        conversation.heard = conversation.heard or not outcome.unreachable
        # an address that has never said a word is more likely mistyped than busy
        most = attempts if conversation.heard else min(attempts, _FIRST_CONTACT)
        if not outcome.again or attempt + 1 >= most:
            tried = f" at the last of {attempt + 1} attempts" if outcome.again else ""
            conversation.end(replace(outcome, told=outcome.told + tried))
            return None
        # Random, so that requests refused together do not come back together.
        delay_s = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2**attempt) * random.uniform(0.5, 1)
        try:
            await asyncio.wait_for(conversation.over.wait(), max(delay_s, outcome.wait_s))
            return None
        except TimeoutError:
            pass
    return None


async def _attempt(conversation: _Conversation, request: Request) -> Answer | Trouble:
    source, client = conversation.source, conversation.client
    create: Any = (client.chat.completions if source.endpoint == "chat" else client.completions).with_raw_response.create
    try:
        async with asyncio.timeout(source.timeout_s):
            reply = await create(**request.body)
    except TimeoutError:
        return Trouble(f"no answer within {source.timeout_s:g} s", True, overwhelmed=True)
    except APIStatusError as error:
        return read_refusal(source, error.status_code, error.response.headers, error.body, _has_key(source))
    except APIConnectionError as error:
        return Trouble("no connection", True, str(error.__cause__ or error), unreachable=True)
    return read_answer(reply.text)
