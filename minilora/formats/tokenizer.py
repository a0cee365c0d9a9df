"""Text to token ids and back: bytes for the bundled model, `tokenizer.json` (tokenizers library), the vocabulary of a GGUF file.

Nothing here pads or truncates: sequences are packed, and callers that shorten one report it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from minilora.formats.atomic import read_json, write_file, write_json
from minilora.formats.chat import Messages, find_chat_template, render_chat, turn_end
from minilora.formats.gguf import read_gguf_tokenizer
from minilora.formats.tokenizer_files import library_errors, read_tokenizer
from minilora.formats.tokenizer_gguf import from_metadata


class Tokenizer(ABC):
    """The interface of all tokenizers."""

    vocab_size: int  # the largest id + 1
    bos_id: int | None = None
    eos_id: int | None = None
    prefix: tuple[int, ...] = ()  # the ids that `encode` puts before a text
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = MappingProxyType({})  # those available to a chat template: {"bos_token": "<s>", ...}
    added: Mapping[str, int] = MappingProxyType({})  # {token: id} of the tokens that are matched before a text is split
    special_ids: frozenset[int] = frozenset()  # those that `decode` can skip
    byte_ids: frozenset[int] = frozenset()  # the tokens that stand for a single byte

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a generated text."""
        return frozenset()

    @abstractmethod
    def encode(self, text: str, add_special: bool = True) -> np.ndarray:
        """Ids (T,), int64. Special tokens in the text are recognised; add_special adds those that the model expects around it.

        Raises ValueError for an unpaired surrogate, and where the tokenizers library fails.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become replacement characters."""

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids (T,) of a text to continue: with `prefix`, but without the special tokens that `encode` appends."""
        return self.begin(self.encode(text, add_special=False))

    def begin(self, ids: np.ndarray) -> np.ndarray:
        """The ids with `prefix` before them, unless they start with it."""
        present = tuple(ids[: len(self.prefix)].tolist()) == self.prefix
        return ids if present else np.concatenate([np.array(self.prefix, dtype=np.int64), ids])

    @abstractmethod
    def offsets(self, text: str) -> np.ndarray:
        """The character span [first, last + 1) of each token of encode(text, add_special=False), (T, 2)."""

    def token(self, id: int | None) -> str:
        """One token as it is written in a text; "" for None."""
        return "" if id is None else self.decode([id])

    def render(self, messages: Messages, add_generation_prompt: bool = False, **more: Any) -> str:
        """The messages as text, by this tokenizer's chat template and special tokens; arguments and errors as in `render_chat`."""
        return render_chat(self.chat_template, messages, add_generation_prompt, **self.special_tokens, **more)

    def save(self, folder: str | Path) -> None:
        """Write the files that transformers and `load_tokenizer` read: tokenizer.json, its settings, the stop_ids. Bytes need none."""
        return None

    def save_stop_ids(self, folder: str | Path) -> None:
        """Set eos_token_id to the stop_ids in generation_config.json, where transformers looks for them; other keys are kept."""
        file = Path(folder) / "generation_config.json"
        if self.stop_ids:
            write_json(file, {**read_json(file, {}), "eos_token_id": sorted(self.stop_ids)})

    def stream(self, ids: Iterable[int], skip_special: bool = False, after: Iterable[int] = ()) -> Iterator[str]:
        """Decode ids as they arrive, in pieces that end at complete characters. The pieces joined are what the ids add to the text of
        those in `after`.

        Part of a character decodes to replacement characters at the end: they are held back until the next token. So is a run of
        single-byte tokens, which some decoders decode together.
        """
        seen, in_bytes = [int(id) for id in after], False
        shown = len(self.decode(seen, skip_special))
        for id in map(int, ids):
            seen.append(id)
            in_bytes = id in self.byte_ids or (in_bytes and skip_special and id in self.special_ids)
            complete = "" if in_bytes else self.decode(seen, skip_special).rstrip("\ufffd")
            if len(complete) > shown:
                yield complete[shown:]
                shown = len(complete)
        if rest := self.decode(seen, skip_special)[shown:]:
            yield rest


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids, 0 to 255. No special tokens."""

    vocab_size = 256

    def encode(self, text: str, add_special: bool = True) -> np.ndarray:
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int64)

    def offsets(self, text: str) -> np.ndarray:
        first = np.repeat(np.arange(len(text)), [len(char.encode("utf-8")) for char in text])
        return np.stack([first, first + 1], axis=1)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")


class HFTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, with padding and truncation switched off.

    stop_ids: ids that end a text, besides eos_id and the token that ends an answer in the chat template. tokens: the special tokens
    by name. where: the file that errors name.
    """

    def __init__(
        self,
        library: Any,
        bos_id: int | None = None,
        eos_id: int | None = None,
        stop_ids: Iterable[int | None] = (),
        chat_template: str | None = None,
        tokens: dict[str, str] | None = None,
        where: str | Path = "the tokenizer",
    ) -> None:
        library.no_padding()
        library.no_truncation()
        self.library, self.failed = library, f"{where}: the tokenizers library failed"
        self.vocab_size = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id, self.eos_id = bos_id, eos_id
        added = library.get_added_tokens_decoder()
        self.added = {token.content: id for id, token in added.items()}
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        falls_back = "ByteFallback" in repr(library.decoder)
        self.byte_ids = frozenset(i for b in range(256) if falls_back and (i := library.token_to_id(f"<0x{b:02X}>")) is not None)
        self.chat_template = chat_template
        named = {"bos_token": self.token(bos_id), "eos_token": self.token(eos_id)} if tokens is None else tokens
        self.special_tokens = {name: token for name, token in named.items() if token}
        self.ends = frozenset(id for id in (eos_id, *stop_ids) if id is not None)
        probe, alone = self.encode("a"), self.encode("a", add_special=False)
        starts = (i for i in range(len(probe)) if np.array_equal(probe[i : i + len(alone)], alone))
        self.prefix = tuple(probe[: next(starts, 0)].tolist())

    @property
    def stop_ids(self) -> frozenset[int]:  # rendering needs jinja2, and reading does not
        end = turn_end(self.chat_template, list(self.added), **self.special_tokens) if self.chat_template else None
        return self.ends | ({self.added[end]} if end else set())

    def encode(self, text: str, add_special: bool = True) -> np.ndarray:
        _utf8(text)
        with library_errors(self.failed):
            return np.array(self.library.encode(text, add_special_tokens=add_special).ids, dtype=np.int64)

    def offsets(self, text: str) -> np.ndarray:
        with library_errors(self.failed):
            return np.array(self.library.encode(text, add_special_tokens=False).offsets, dtype=np.int64).reshape(-1, 2)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        with library_errors(self.failed):
            return self.library.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token(self, id: int | None) -> str:
        return "" if id is None else self.library.id_to_token(id) or ""

    def save(self, folder: str | Path) -> None:
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.special_tokens,
            "eos_token": self.token(self.eos_id) or self.special_tokens.get("eos_token"),
            "chat_template": self.chat_template,
            "add_prefix_space": "add_prefix_space=True" in repr(self.library.pre_tokenizer) or None,  # Qwen2's class reads it from here
            "split_special_tokens": self.library.encode_special_tokens or None,
        }
        write_file(Path(folder) / "tokenizer.json", self.library.save)
        write_json(Path(folder) / "tokenizer_config.json", {name: value for name, value in settings.items() if value is not None})
        self.save_stop_ids(folder)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:  # from JSON, or from a shell that is not set to UTF-8
        raise ValueError(f"the text has an unpaired surrogate at character {error.start}; remove it.") from None


