"""Chat templates: the text a template writes around messages, and token ids in which messages stay plain text.

A template is rendered once, with placeholders for the messages. Its control tokens (`<|im_start|>`, `[INST]`, ...) are
then renamed, in the rendered text and in a copy of the tokenizer, to names that no message can contain. A message that
contains `<|im_end|>` is therefore tokenized as those characters, while text without control tokens gets its usual ids,
including merges across the boundaries of a message.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from epo_kernels.train.config import ConfigError
from epo_kernels.train.io.text import one_line

THOUGHT, THOUGHT_END = "<think>", "</think>"
ANOTHER_TEMPLATE = "set model.chat_template to a file with another template, or to plain"
_PADDING = " \n "  # around a message, to detect whether the template strips it
_ORDINARY_TEXT = "Sign: moon, by day.\n> go left\n\n  2 doors"

# For base models. Turns are separated by the end token, which no observation can spell.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class _Scaffold:
    """The text before, between and after messages, and how each message is stripped."""

    texts: list[str]
    strips: list[tuple[bool, bool]]  # per message: on its left, on its right


class Chat:
    """A tokenizer's chat template, ready to encode prompts.

    Args:
        tokenizer: has a chat template and is backed by the tokenizers library.
        settings: variables of the template, such as enable_thinking.

    Attributes:
        opening: the part of the response that the template writes itself: "<think>" or "".
        may_think: whether the template supports thoughts and leaves room for one.
        writes_date: whether the template writes today's date, which no setting can fix.
        control_tokens: control tokens that the template writes.
        end_ids: the control token with which the template ends a response, if any.

    Raises:
        ConfigError: no template, a template that fails or changes messages, unknown settings, or a tokenizer that
            cannot separate text from control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._settings = dict(settings or {})
        template = _template_of(tokenizer)
        for name in self._settings:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise ConfigError(f"model.chat_template_kwargs.{name}: the chat template has no variable {name!r}")
        prompt = self._scaffold(["user"])
        self.opening = THOUGHT if prompt.texts[-1].rfind(THOUGHT) > prompt.texts[-1].rfind(THOUGHT_END) else ""
        self.writes_date = "strftime_now" in template and "date_string" not in self._settings
        self.may_think = THOUGHT_END in template and THOUGHT_END not in prompt.texts[-1]
        try:
            self._dialogue: _Scaffold | ConfigError = self._scaffold(["user", "assistant", "user"])
        except ConfigError as error:
            self._dialogue = error  # matters only if dialogues are continued
        scaffolds = [prompt, self._dialogue] if isinstance(self._dialogue, _Scaffold) else [prompt]
        self._text = _TextEncoder(
            tokenizer, template, [_fill(one, [_ORDINARY_TEXT] * len(one.strips)) for one in scaffolds]
        )
        self._prompt = self._text.mark(prompt)
        self._check_ordinary_text(prompt)
        self.control_tokens = self._text.written
        self.end_ids: set[int] = set()
        if isinstance(self._dialogue, _Scaffold):
            self.end_ids = self._text.first_control(self._dialogue.texts[2])
            self._dialogue = self._text.mark(self._dialogue)

    def prompts(self, messages: Sequence[str]) -> list[list[int]]:
        """Ids of the prompts, each with one user message and a request for a response."""
        return self._text.encode([_fill(self._prompt, [message]) for message in messages])

    def require_dialogue(self) -> None:
        """Raise ConfigError unless the template writes a response, and the user's answer to it, unchanged."""
        if isinstance(self._dialogue, ConfigError):
            raise ConfigError(f"rollout.layout=episode: {self._dialogue}; or set rollout.layout=turn")

    def after_response(self, answer: str) -> list[int]:
        """Ids from the end of one response, through the user's answer, to the opening of the next response."""
        assert isinstance(self._dialogue, _Scaffold)
        after = _Scaffold(self._dialogue.texts[2:], self._dialogue.strips[2:])
        return self._text.encode([_fill(after, [answer])])[0]

    def text(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain texts, without control tokens."""
        return self._text.encode(list(texts))

    def _scaffold(self, roles: Sequence[str]) -> _Scaffold:
        names = [f"message{number}of{len(roles)}" for number in range(len(roles))]
        bare = _split(self._render(roles, names), names)
        padded = _split(self._render(roles, [f"{_PADDING}{name}{_PADDING}" for name in names]), names)
        strips = []
        expected = list(bare)
        for number in range(len(names)):
            left = not padded[number].endswith(_PADDING)
            right = not padded[number + 1].startswith(_PADDING)
            strips.append((left, right))
            expected[number] += "" if left else _PADDING
            expected[number + 1] = ("" if right else _PADDING) + expected[number + 1]
        if padded != expected:
            raise ConfigError(f"the chat template does not write messages unchanged; {ANOTHER_TEMPLATE}")
        return _Scaffold(bare, strips)

    def _render(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False, **self._settings
                )
            )
        except Exception as error:  # a template may raise anything
            raise ConfigError(
                f"the chat template fails on a dialogue of {', '.join(roles)} ({one_line(error, 300)}); "
                f"{ANOTHER_TEMPLATE}"
            ) from error

    def _check_ordinary_text(self, prompt: _Scaffold) -> None:
        expected = self._tokenizer(_fill(prompt, [_ORDINARY_TEXT]), add_special_tokens=False)["input_ids"]
        if self.prompts([_ORDINARY_TEXT]) != [expected]:
            raise ConfigError(
                f"the tokenizer ({type(self._tokenizer).__name__}) encodes ordinary text differently once its control "
                "tokens are separated; choose another model in model.name_or_path"
            )


class _TextEncoder:
    """Encodes text in which control tokens have an effect only where `mark` has renamed them.

    Control tokens are the tokenizer's special tokens, other added tokens that occur in the template's source or output,
    such as <tool_response>, and the tags of a thought.

    Attributes:
        written: the control tokens in `rendered`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, rendered: list[str]) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ConfigError(
                f"the tokenizer ({type(tokenizer).__name__}) has no tokenizer.json, which is needed to separate text "
                "from control tokens; save the model's fast tokenizer beside it"
            )
        nonce = secrets.token_hex(8)
        structure = "".join([THOUGHT, THOUGHT_END, template, *rendered])
        self._ids = {
            token.content: index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content in structure and _looks_like_control(token.content))
        }
        self._names = {content: f"\ue000{nonce}{index}\ue001" for content, index in self._ids.items()}
        found = {index for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"] for index in ids}
        self.written = {content for content, index in self._ids.items() if index in found}
        longest_first = sorted(self.written, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._encoder = Tokenizer.from_str(_renamed(backend.to_str(), self._names))
        encoder_ids = {self._encoder.token_to_id(name): self._ids[content] for content, name in self._names.items()}
        self._translation = {found: index for found, index in encoder_ids.items() if found != index}

    def mark(self, scaffold: _Scaffold) -> _Scaffold:
        """The scaffold with its control tokens renamed."""
        texts = [self._pattern.sub(lambda found: self._names[found[0]], text) for text in scaffold.texts]
        return _Scaffold(texts, scaffold.strips)

    def first_control(self, text: str) -> set[int]:
        """The id of the control token at the start of the text, ignoring white space; empty if there is none."""
        found = self._pattern.match(text.lstrip())
        return {self._ids[found[0]]} if found else set()

    def encode(self, texts: list[str]) -> list[list[int]]:
        encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        if not self._translation:
            return [encoding.ids for encoding in encodings]
        return [[self._translation.get(index, index) for index in encoding.ids] for encoding in encodings]


def _looks_like_control(token: str) -> bool:
    """False for words, white space and punctuation, which some tokenizers add as tokens too."""
    return len(token) > 2 and any(character.isalpha() for character in token) and not token.strip().isalnum()


def _renamed(backend: str, names: Mapping[str, str]) -> str:
    """A tokenizer's JSON in which some tokens are renamed, so that no text and no merge produces them."""
    settings = json.loads(backend)
    settings |= {"truncation": None, "padding": None, "post_processor": None}
    for token in settings["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = settings["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if merges := model.get("merges"):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
    return json.dumps(settings)


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the template used to render a dialogue."""
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        template = tokenizer.chat_template
        if isinstance(template, dict):
            raise ConfigError(
                f"its tokenizer has chat templates called {', '.join(template)}, but no default; name one of them in "
                "model.chat_template"
            ) from error
        raise ConfigError(
            "its tokenizer has no chat template, so it is a base model; set model.chat_template=plain (### User, "
            "### Assistant), or to a file with a template of your own"
        ) from error


def _split(rendered: str, names: Sequence[str]) -> list[str]:
    """The text before, between and after the placeholders."""
    parts = []
    for name in names:
        before, found, rendered = rendered.partition(name)
        if not found or name in rendered:
            raise ConfigError(f"the chat template must write every message once and in order; {ANOTHER_TEMPLATE}")
        parts.append(before)
    return [*parts, rendered]


def _fill(scaffold: _Scaffold, messages: Sequence[str]) -> str:
    parts = [scaffold.texts[0]]
    for message, (left, right), text in zip(messages, scaffold.strips, scaffold.texts[1:], strict=True):
        message = message.lstrip() if left else message
        parts += [message.rstrip() if right else message, text]
    return "".join(parts)
