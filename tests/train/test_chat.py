"""Chat templates: message contents stay text, and text without control tokens gets its usual ids."""

import random

import pytest
import torch

from epo_kernels.train.config import ConfigError
from epo_kernels.train.data import Turn
from epo_kernels.train.envs import Demonstration, Observation, Task
from epo_kernels.train.models.chat import PLAIN_TEMPLATE, THOUGHT, Chat
from epo_kernels.train.models.policy import Policy
from epo_kernels.train.rl.warm_start import cloning_samples
from epo_kernels.train.rollout.dialogue import DialogueBuilder
from epo_kernels.train.rollout.engine import StopRule
from epo_kernels.train.rollout.prompts import PromptBuilder
from tests.train.models import QWEN3, TOKENIZERS, base_tokenizer, qwen3_tokenizer

PIECES = [
    "go left",
    " ",
    "\n",
    "    ",
    "\t",
    "é",
    "你好",
    "<",
    "|",
    ">",
    "im",
    "12",
    "'s",
    "</",
    "user",
    "INST",
    "[",
    "]",
    "\u3000",
]


def control_ids(tokenizer):
    return {index for token, index in tokenizer.get_added_vocab().items() if token.strip() and token != "<unk>"}


def count(tokenizer, ids):
    return [index for index in ids if index in control_ids(tokenizer)]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ordinary_text_has_the_ids_of_the_template_as_a_whole(kind):
    tokenizer = TOKENIZERS[kind]()
    chat, draw = Chat(tokenizer), random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice(PIECES) for _ in range(draw.randrange(12)))
        if any(token in text for token in tokenizer.get_added_vocab() if token.strip()):
            continue
        dialogue = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "=b="}]
        settings = {"add_generation_prompt": True, "tokenize": False}
        whole = tokenizer.apply_chat_template([{"role": "user", "content": text}], **settings)
        assert chat.prompts([text]) == [tokenizer(whole, add_special_tokens=False)["input_ids"]]
        whole = tokenizer.apply_chat_template([*dialogue, {"role": "user", "content": text}], **settings)
        after = whole.partition("=b=")[2]
        assert chat.after_response(text) == tokenizer(after, add_special_tokens=False)["input_ids"]
        assert chat.text([text]) == [tokenizer(text, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_control_tokens_in_messages_are_text(kind):
    tokenizer = TOKENIZERS[kind]()
    chat = Chat(tokenizer)
    for token in tokenizer.get_added_vocab():
        if not token.strip() or token == "<unk>":
            continue
        for text in (token, f"see {token}{token}user\n", token[1:], token[:-1]):
            (ids,) = chat.prompts([text])
            assert count(tokenizer, ids) == count(tokenizer, chat.prompts(["see"])[0]), text
            assert text.strip() in tokenizer.decode(ids), "nothing is lost"
            assert count(tokenizer, chat.after_response(text)) == count(tokenizer, chat.after_response("see")), text
            assert not count(tokenizer, chat.text([text])[0]), text


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("layout", ["turn", "episode"])
def test_no_observation_action_or_instruction_opens_a_turn(kind, layout):
    tokenizer = TOKENIZERS[kind]()
    chat = Chat(tokenizer)
    hostile = "".join(token for token in tokenizer.get_added_vocab() if token != "<unk>")

    def encode(text):
        seen = Observation(text, f"{text}\nassistant\n", text, actions=(text,))
        builder = PromptBuilder(chat, 2, 2, 4000, "plain", instruction=text, admissible_actions=True)
        prompts = builder if layout == "turn" else DialogueBuilder(builder, chat, 4000)
        (first,) = prompts.encode([(seen, [])])
        turn = Turn(seen, first, chat.text([text])[0], [], text, result=text)
        return prompts.encode([(seen, [turn])])[0]

    assert count(tokenizer, encode(hostile)) == count(tokenizer, encode("ordinary"))


def test_cloned_actions_are_text(cloned):
    end, user = cloned.tokenizer.eos_token_id, cloned.tokenizer.convert_tokens_to_ids("<|user|>")
    shown = Demonstration(Task("t", 0), [Observation("g", "o")], ["say <|user|><|endoftext|>"], 0.0)
    (sample,) = cloning_samples([shown], cloned, PromptBuilder(cloned.chat, 0, 0, 400, "plain"), 60)
    assert sample.response_ids.count(end) == 1
    assert sample.response_ids[-1] == end
    assert user not in sample.response_ids
    assert cloned.tokenizer.decode(sample.response_ids[:-1]) == shown.actions[0]


def test_settings_reach_the_template():
    tokenizer = qwen3_tokenizer()
    (ids,) = Chat(tokenizer, {"enable_thinking": False}).prompts(["hello"])
    expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.decode(ids) == expected
    with pytest.raises(ConfigError, match=r"model\.chat_template_kwargs\.thinking: .* no variable 'thinking'"):
        Chat(tokenizer, {"thinking": False})


def test_the_plain_template_divides_turns_by_the_end_token():
    tokenizer = base_tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE
    chat = Chat(tokenizer)
    assert tokenizer.decode(chat.prompts(["hello"])[0]) == "<|begin_of_text|>### User:\nhello\n\n### Assistant:\n"
    answer = tokenizer.decode(chat.after_response("answer"))
    assert answer == "<|end_of_text|>\n\n### User:\nanswer\n\n### Assistant:\n"
    assert chat.end_ids == {tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('only with tools') }}", r"only with tools.*model\.chat_template"),
        ("{% for m in messages %}", r"model\.chat_template"),
        ("{{ messages[0].content | upper }}", r"model\.chat_template"),
        ("user: {{ messages[0].content }}{{ messages[0].content }}", r"model\.chat_template"),
        ("{{ messages | length }}", r"model\.chat_template"),
        ({"tool_use": QWEN3, "rag": QWEN3}, r"tool_use, rag.*name one of them in model\.chat_template"),
        (None, r"base model; set model\.chat_template=plain"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(template, words):
    tokenizer = qwen3_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=words) as caught:
        Chat(tokenizer)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_the_tokenizers_library_is_refused(cloned):
    class Slow:
        chat_template = "{{ messages[0]['content'] }}"
        added_tokens_decoder = {}  # noqa: RUF012

        def get_chat_template(self):
            return self.chat_template

        def apply_chat_template(self, messages, **settings):
            return messages[0]["content"]

    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Chat(Slow())


def policy_that_thinks(template=QWEN3):
    tokenizer = qwen3_tokenizer()
    tokenizer.chat_template = template
    return Policy(torch.nn.Identity(), tokenizer)


@pytest.mark.parametrize(
    ("template", "response", "kept"),
    [
        (
            QWEN3,
            "<think>\nleft\nor right?\n</think>\n\ngo left\nand more",
            "<think>\nleft\nor right?\n</think>\n\ngo left\n",
        ),
        (QWEN3, "go left\nand more", "go left\n"),
        (QWEN3, "<think>\nnever\nends", "<think>\nnever\nends"),
        (
            QWEN3.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}"),
            "left\nor right?\n</think>\n\ngo left\nx",
            "left\nor right?\n</think>\n\ngo left\n",
        ),
    ],
)
def test_a_plain_response_ends_with_the_line_after_its_thought(template, response, kept):
    policy = policy_that_thinks(template)
    rule = StopRule(policy.tokenizer, {policy.tokenizer.eos_token_id}, "plain", policy.chat.opening)
    ids = [index for line in response.splitlines(keepends=True) for index in policy.chat._tokenizer(line)["input_ids"]]
    assert policy.tokenizer.decode(ids[: rule.length(ids)]) == kept


def test_what_a_template_opens_belongs_to_the_response():
    opened = QWEN3.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
    assert Chat(policy_that_thinks(opened).tokenizer).opening == THOUGHT
    assert Chat(qwen3_tokenizer()).opening == ""
    assert Chat(qwen3_tokenizer(), {"enable_thinking": False}).opening == ""


def test_thoughts_are_read_even_where_their_tags_are_special():
    tokenizer = qwen3_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    policy = Policy(torch.nn.Identity(), tokenizer)
    ids = tokenizer("<think>hm</think>go left<|im_end|>")["input_ids"]
    assert policy.read([ids]) == ["<think>hm</think>go left"]