def load_tokenizer(path: str | Path, vocab_size: int | None) -> Tokenizer:
    """The tokenizer of a model folder, a tokenizer.json, or a .gguf file, for a model whose embedding has `vocab_size` rows
    (None: the number in a .gguf file, or any).

    A folder without tokenizer.json and a vocabulary of 256 is a byte-level model. Raises FileNotFoundError when there is no tokenizer,
    ValueError when a file is invalid or the ids exceed the embedding, ImportError when an extra is missing.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        rows, vocabulary = read_gguf_tokenizer(path)
        return gguf_tokenizer(vocabulary, vocab_size or rows, path)
    file = path if path.suffix == ".json" else path / "tokenizer.json"
    if not file.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {file.parent} to read a tokenizer from.")
    if file.is_file():
        return _from_file(file, vocab_size)
    if vocab_size == ByteTokenizer.vocab_size:
        return ByteTokenizer()
    raise FileNotFoundError(
        f"{file.parent} has no tokenizer.json, and {vocab_size} tokens are not bytes; save the model's fast tokenizer there."
    )


def gguf_tokenizer(vocabulary: dict[str, Any], vocab_size: int, path: str | Path = "the GGUF file") -> HFTokenizer:
    """The tokenizer in the metadata of a GGUF file, as returned by `read_gguf_tokenizer`. Raises as `from_metadata`."""
    return _checked(HFTokenizer(**from_metadata(vocabulary, path), where=path), vocab_size, path)


def _from_file(file: Path, vocab_size: int | None) -> HFTokenizer:
    """tokenizer.json with the files beside it. Its own end token comes first, then the stop ids of the model's configuration."""
    library, tokens = read_tokenizer(file)
    bos, eos = (library.token_to_id(tokens[name]) if name in tokens else None for name in ("bos_token", "eos_token"))
    ends: list[Any] = [eos]
    for beside in ("generation_config.json", "config.json"):
        ids = read_json(file.with_name(beside), {}).get("eos_token_id")
        ends += ids if isinstance(ids, list) else [ids]
    ends = [id for id in ends if type(id) is int and 0 <= id < 2**32 and library.id_to_token(id) is not None]
    tokenizer = HFTokenizer(library, bos, next(iter(ends), None), ends, find_chat_template(file.parent), tokens, file)
    return _checked(tokenizer, vocab_size, file)


def _checked(tokenizer: HFTokenizer, vocab_size: int | None, path: str | Path) -> HFTokenizer:
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model's embedding has {vocab_size} rows; "
            "use the model's own tokenizer."
        )
    return tokenizer
