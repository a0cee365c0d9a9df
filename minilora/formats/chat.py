"""Chat templates: conversations as text, as the model was trained to read them. Rendered by jinja2 in its sandbox.

A template comes with the model, from whoever published it: it sees plain data only, and reaches nothing outside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from minilora.formats.atomic import read_json

Messages = Sequence[dict[str, Any]]  # {"role": "user", "content": "..."} each

_NONE = (
    "this model has no chat template; put one into chat_template.jinja in its folder (as transformers writes it), "
    'or use records of "prompt" and "completion" instead of "messages".'
)


def find_chat_template(folder: str | Path) -> str | None:
    """The template in a model folder: chat_template.jinja, or chat_template of tokenizer_config.json (of several, "default")."""
    folder = Path(folder)
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        try:
            named = {entry["name"]: entry["template"] for entry in template}
        except (TypeError, KeyError):
            raise ValueError(f'{config}: chat_template must be a string or a list of {{"name", "template"}}.') from None
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{config}: chat_template must be a string, got {type(template).__name__}.")
    return template


def render_chat(
    template: str | None, messages: Messages, add_generation_prompt: bool = False, bos_token: str = "", eos_token: str = ""
) -> str:
    """The conversation as text; with `add_generation_prompt` also what stands before an answer of the assistant.

    Encode it with add_special=False: the template writes the special tokens itself. Raises ValueError when there is no template,
    when it is broken, refuses the messages or tries to leave its sandbox; ImportError when jinja2 is missing.
    """
    if template is None:
        raise ValueError(_NONE)
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f'message {i + 1} must be an object with the strings "role" and "content".')
    try:
        plain = json.loads(json.dumps(list(messages)))  # plain data: no object with methods gets in
    except (TypeError, ValueError):
        raise ValueError("messages must hold nothing but strings, numbers, lists and objects.") from None
    compiled = _compile(template)
    with _told():
        return compiled.render(
            messages=plain,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
            tools=None,  # templates ask whether there are any
            documents=None,
        )


def assistant_spans(
    template: str | None, messages: Messages, bos_token: str = "", eos_token: str = ""
) -> tuple[str, list[tuple[int, int]]]:
    """(the whole text, [(first, past the last character) of what the assistant wrote]).

    A turn begins after what the template writes before an answer, and ends with the end-of-text token if the template writes it:
    white space after that is not the assistant's. Found by rendering the conversation up to each turn. Raises ValueError as
    `render_chat` does, and when the template writes a turn differently once others follow it.
    """

    def render(n: int, prompt: bool = False) -> str:
        return render_chat(template, messages[:n], prompt, bos_token, eos_token)

    text, spans = render(len(messages)), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, through = render(i), render(i + 1)
        if not (through.startswith(before) and text.startswith(through)):
            raise ValueError(
                f"the chat template writes message {i + 1} differently when others follow, so its tokens cannot be told from the rest; "
                "let every conversation end with its first answer, or learn from all of it (--no-mask-prompt)."
            )
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(render(i, prompt=True), through, strict=False)))
        start = max(len(before), alike)  # mostly the whole prompt; less where a template opens answers in a way that this one does not
        end = len(through)
        if eos_token:
            past = through.rfind(eos_token, start) + len(eos_token)
            if past > start and not through[past:].strip():
                end = past
        spans.append((start, end))
    return text, spans


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    """The template in the environment that transformers gives it, in a sandbox that refuses at the first step out."""
    _check_version()
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"access to attribute {attribute!r}")  # jinja2 would go on with an undefined value

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, which some templates put around answers: what is inside, as it is."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class PlainNamespace(Namespace):
        """jinja2's namespace without names by which Python would find methods."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`, so that namespace(self=...) works as in jinja2's own
            Namespace.__init__(args[0])
            for name, value in dict(*args[1:], **kwargs).items():
                args[0][name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace with the name {name!r}")
            super().__setitem__(name, value)

    def plain_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:  # a function: the type itself has methods to reach for
        return dict(*args, **kwargs)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # jinja2's own escapes HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, namespace=PlainNamespace, dict=plain_dict)
    with _told():
        return environment.from_string(template)


def _check_version() -> None:
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise ImportError("chat templates need jinja2: pip install 'minilora[hf]'") from None
    from importlib.metadata import version

    if tuple(int(part) for part in version("jinja2").split(".")[:3] if part.isdigit()) < (3, 1, 6):
        raise ImportError(f"jinja2 {version('jinja2')} has known ways out of its sandbox; pip install 'jinja2>=3.1.6'")


@contextmanager
def _told() -> Iterator[None]:
    """Turns whatever a template raises into a ValueError of one sentence."""
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

    try:
        yield
    except Exception as error:
        if isinstance(error, SecurityError):
            what = "tries to leave its sandbox"
        elif isinstance(error, TemplateSyntaxError):
            what = f"is broken at line {error.lineno}"
        elif type(error) is TemplateError:
            what = "refuses these messages"
        else:
            what = f"fails with {type(error).__name__}"
        raise ValueError(f"the chat template {what} ({str(error).rstrip('.')}).") from None
