from __future__ import annotations

import json
import logging
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmedlora.config.benchmark import BenchmarkConfig, PromptConfig
from jmedlora.config.faults import BadInput
from jmedlora.config.parts import ApiSource, ModelConfig, PathSource
from jmedlora.evaluation.answer_cache import Answer, AnswerCache
from jmedlora.evaluation.api import ApiEvaluator, Cost, cost_of
from jmedlora.evaluation.endpoint import EndpointFailed, Prompt, ask_endpoint, is_loopback
from jmedlora.evaluation.endpoint_replies import Trouble, read_answer, read_refusal, retry_after_s
from jmedlora.evaluation.evaluator import Evaluator
from jmedlora.models.random_models import write_random_model
from jmedlora.plan.layout import METRICS, PREDICTIONS, Storage
from jmedlora.plan.specs import EvaluationSpec
from tests.integration.api_servers import OK, ServerState, api_server, reply_to, seeded_faults, transformers_server
from tests.tiny import tiny_model

KEY = "sk-secret/0123456789+abcdef=="
PROMPTS = [f"問題{place}" for place in range(30)]
RUN = "c" * 12


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "JMEDLORA_TEST_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cache(tmp_path: Path) -> AnswerCache:
    return AnswerCache(tmp_path / "answers")


def source_at(url: str, **fields: Any) -> ApiSource:
    chosen = {"endpoint": "completions", "model": "m", "key_env": "JMEDLORA_TEST_KEY", "timeout_s": 20, "max_retries": 3, **fields}
    return ApiSource(kind="api", base_url=url, **chosen)


