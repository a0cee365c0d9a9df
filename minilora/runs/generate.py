"""`minilora generate`: continue a text, or answer in a chat."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilora.data.records import note
from minilora.models.decoder import Decoder
from minilora.models.generate import generate_text
from minilora.runs.run_file import open_model, tokenizer_of


def generate_run(
    model: str | Path,
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
    show: Callable[[str], None] = lambda piece: None,
    **options: Any,
) -> dict[str, Any]:
    """The text that a model generates after a prompt, with chat=True after that as the user's turn in the model's chat template.

    show: called with each piece of text; the first piece starts with the prompt, unless in a chat. options: top_k, top_p and stop, see
    `generate_text`. Returns the prompt and what `generate_text` returns. Raises ValueError for a model that is not a decoder.
    """
    if system is not None and not chat:
        raise ValueError("--system is a turn of a conversation; give --chat too.")
    opened = open_model(model, backend, adapter, allow_other_weights=allow_other_weights)
    if not isinstance(opened, Decoder):
        raise ValueError(f"{model} ({type(opened).__name__}) does not generate text: it is not a decoder.")
    tokenizer = tokenizer_of(model, opened.config.vocab_size)
    before = "" if chat else prompt
    if chat:
        turns = ([] if system is None else [{"role": "system", "content": system}]) + [{"role": "user", "content": prompt}]
        prompt = tokenizer.render(turns, add_generation_prompt=True)
    ids = tokenizer.encode(prompt, add_special=False) if chat else tokenizer.encode_prompt(prompt)

    def show_piece(piece: str) -> None:
        nonlocal before  # the prompt is shown with the first piece, after every check
        show(before + piece)
        before = ""

    result = generate_text(opened, tokenizer, ids, tokens, temperature, seed, **options, show=show_piece)
    show_piece("\n")
    if (total := len(ids) + result["tokens"]) > (limit := opened.config.longest_sequence):
        note(f"warning: the text has {total} tokens, and the model reads {limit}: the older half was forgotten each time that it was full.")
    return {"prompt": prompt, **result}
