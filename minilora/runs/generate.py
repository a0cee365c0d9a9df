"""`minilora generate`: continue a text, or answer in a chat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minilora.models.generate import generate_text
from minilora.runs.run_file import is_decoder, open_model, tokenizer_of


def generate_run(
    path: str,
    prompt: str,
    *,
    adapter: str | Path | None = None,
    backend: str = "auto",
    allow_other_weights: bool = False,
    chat: bool = False,
    system: str | None = None,
    tokens: int = 400,
    temperature: float = 0.7,
    seed: int = 0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    show: Callable[[str], None] = lambda piece: None,
) -> dict[str, Any]:
    """The text that a model generates after a prompt, with chat=True after that as the user's turn in the model's chat template.

    show: called with each piece of text; the first piece starts with the prompt, unless in a chat. Returns the prompt and what
    `generate_text` returns, which also explains the other arguments. Raises ValueError for a model that is not a decoder.
    """
    if system is not None and not chat:
        raise ValueError("--system is a turn of a conversation; give --chat too.")
    model = open_model(path, backend, adapter, allow_other_weights=allow_other_weights)
    if not is_decoder(model):
        raise ValueError(f"{path} ({type(model).__name__}) does not generate text: it is not a decoder.")
    tokenizer = tokenizer_of(path, model.config.vocab_size)
    before = "" if chat else prompt
    if chat:
        turns = [("user", prompt)] if system is None else [("system", system), ("user", prompt)]
        prompt = tokenizer.render([{"role": role, "content": content} for role, content in turns], add_generation_prompt=True)
        ids = tokenizer.encode(prompt, add_special=False)
    else:
        ids = tokenizer.encode_prompt(prompt)

    def show_piece(piece: str) -> None:
        nonlocal before  # the prompt is shown with the first piece, after every check
        show(before + piece)
        before = ""

    options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "stop": stop}
    result = generate_text(model, tokenizer, ids, tokens, temperature, seed, **options, show=show_piece)
    show_piece("\n")
    return {"prompt": prompt, **result}