def texts(answers: Sequence[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def right(prompts: Sequence[str]) -> list[str]:
    return [reply_to(prompt) for prompt in prompts]


def chat(prompts: Sequence[str]) -> list[Prompt]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def always(fault: str, *prompts: str) -> Callable[[str, int], str]:
    return lambda prompt, attempt: fault if prompt in prompts else OK


# ---------------------------------------------------------------- a server that fails


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_faults_that_pass_cost_attempts_and_no_answers(endpoint: str, cache: AnswerCache) -> None:
    with api_server(seeded_faults(7, most=2), gather=5) as server:
        source = source_at(server.url, endpoint=endpoint, max_concurrency=5, max_retries=5, timeout_s=1)
        asked: list[Prompt] = chat(PROMPTS) if endpoint == "chat" else list(PROMPTS)
        done: list[int] = []
        answers = ask_endpoint(source, asked, 16, cache, done.append)
        assert texts(answers) == right(PROMPTS)
        assert server.requests > len(PROMPTS)
        assert max(server.asked.values()) <= 6
        assert server.most_at_once == 5
        assert done == list(range(len(PROMPTS) + 1))
        assert [answer.prompt_tokens for answer in answers] == [len(prompt) for prompt in PROMPTS]
        assert not any(answer.cached for answer in answers)


def test_a_slow_server_is_not_drowned(cache: AnswerCache) -> None:
    """All at once take longer than the time-out, and would come back all at once while it still works for nobody."""
    with api_server(work_s=0.2) as server:
        source = source_at(server.url, max_concurrency=16, max_retries=3, timeout_s=1)
        assert texts(ask_endpoint(source, PROMPTS, 16, cache)) == right(PROMPTS)


@pytest.mark.parametrize("fault", ["silence", "429", "500", "cut", "broken json", "no choices", "null", "closed"])
def test_a_fault_that_stays_is_told_after_all_attempts(fault: str, cache: AnswerCache) -> None:
    with api_server(always(fault, "b")) as server:
        source = source_at(server.url, max_concurrency=1, max_retries=1, timeout_s=1)
        with pytest.raises(EndpointFailed) as failed:
            ask_endpoint(source, ["a", "b", "c"], 16, cache)
        assert server.asked == {"a": 1, "b": 2}
    assert (failed.value.answered, failed.value.asked) == (1, 3)
    line = str(failed.value)
    assert server.url in line and "at the last of 2 attempts" in line and "1 of 3 answers are kept" in line and "\n" not in line
    told = {"429": "status 429 at the last of 2 attempts (fault 429)", "silence": "no answer within 1 s", "null": "finish_reason stop"}
    assert told.get(fault, "") in line
    assert str(pickle.loads(pickle.dumps(failed.value))) == line


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("400", "check model, endpoint, max_tokens_field"),
        ("401", "the key in JMEDLORA_TEST_KEY is refused"),
        ("403", "the key in JMEDLORA_TEST_KEY may not use m"),
        ("404", "does not know the model m"),
        ("no credit", "no credit left"),
        ("wait 86400", "come back in 86400 s"),
    ],
)
def test_what_asking_again_cannot_help_fails_at_once(fault: str, told: str, cache: AnswerCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JMEDLORA_TEST_KEY", KEY)
    with api_server(lambda prompt, attempt: fault) as server:
        with pytest.raises(EndpointFailed, match=told):
            ask_endpoint(source_at(server.url, max_concurrency=1), PROMPTS, 16, cache)
        assert server.requests == 1


def test_a_server_here_that_wants_a_key_names_the_variable(cache: AnswerCache) -> None:
    with (
        api_server(lambda prompt, attempt: "401") as server,
        pytest.raises(EndpointFailed, match=r"status 401 .*; JMEDLORA_TEST_KEY is not set: the server wants a key"),
    ):
        ask_endpoint(source_at(server.url), ["a"], 16, cache)


def test_the_server_says_how_long_to_wait(cache: AnswerCache) -> None:
    with api_server(lambda prompt, attempt: OK if attempt else "wait 1.2") as server:
        assert texts(ask_endpoint(source_at(server.url), ["a"], 16, cache)) == right(["a"])
        first, second = server.times["a"]
    assert second - first >= 1.2


def test_others_under_way_come_to_their_end_and_are_kept(cache: AnswerCache) -> None:
    def fault_of(prompt: str, attempt: int) -> str:
        if prompt == "slow":
            with server.lock:
                server.lock.wait(1)  # long enough for the refusal to arrive
        return "403" if prompt == "bad" else OK

    with api_server(fault_of, gather=2) as server:
        source = source_at(server.url, max_concurrency=2)
        with pytest.raises(EndpointFailed, match="1 of 4 answers are kept"):
            ask_endpoint(source, ["bad", "slow", "c", "d"], 16, cache)
        assert server.asked == {"bad": 1, "slow": 1}
        assert texts(ask_endpoint(source, ["slow"], 16, cache)) == right(["slow"])
        assert server.asked["slow"] == 1


def test_no_server_at_all(cache: AnswerCache) -> None:
    with api_server() as server:
        pass
    with pytest.raises(EndpointFailed, match="no connection at the last of 2 attempts"):
        ask_endpoint(source_at(server.url, max_retries=1), ["a"], 16, cache)


def test_ctrl_c_keeps_what_was_answered(cache: AnswerCache) -> None:
    with api_server() as server:
        source = source_at(server.url, max_concurrency=1)
        with pytest.raises(KeyboardInterrupt):
            ask_endpoint(source, PROMPTS, 16, cache, lambda done: signal.raise_signal(signal.SIGINT) if done == 4 else None)
        before = server.asked.copy()
        assert 4 <= before.total() < len(PROMPTS)
        done: list[int] = []
        answers = ask_endpoint(source, PROMPTS, 16, cache, done.append)
        assert texts(answers) == right(PROMPTS)
        assert done[0] >= 4
        assert sum(answer.cached for answer in answers) == done[0]
        assert server.requests - before.total() == len(PROMPTS) - done[0]


def test_a_proxy_is_not_asked_for_a_server_on_this_machine(cache: AnswerCache, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with api_server() as server:
        assert texts(ask_endpoint(source_at(server.url, max_retries=0), ["a"], 16, cache)) == right(["a"])


# ---------------------------------------------------------------- keys


def test_without_a_key_nothing_is_sent_elsewhere(cache: AnswerCache) -> None:
    with pytest.raises(BadInput, match=r"JMEDLORA_TEST_KEY: not set, and https://api\.example\.com/v1 is asked"):
        ask_endpoint(source_at("https://api.example.com/v1"), ["a"], 16, cache)


@pytest.mark.parametrize("key", ["two words", "ключ", "a\nb"])
def test_a_key_that_cannot_be_one_is_not_repeated(key: str, cache: AnswerCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JMEDLORA_TEST_KEY", key)
    with pytest.raises(BadInput, match="JMEDLORA_TEST_KEY: holds blanks") as refused:
        ask_endpoint(source_at("http://127.0.0.1:9/v1"), ["a"], 16, cache)
    assert refused.value.__traceback__ is not None
    shown = traceback.TracebackException(BadInput, refused.value, refused.value.__traceback__.tb_next, capture_locals=True)
    told = "".join(shown.format())
    assert "_key" in told and key not in told and repr(key) not in told


def test_a_key_is_sent_and_nowhere_written(
    cache: AnswerCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("JMEDLORA_TEST_KEY", f" {KEY}\n")
    caplog.set_level(logging.DEBUG)
    quotes = {"b": "401 wrong: AUTHORISATION", "c": "401 " + "x" * 185 + " AUTHORISATION"}  # the second would be cut within the key
    with api_server(lambda prompt, attempt: quotes.get(prompt, OK)) as server:
        source = source_at(server.url, max_concurrency=1)
        ask_endpoint(source, ["a"], 16, cache)
        for prompt in quotes:
            with pytest.raises(EndpointFailed) as failed:
                ask_endpoint(source, ["a", prompt], 16, cache)
            assert failed.value.__context__ is None and failed.value.__traceback__ is not None
            beyond_this_test = failed.value.__traceback__.tb_next
            shown = traceback.TracebackException(EndpointFailed, failed.value, beyond_this_test, capture_locals=True)
            told = "".join(shown.format())
            assert "ask_endpoint" in told and "status 401" in told
            assert KEY[:8] not in told
        assert server.authorisations == {f"Bearer {KEY}"}
    assert caplog.records
    assert KEY[:8] not in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(KEY.encode() in path.read_bytes() for path in files)


def test_a_local_server_needs_no_key(cache: AnswerCache) -> None:
    with api_server() as server:
        ask_endpoint(source_at(server.url), ["a"], 16, cache)
        assert server.authorisations == {"Bearer none"}


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.9/v1", True),
        ("http://[::1]:80/v1", True),
        ("https://api.openai.com/v1", False),
        ("http://localhost.example.com/v1", False),
        ("http://10.0.0.1/v1", False),
        ("http://[", False),
    ],
)
def test_which_addresses_are_here(url: str, here: bool) -> None:
    assert is_loopback(url) == here


# ---------------------------------------------------------------- requests and the cache


def test_requests_say_what_is_configured(cache: AnswerCache) -> None:
    with api_server() as server:
        ask_endpoint(source_at(server.url), ["a"], 16, cache)
        reasoning = source_at(server.url, endpoint="chat", temperature=None, seed=3, max_tokens_field="max_completion_tokens")
        ask_endpoint(reasoning, chat(["a"]), 9, cache)
        assert server.bodies == [
            {"model": "m", "prompt": "a", "max_tokens": 16, "temperature": 0},
            {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 9, "seed": 3},
        ]


def test_what_is_known_is_not_asked_again(cache: AnswerCache, monkeypatch: pytest.MonkeyPatch) -> None:
    with api_server() as server:
        source = source_at(server.url)
        first = ask_endpoint(source, PROMPTS, 16, cache)
        assert server.requests == len(PROMPTS)
        for change in ({"temperature": 0.5}, {"seed": 1}, {"model": "n"}, {"base_url": server.url.replace("127.0.0.1", "localhost")}):
            ask_endpoint(source.model_copy(update=change), PROMPTS[:1], 16, cache)
        ask_endpoint(source, PROMPTS[:1], 17, cache)
        assert server.asked[PROMPTS[0]] == 6
    prices = {"input_price": 1, "output_price": 2, "key_env": "OTHER", "timeout_s": 1, "max_concurrency": 1, "max_retries": 0}
    again = ask_endpoint(source.model_copy(update={**prices, "base_url": f"{server.url}/"}), PROMPTS, 16, cache)
    assert all(answer.cached for answer in again)
    assert texts(again) == texts(first) and [a.new_tokens for a in again] == [a.new_tokens for a in first]


def test_all_that_is_known_needs_no_key(cache: AnswerCache, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_at("https://api.example.com/v1")
    assert ask_endpoint(source, [], 16, cache) == []


def test_equal_prompts_are_asked_once(cache: AnswerCache) -> None:
    with api_server() as server:
        done: list[int] = []
        answers = ask_endpoint(source_at(server.url, max_concurrency=1), ["a", "b", "a", "a"], 16, cache, done.append)
        assert texts(answers) == right(["a", "b", "a", "a"])
        assert [answer.cached for answer in answers] == [False, False, True, True]
        assert server.asked == {"a": 1, "b": 1}
        assert done == [0, 3, 4]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"\xff", b'{"text": 3}', b'{"text": "x", "finish_reason": "stop", "new_tokens": "9"}']
)
def test_a_damaged_answer_counts_as_none(damage: bytes, cache: AnswerCache) -> None:
    with api_server() as server:
        source = source_at(server.url)
        ask_endpoint(source, ["a"], 16, cache)
        (file,) = [path for path in cache.folder.rglob("*") if path.is_file()]
        whole = file.read_bytes()
        file.write_bytes(damage)
        assert ask_endpoint(source, ["a"], 16, cache)[0] == Answer(reply_to("a"), 1, len(reply_to("a")), False, "stop")
        assert file.read_bytes().splitlines()[:-2] == whole.splitlines()[:-2]  # all but the time
        assert server.asked["a"] == 2


# ---------------------------------------------------------------- replies


def reply(message: dict[str, Any], **choice: Any) -> str:
    return json.dumps({"choices": [{"finish_reason": "stop", "message": message, **choice}]})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (reply({"content": " a\n"}), " a\n"),
        (reply({"content": ""}), ""),
        (reply({"content": None}, finish_reason="length"), ""),
        (reply({"content": None}, finish_reason="content_filter"), ""),
        (reply({"content": None, "refusal": "I cannot"}), "I cannot"),
        (reply({"content": "\ud83d\ude00 \ud800"}), "😀 \ufffd"),
        (json.dumps({"choices": [{"text": "plain"}], "usage": None}), "plain"),
    ],
)
def test_the_text_of_a_reply(text: str, said: str) -> None:
    answer = read_answer(text)
    assert isinstance(answer, Answer)
    assert (answer.text, answer.prompt_tokens, answer.new_tokens) == (said, None, None)


