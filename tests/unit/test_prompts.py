from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from jmedlora.config.benchmark import BenchmarkConfig, PromptConfig
from jmedlora.config.compose import load_sweep
from jmedlora.config.faults import BadInput
from jmedlora.config.locate import conf_dir
from jmedlora.data.benchmarks import load_benchmark
from jmedlora.data.prompts import answer_of, prompt_digest, render_messages, render_prompt, target_of
from jmedlora.data.rows import Instruction, Question
from jmedlora.data.tokenisation import encode_prompt, prompt_text, tokenise_rows
from jmedlora.models.random_models import byte_tokenizer
from jmedlora.plan.planner import open_sweep

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = Question("1", "どれか。2つ選べ。", ("脚気", "夜盲症", "痛風"), (0, 2)).as_instruction()
SOLVED = Question("0", "原因はどれか。", ("甲", "乙"), (1,)).as_instruction()


def shipped(name: str) -> PromptConfig:
    content = yaml.safe_load((conf_dir() / "prompt" / f"{name}.yaml").read_text(encoding="utf-8"))
    return PromptConfig.model_validate({"name": name, **content})


SHIPPED = sorted(path.stem for path in (conf_dir() / "prompt").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_no_shipped_prompt_tells_the_answer_before_it_is_asked(name: str) -> None:
    prompt = shipped(name)
    asked = Instruction("問い", "選択肢一,選択肢二", "秘密の答え", ("選択肢一", "選択肢二"), "z", 1)
    text = json.dumps(render_messages(prompt, asked), ensure_ascii=False)
    assert "秘密の答え" not in text and "z" not in text.replace("Answer", "")
    assert "問い" in text and "選択肢一" in text and "選択肢二" in text


@pytest.mark.parametrize("name", SHIPPED)
def test_an_example_ends_as_the_answer_would(name: str) -> None:
    """What a model sees of a solved example is what it is trained to write and what is weighed."""
    prompt = shipped(name)
    messages = render_messages(prompt, ASKED, [SOLVED])
    if prompt.chat:
        assert messages[-2] == {"role": "assistant", "content": target_of(prompt, SOLVED).strip()}
    else:
        start = render_prompt(prompt, SOLVED)
        assert (start + target_of(prompt, SOLVED)).split(SOLVED.instruction)[1] in render_prompt(prompt, ASKED, [SOLVED])


def test_the_exam_prompt_shows_letters_and_how_many_answers_are_right() -> None:
    text = render_prompt(shipped("exam-ja"), ASKED, [SOLVED])
    assert "a. 脚気\nb. 夜盲症\nc. 痛風\n2つ選びなさい。\n答え：" in text
    assert "a. 甲\nb. 乙\n1つ選びなさい。\n答え：b\n" in text
    assert text.endswith("答え：")
    assert answer_of(shipped("exam-ja"), ASKED) == "a,c"
    assert answer_of(shipped("alpaca-ja"), ASKED) == "脚気,痛風"
    assert target_of(shipped("exam-en"), ASKED) == " a,c"
    assert target_of(shipped("step-by-step-ja"), ASKED) == "答え：脚気,痛風"


def test_rows_without_choices_are_answered_with_their_text_whatever_the_prompt_asks_for() -> None:
    assert answer_of(shipped("exam-ja"), Instruction("問い", "", "自由な答え")) == "自由な答え"


def test_names_and_notes_are_no_part_of_a_prompts_identity_and_all_else_is() -> None:
    plain = PromptConfig(name="a", template="{{ instruction }}")
    assert prompt_digest(plain) == prompt_digest(PromptConfig(name="b", template="{{ instruction }}", note="other"))
    others = [
        {"answer": "letters"}, {"language": "en"}, {"chat": True}, {"answer_marker": "答え："}, {"answer_prefix": " "},
        {"template": "{{ instruction }} "}, {"chat": True, "system": "医師です。"},
    ]  # fmt: skip
    digests = {prompt_digest(PromptConfig.model_validate({**plain.model_dump(), **change})) for change in others}
    assert len(digests | {prompt_digest(plain)}) == len(others) + 1


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_a_chat_prompt_goes_through_the_models_own_template(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = PromptConfig(name="chat", template="{{ instruction }}／{{ input }}\n", chat=True, system="医師")
    text = prompt_text(chat_tokenizer, prompt, ASKED, [SOLVED])
    assert text == (
        "<system>医師</system><user>原因はどれか。／甲,乙</user><assistant>乙</assistant>"
        "<user>どれか。2つ選べ。／脚気,夜盲症,痛風</user><assistant>"
    )


@pytest.mark.parametrize("writes_bos", [True, False])
def test_a_chat_has_the_special_tokens_that_its_template_writes(chat_tokenizer: PreTrainedTokenizerBase, writes_bos: bool) -> None:
    chat_tokenizer.chat_template = ("{{ bos_token }}" if writes_bos else "") + CHAT_TEMPLATE
    prompt = PromptConfig(name="chat", template="{{ instruction }}", chat=True)
    ids = encode_prompt(chat_tokenizer, prompt_text(chat_tokenizer, prompt, SOLVED), None, prompt.chat)
    assert ids.count(chat_tokenizer.bos_token_id) == writes_bos
    messages = render_messages(prompt, SOLVED)
    assert ids == chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_a_model_without_a_chat_template_is_told() -> None:
    with pytest.raises(BadInput, match="no chat template"):
        prompt_text(byte_tokenizer(), shipped("chat-ja"), ASKED)


def test_training_rows_follow_the_prompt_as_evaluation_asks(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for prompt in (shipped("chat-ja"), shipped("exam-ja"), shipped("exam-en")):
        rows = tokenise_rows([ASKED], prompt, chat_tokenizer, prompt.name, 4000, 100, tmp_path)
        ids, start = rows[0]["input_ids"], rows[0]["prompt_length"]
        assert ids[:start] == encode_prompt(chat_tokenizer, prompt_text(chat_tokenizer, prompt, ASKED), None, prompt.chat)
        assert chat_tokenizer.decode(ids[start:-1]) == target_of(prompt, ASKED)


def test_an_english_prompt_on_questions_without_translation_is_refused_before_anything_starts() -> None:
    with pytest.raises(BadInput, match=r"prompt exam-en asks in English, and of sample S\d+A\d+ has no English translation"):
        open_sweep("smoke", ["prompts=[alpaca-ja,exam-en]"])


def test_a_sweep_may_list_several_prompts_and_ways_of_scoring() -> None:
    config, plan = open_sweep("smoke", ["prompts=[alpaca-ja,exam-ja,step-by-step-ja]", "evaluate.scoring=[generate,loglikelihood]"])
    asked = {(item.prompt.name, item.shots, item.scoring): item for item in plan.evaluations}
    assert len(asked) == len({item.evaluation_key for item in plan.evaluations}) == 12
    assert asked["step-by-step-ja", 0, "generate"].max_new_tokens == 512
    assert asked["alpaca-ja", 0, "generate"].max_new_tokens == config.evaluate.max_new_tokens


def test_a_bound_on_new_tokens_is_no_part_of_a_log_likelihoods_identity() -> None:
    def keys(new_tokens: int) -> dict[str, str]:
        _, plan = open_sweep("smoke", ["evaluate.scoring=[generate,loglikelihood]", f"evaluate.max_new_tokens={new_tokens}", "shots=[0]"])
        return {item.scoring: item.evaluation_key for item in plan.evaluations}

    assert keys(8)["loglikelihood"] == keys(9)["loglikelihood"]
    assert keys(8)["generate"] != keys(9)["generate"]


def test_metric_settings_are_no_part_of_an_evaluations_identity() -> None:
    def keys(*overrides: str) -> list[str]:
        return [item.evaluation_key for item in open_sweep("smoke", list(overrides))[1].evaluations]

    assert keys() == keys("evaluate.metrics=harness") == keys("evaluate.metrics={nfkc: true}")


def test_examples_are_shown_in_the_sweeps_order_and_never_asked() -> None:
    benchmark = load_benchmark(BenchmarkConfig(name="s", bundled="sample/questions.jsonl", fewshot_items=["S1A3", "S1A1"]), Path())
    assert [example.problem_id for example in benchmark.examples] == ["S1A3", "S1A1"]
    assert not {"S1A1", "S1A3"} & {question.problem_id for question in benchmark.questions}


def test_a_repeated_way_of_scoring_is_a_fault() -> None:
    with pytest.raises(BadInput, match=r"evaluate.scoring: generate twice"):
        load_sweep("smoke", ["evaluate.scoring=[generate,generate]"])
