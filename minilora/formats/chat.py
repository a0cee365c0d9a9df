"""Chat templates: conversations as text, in the format a model was trained on. Rendered by jinja2 in its sandbox.

A template comes from the publisher of the model: it receives plain data only, cannot leave the sandbox, and runs in a process with limits
of time, memory and output (sandbox.py).
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from os.path import commonprefix
from pathlib import Path
from typing import Any

from minilora.formats import extra, sandbox
from minilora.formats.atomic import read_json
from minilora.formats.sandbox import MARKS

Messages = Sequence[dict[str, Any]]  # {"role": "user", "content": "..."} each
Span = tuple[int, int]  # (first character, last + 1)

_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_REASONING = ("reasoning_content", "thinking", "reasoning")


def find_chat_template(folder: str | Path) -> str | None:
    """The template in a model folder: chat_template.jinja and additional_chat_templates/*.jinja, or those in tokenizer_config.json.

    Of several, "default", and "tool_use" where there are tools, as in transformers. Raises ValueError for one that is not text.
    """
    folder, named = Path(folder), {}
    for file in (folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))):
        try:
            if file.is_file():
                named["default" if file.parent == folder else file.stem] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8.") from None
    named = named or _templates_in_config(folder / "tokenizer_config.json")
    if "tool_use" in named:
        default = named.get("default", "{{ raise_exception('none of the templates is the default') }}")
        parts = "{% if tools is not none %}", named["tool_use"], "{% else %}", default, "{% endif %}"
        return "{{ '' }}".join(part.removesuffix("\n") for part in parts)  # '' keeps jinja2 from trimming space beside a block
    return named.get("default")


def _templates_in_config(config: Path) -> dict[str, str]:
    """{name: template} in tokenizer_config.json: one string, or a list of {"name", "template"}."""
    found = read_json(config, {}).get("chat_template") or {}
    try:
        found = {entry["name"]: entry["template"] for entry in found} if isinstance(found, list) else found
        named = found if isinstance(found, dict) else {"default": found}
        if all(isinstance(text, str) for text in named.values()):
            return named
    except (TypeError, KeyError):
        pass
    raise ValueError(f'{config}: chat_template must be a string or a list of {{"name", "template"}}.')


def render_chat(template: str | None, messages: Messages, add_generation_prompt: bool = False, **more: Any) -> str:
    """The conversation as text; with `add_generation_prompt`, also the text that introduces an answer of the assistant.

    `more`: tools and documents (lists of objects), and the special tokens available to a template (bos_token, eos_token, ...), as in
    `Tokenizer.special_tokens`. Encode the text with add_special=False: the template writes the special tokens itself. Special tokens
    in a message are recognised too, as in transformers. Raises ValueError when there is no template, or it is invalid, refuses the
    messages, tries to leave the sandbox or exceeds a limit; ImportError without jinja2.
    """
    return _render(template, messages, add_generation_prompt, more)[0]


def _render(template: str | None, messages: Messages, prompt: bool, more: dict[str, Any]) -> tuple[str, list[Span]]:
    """(the text, the spans of its {% generation %} blocks)."""
    if template is None:
        raise ValueError(
            "this model has no chat template; put one into chat_template.jinja in its folder (as transformers writes it), "
            'or use records of "prompt" and "completion" instead of "messages".'
        )
    plain = [_plain(i, message) for i, message in enumerate(messages)]
    for name in ("tools", "documents"):
        if not isinstance(value := more.get(name) or [], list) or not all(isinstance(item, dict) for item in value):
            raise ValueError(f'"{name}" must be a list of objects.')
    context = {"tools": None, "documents": None}  # templates test these
    context |= {name: value for name, value in more.items() if value not in (None, "")}
    try:
        text = json.dumps({**context, "messages": plain}, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("messages must consist of strings, numbers, lists and objects only.") from None
    marks = f"[{''.join(MARKS)}]"
    if (marked := marks_answers(template)) and re.search(marks, template + text):
        raise ValueError(f"messages and the chat template must not contain the noncharacters {' and '.join(map(ascii, MARKS))}.")
    extra("jinja2", "hf", "a chat template")
    text = sandbox.render(_GENERATION.sub(_as_filter, template), {**context, "messages": plain, "add_generation_prompt": prompt})
    pieces = re.split(marks, text) if marked else [text]
    bounds = list(accumulate(map(len, pieces)))
    return "".join(pieces), list(zip(bounds[:-1:2], bounds[1:-1:2], strict=True))


def _plain(i: int, message: Any) -> dict[str, Any]:
    """A message as transformers passes it to a template: reasoning has both of its names. None is left out, but as the content of calls.

    Raises ValueError for one without a role, or with neither text nor calls of tools.
    """
    calls = isinstance(message, dict) and message.get("tool_calls") is not None
    kept = ["content"] if calls else []  # templates ask whether it is none
    message = {key: value for key, value in message.items() if value is not None or key in kept} if isinstance(message, dict) else {}
    if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str | None if calls else str):
        raise ValueError(f'message {i + 1} must be an object with the strings "role" and "content".')
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def marks_answers(template: str | None) -> bool:
    """Whether the template marks what the assistant writes with {% generation %}."""
    return template is not None and _GENERATION.search(template) is not None


def assistant_spans(template: str | None, messages: Messages, ends: Sequence[str] = (), **more: Any) -> tuple[str, Iterator[Span]]:
    """(the text, an iterator over the spans of what the assistant wrote); `more` as in `render_chat`.

    {% generation %} blocks of the template are the spans, as in transformers. Otherwise a turn starts after the text that introduces an
    answer, and ends with its last special token (eos_token, or one of `ends`) if only white space follows, or before the next message.
    Turns are located by rendering the conversation up to each, so callers should stop early where they can.
    Where the assistant begins, or the template rewrites a turn once others follow it (Qwen3 drops its thinking, Phi-3 its end token), a
    turn is the part of the text that changes with its content, and the end token after it.
    A message with "weight": 0 or "train": false has no span. Raises ValueError as `render_chat`, and when a turn is not found.
    """

    text, marked = _render(template, messages, False, more)
    trained = [_is_trained(i, message) for i, message in enumerate(messages)]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if marks_answers(template) and all(trained[i] for i in answers):
        return text, iter(marked)
    if marks_answers(template):
        if len(answers) != len(marked):
            raise ValueError('the chat template does not mark every answer, so "weight" and "train" cannot be applied.')
        return text, (span for i, span in zip(answers, marked, strict=True) if trained[i])

    def render(messages: Messages, prompt: bool = False) -> str:
        return _render(template, messages, prompt, more)[0]

    def past_mark(rest: str) -> int:
        """The index after the last special token; 0 where there is none."""
        return max((rest.rfind(mark) + len(mark) for mark in (more.get("eos_token"), *ends) if mark and mark in rest), default=0)

    def within(i: int, through: str) -> tuple[int, int, str]:
        """(start, end, the text that ends it) of answer i, found by comparison with another answer in its place."""
        for letter in "axz":  # one of these is neither the first nor the last of the content
            short = [*messages[:i], {"role": "assistant", "content": letter}]
            other = render([*short, *messages[i + 1 :]])
            start = len(_common(text, other))
            after = len(_common(text[start:][::-1], other[start:][::-1]))
            if other[start : len(other) - after].strip() == letter:
                end, rest = len(text) - after, _common(through[::-1], render(short)[::-1])[::-1]
                shared = _common(rest, text[end:])
                return start, end, shared if shared == rest else shared[: past_mark(shared)]
        raise ValueError(
            f"the chat template changes message {i + 1}, so its tokens cannot be located; "
            "end every conversation after its first answer, or train on all of it (--no-mask-prompt)."
        )

    def turn(i: int) -> Span:
        """The span of answer i and its end token. An empty conversation lacks the system prompt that precedes a first message."""
        through = render(messages[: i + 1]) if i + 1 < len(messages) else text
        try:
            opened = render(messages[:i], prompt=True) if i else None
            before = opened if opened is None or through.startswith(opened) else render(messages[:i])
        except ValueError:
            opened = before = None
        if opened is not None and before is not None and through.startswith(before) and text.startswith(through):
            start = end = max(len(before), len(_common(opened, through)))  # the turn may open differently from the prompt
            rest = through[start:]
        else:
            start, end, rest = within(i, through)
        past = past_mark(rest)
        return start, end + (past if past and not rest[past:].strip() else len(rest))

    return text, (turn(i) for i in answers if trained[i])


def _common(one: str, other: str) -> str:
    """The common prefix of two strings."""
    return commonprefix([one, other])  # noqa: RUF071 - of strings, not of paths


def _is_trained(i: int, message: dict[str, Any]) -> bool:
    """Whether "weight" (1 or 0) and "train" (true or false) include a message. Raises ValueError for other values, or a user's message."""
    flags = {name: message[name] for name in ("weight", "train") if message.get(name) is not None}
    for name, value in flags.items():
        if value not in (0, 1) or (value and message["role"] != "assistant"):
            raise ValueError(f'message {i + 1}: "{name}" is {value!r}; it must be 1 or 0, and 1 for answers of the assistant only.')
    return all(flags.values())


def turn_end(template: str | None, ends: Sequence[str], **more: Any) -> str | None:
    """The token of `ends` with which the template ends an answer, or None. `more` as in `render_chat`."""
    answer = "an answer"
    try:
        text = render_chat(template, [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}], **more)
    except ValueError:
        return None
    rest = text.rpartition(answer)[2].lstrip()
    return max((mark for mark in ends if rest.startswith(mark)), key=len, default=None)


def _as_filter(tag: re.Match[str]) -> str:
    """{% generation %} ... {% endgeneration %}, which some templates put around answers, as a filter of its content."""
    return f"{{%{tag[1]} {'endfilter' if tag[2] else 'filter generation'} {tag[3]}%}}"