def test_an_error_with_status_200_is_told() -> None:
    trouble = read_answer('{"error": {"message": "the provider is overloaded", "code": 502}}')
    assert isinstance(trouble, Trouble) and trouble.again
    assert trouble.said == "the provider is overloaded"


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "text", "usage", "prompt_tokens", "refusal", "error", "finish_reason"]), inner
        )
    ),
)


@given(JSON)
def test_no_reply_is_beyond_reading(value: Any) -> None:
    outcome = read_answer(json.dumps(value))
    assert isinstance(outcome, Answer | Trouble)
    refusal = read_refusal(source_at("http://x/v1"), 418, {}, value, True)
    assert not refusal.again


@given(st.text() | st.floats().map(str) | st.datetimes().map(lambda date: date.strftime("%a, %d %b %Y %H:%M:%S GMT")))
def test_any_wish_to_wait_is_a_number_of_seconds(text: str) -> None:
    assert retry_after_s({"retry-after": text}) >= 0


def test_wishes_to_wait() -> None:
    assert retry_after_s({}) == 0
    assert retry_after_s({"retry-after": "7"}) == 7
    assert retry_after_s({"retry-after": "7", "retry-after-ms": "1500"}) == 1.5
    assert retry_after_s({"retry-after": "Fri, 01 Jan 2100 00:00:00 GMT"}) > 1e9
    assert retry_after_s({"retry-after": "Fri, 01 Jan 2010 00:00:00 GMT"}) == 0


# ---------------------------------------------------------------- cost and the evaluator


def test_cost() -> None:
    source = source_at("http://x/v1", input_price=10, output_price=30, currency="JPY")
    answers = [Answer("a", 100_000, 10_000, False, "stop"), Answer("b", 200_000, 0, True, "stop")]
    assert cost_of(source, answers) == Cost(1.3, 3.3, "JPY")
    assert cost_of(source, [*answers, Answer("c", None, None, False, None)]) is None
    assert cost_of(source_at("http://x/v1", input_price=10), answers) is None


BENCHMARK = BenchmarkConfig.model_validate(
    {"name": "sample", "bundled": "sample/questions.jsonl", "fewshot_bundled": "sample/fewshot.jsonl", "filters": {"first": 12}}
)
PROMPT = PromptConfig(
    name="plain",
    template="{% for example in examples %}{{ example.instruction }}{{ example.output }}\n{% endfor %}"
    "{{ instruction }}\n{{ input }}\n答え：",
)


def evaluation(**other: Any) -> EvaluationSpec:
    fields = {"evaluation_key": "key", "benchmark": BENCHMARK, "benchmark_digest": "", "questions": 12, "prompt_characters": 60.0}
    fields |= {"shots": 1, "prompt": PROMPT, "max_new_tokens": 12, "batch_size": 4}
    return EvaluationSpec.model_validate(fields | other)


def evaluator_at(server: ServerState, **fields: Any) -> ApiEvaluator:
    return ApiEvaluator(ModelConfig(name="served", source=source_at(server.url, **fields), family="api"), Path())


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("JMEDLORA_CACHE", str(tmp_path / "cache"))
    return Storage(tmp_path / "results")


def test_an_evaluation_that_broke_off_asks_only_what_is_missing(storage: Storage) -> None:
    well: list[bool] = []
    with api_server(lambda prompt, attempt: OK if well or server.requests <= 5 else "500", usage=True) as server:
        prices = {"input_price": 1e6, "output_price": 2e6, "max_concurrency": 1, "max_retries": 1}
        folder = storage.run(RUN).evaluation(evaluation().folder, 0)
        with pytest.raises(EndpointFailed, match="5 of 12"):
            evaluator_at(server, **prices).evaluate(RUN, 0, evaluation(), storage)
        assert not folder.exists()
        well.append(True)
        broken = server.requests
        progress: list[tuple[int, int]] = []
        metrics = evaluator_at(server, **prices).evaluate(RUN, 0, evaluation(), storage, lambda *numbers: progress.append(numbers))
        assert server.requests - broken == 7
        assert progress == [(done, 12) for done in range(5, 13)]
        assert (metrics["n"], metrics["cached_answers"], metrics["answers_without_tokens"], metrics["currency"]) == (12, 5, 0, "USD")
        assert metrics["cost"] == metrics["prompt_tokens"] + 2 * metrics["new_tokens"] > metrics["cost_now"] > 0
        assert json.loads((folder / METRICS).read_text(encoding="utf-8")) == metrics
        predictions = (folder / PREDICTIONS).read_text(encoding="utf-8")
        rows = [json.loads(line) for line in predictions.splitlines()]
        assert len(rows) == 12
        assert all(row["prediction"].startswith("答え ") and row["question"] in row["prediction"] for row in rows)
        finished = server.requests
        again = evaluator_at(server).evaluate(RUN, 0, evaluation(), storage)
        assert server.requests == finished
        assert (again["cached_answers"], again["cost"], again["accuracy"]) == (12, None, metrics["accuracy"])
        assert (folder / PREDICTIONS).read_text(encoding="utf-8") == predictions


def test_a_chat_endpoint_is_sent_turns(storage: Storage) -> None:
    prompt = PromptConfig(name="talk", template="{{ instruction }}\n{{ input }}", chat=True, system="You are a doctor.")
    with api_server(usage=False) as server:
        metrics = evaluator_at(server, endpoint="chat").evaluate(RUN, 0, evaluation(prompt=prompt), storage)
        assert [[message["role"] for message in body["messages"]] for body in server.bodies] == [
            ["system", "user", "assistant", "user"]
        ] * 12
        assert (metrics["answers_without_tokens"], metrics["prompt_tokens"], metrics["cost"]) == (12, 0, None)
        requests = server.requests
        with pytest.raises(BadInput, match="completions takes plain text, and prompt talk is a chat"):
            evaluator_at(server).evaluate(RUN, 0, evaluation(prompt=prompt), storage)
        with pytest.raises(BadInput, match="loglikelihood is not to be had"):
            evaluator_at(server).evaluate(RUN, 0, evaluation(scoring="loglikelihood"), storage)
        assert server.requests == requests


def test_a_model_with_weights_is_no_address() -> None:
    with pytest.raises(BadInput, match="random has no address to ask"):
        ApiEvaluator(tiny_model("llama"), Path())


# ---------------------------------------------------------------- a real server


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_real_server_gives_the_answers_of_our_own_decoding(storage: Storage, tmp_path: Path) -> None:
    """`transformers serve` goes on after the first line, where our decoding stops; up to there both say the same."""
    folder = tmp_path / "model"
    tiny = tiny_model("gpt_neox")
    assert tiny.architecture is not None
    roomy = tiny.model_copy(update={"architecture": tiny.architecture.model_copy(update={"max_positions": 2048})})  # nothing is cut
    write_random_model(roomy, 1, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    plain = evaluation(evaluation_key="plain", max_new_tokens=24, shots=0)
    talk = PromptConfig(name="talk", template="{{ instruction }}\n{{ input }}", chat=True, system="You are a doctor.")
    chats = evaluation(evaluation_key="chats", max_new_tokens=24, prompt=talk)
    with transformers_server(folder, tmp_path / "serve.log") as url:
        for endpoint, spec in (("completions", plain), ("chat", chats)):
            source = source_at(url, model=str(folder), endpoint=endpoint, timeout_s=60)
            ApiEvaluator(ModelConfig(name="served", source=source, family="api"), Path()).evaluate("served", 0, spec, storage)
        with pytest.raises(EndpointFailed, match=r"status 400 \(Server is pinned to .*; check model"):
            ask_endpoint(source_at(url, model="another"), ["a"], 16, AnswerCache(tmp_path / "another"))
    here = ModelConfig(name="here", source=PathSource(kind="path", path=str(folder)), family="gpt_neox")
    own = Evaluator(here, "fp32", "fp32", True, Path(), True, "cpu")
    stopped_early = 0
    for spec in (plain, chats):
        metrics = own.evaluate("here", 0, spec, storage)
        theirs, ours = (read_evaluation(storage, run, spec) for run in ("served", "here"))
        assert [row["response"] for row in theirs[1]] == [row["response"] for row in ours[1]]
        assert len({row["response"] for row in ours[1]}) > 3
        assert all(their["prediction"].startswith(our["prediction"]) for their, our in zip(theirs[1], ours[1], strict=True))
        assert theirs[0]["prompt_tokens"] == metrics["prompt_tokens"]
        assert theirs[0]["gestalt_score"] == metrics["gestalt_score"]
        stopped_early += theirs[0]["new_tokens"] - metrics["new_tokens"]
    assert stopped_early > 0  # some answer goes on after its first line, or the stop rule was not compared


def read_evaluation(storage: Storage, run_key: str, spec: EvaluationSpec) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder = storage.run(run_key).evaluation(spec.folder, 0)
    rows = (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()
    return json.loads((folder / METRICS).read_text(encoding="utf-8")), [json.loads(row) for row in rows]
