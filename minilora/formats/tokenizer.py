"""Text to token ids and back: bytes for the bundled model, `tokenizer.json` by the tokenizers library, the vocabulary of a GGUF file.

No padding and no truncation anywhere: sequences are laid end to end, and who cuts one says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.atomic import read_json, write_file, write_json
from minilora.formats.chat import Messages, find_chat_template, render_chat, turn_end
from minilora.formats.tokenizer_files import import_tokenizers, library_errors, read_tokenizer, split_in_bytes


class Tokenizer(ABC):
    """What the rest of the package knows of a tokenizer.

    vocab_size      the largest id + 1
    bos_id, eos_id  None where there are none
    prefix          the ids that `encode` puts in front of a text
    special_tokens  those that a chat template may write, by name: {"bos_token": "<s>", ...}
    added           {token: id} of the tokens that are found in a text before it is split
    special_ids     those of them that `decode` may leave out
    byte_ids        the tokens that stand for one byte of a character
    clean_up        does `decode` take spaces out again, before full stops and the like?
    """

    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    prefix: tuple[int, ...] = ()
    chat_template: str | None = None
    special_tokens: dict[str, str] = {}  # noqa: RUF012 - never changed
    added: dict[str, int] = {}  # noqa: RUF012
    special_ids: frozenset[int] = frozenset()
    byte_ids: frozenset[int] = frozenset()
    clean_up: bool = False

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a text when a model writes one."""
        return frozenset()

    @abstractmethod
    def encode(self, text: str, add_special: bool = True) -> np.ndarray:
        """Ids (T,), int64. Special tokens spelled out in the text are recognised; add_special adds those that the model wants around it.

        Raises ValueError for half of a surrogate pair, and where the tokenizers library fails.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become replacement characters."""

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids (T,) of a text that is to go on: with the tokens that `encode` puts in front, once, and none behind."""
        return self.begin(self.encode(text, add_special=False))

    def begin(self, ids: np.ndarray) -> np.ndarray:
        """Ids of a text with `prefix` in front, unless the text spells it itself."""
        there = tuple(ids[: len(self.prefix)].tolist()) == self.prefix
        return ids if there else np.concatenate([np.array(self.prefix, dtype=np.int64), ids])

    @abstractmethod
    def offsets(self, text: str) -> np.ndarray:
        """(T, 2): the first character and that past the last one of each token of encode(text, add_special=False)."""

    def token(self, id: int | None) -> str:
        """One token as it is spelled in a text, for chat templates; "" for None."""
        return "" if id is None else self.decode([id])

    def render(self, messages: Messages, add_generation_prompt: bool = False, **more: Any) -> str:
        """Messages as text by the chat template, with this tokenizer's special tokens; arguments and errors as `render_chat`'s."""
        return render_chat(self.chat_template, messages, add_generation_prompt, **self.special_tokens, **more)

    def save(self, folder: str | Path) -> None:
        """Write the files that transformers and `load_tokenizer` read: tokenizer.json, its settings, the stop_ids. For bytes, nothing."""
        return None

    def save_stop_ids(self, folder: str | Path) -> None:
        """Name all stop_ids in generation_config.json, where transformers looks for them; what else it says stays."""
        file = Path(folder) / "generation_config.json"
        if self.stop_ids:
            write_json(file, {**(read_json(file) if file.is_file() else {}), "eos_token_id": sorted(self.stop_ids)})

    def stream(self, ids: Iterable[int], skip_special: bool = False, after: Iterable[int] = ()) -> Iterator[str]:
        """The text of ids as they come, in pieces that end at complete characters. Joined, they are `decode` of all ids; with the ids
        that they come `after`, what they add to the text of those.

        A token may hold part of a character, which decodes to replacement characters at the end: they wait for the next token. So does
        a run of tokens of single bytes, which some decoders read as a whole. Only the tokens since the last piece but one are decoded
        again; as decoders may drop a space before the first word they see, these must hold a word that has been shown.
        """
        window = [int(id) for id in after]
        context, shown, in_bytes = len(window), len(self.decode(window, skip_special)), False  # `shown` characters of window[:context]
        if self.clean_up:  # every token may change what stands before it: all in one piece
            yield from filter(None, [self.decode([*window, *ids], skip_special)[shown:]])
            return
        for id in map(int, ids):
            window.append(id)
            in_bytes = id in self.byte_ids or (in_bytes and skip_special and id in self.special_ids)
            if in_bytes:
                continue
            text = self.decode(window, skip_special)
            whole = text.rstrip("\ufffd")
            if len(whole) > shown:
                yield whole[shown:]
                shown = len(whole)
            if len(whole) == len(text) and self.decode(window[context:], skip_special).strip():  # forget the tokens before the last piece
                window, context = window[context:], len(window) - context
                shown = len(self.decode(window, skip_special))
        rest = self.decode(window, skip_special)[shown:]
        if rest:
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
    """A tokenizer of the tokenizers library, with its padding and truncation switched off.

    `tokens` are its special tokens by name; `stop_ids` end a text as eos_id does, and as does the token that ends an answer in the
    chat template; where: the file that errors name.
    """

    def __init__(
        self,
        library: Any,
        bos_id: int | None = None,
        eos_id: int | None = None,
        stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
        tokens: dict[str, str] | None = None,
        clean_up: bool = False,
        where: str | Path = "the tokenizer",
    ) -> None:
        library.no_padding()
        library.no_truncation()
        self.library, self.where, self.clean_up = library, str(where), clean_up
        self.vocab_size = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id, self.eos_id = bos_id, eos_id
        added = library.get_added_tokens_decoder()
        self.added = {token.content: id for id, token in added.items()}
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        falls_back = "ByteFallback" in repr(library.decoder)
        self.byte_ids = frozenset(i for b in range(256) if falls_back and (i := library.token_to_id(f"<0x{b:02X}>")) is not None)
        self.chat_template = chat_template
        marks = {"bos_token": self.token(bos_id), "eos_token": self.token(eos_id)} if tokens is None else tokens
        self.special_tokens = {name: token for name, token in marks.items() if token}
        self.ends = frozenset(stop_ids) | {id for id in (eos_id,) if id is not None}
        probe, alone = self.encode("a"), self.encode("a", add_special=False)
        before = (i for i in range(len(probe)) if np.array_equal(probe[i : i + len(alone)], alone))
        self.prefix = tuple(probe[: next(before, 0)].tolist())

    @property
    def stop_ids(self) -> frozenset[int]:
        end = turn_end(self.chat_template, list(self.added), **self.special_tokens) if self.chat_template else None
        return self.ends | ({self.added[end]} if end else set())

    def encode(self, text: str, add_special: bool = True) -> np.ndarray:
        _utf8(text)
        with library_errors(self.where):
            return np.array(self.library.encode(text, add_special_tokens=add_special).ids, dtype=np.int64)

    def offsets(self, text: str) -> np.ndarray:
        with library_errors(self.where):
            return np.array(self.library.encode(text, add_special_tokens=False).offsets, dtype=np.int64).reshape(-1, 2)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        with library_errors(self.where):
            text = self.library.decode([int(i) for i in ids], skip_special_tokens=skip_special)
        for before, after in _CLEAN if self.clean_up else ():
            text = text.replace(before, after)
        return text

    def token(self, id: int | None) -> str:
        return "" if id is None else self.library.id_to_token(id) or ""

    def save(self, folder: str | Path) -> None:
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        settings |= {"eos_token": self.token(self.eos_id)} if self.eos_id is not None else {}
        settings |= {"chat_template": self.chat_template} if self.chat_template is not None else {}
        spaced = "add_prefix_space=True" in repr(self.library.pre_tokenizer)  # Qwen2's is built from the settings, whatever they name
        settings |= {"add_prefix_space": True} if spaced else {}
        settings |= {"split_special_tokens": True} if self.library.encode_special_tokens else {}
        settings |= {"clean_up_tokenization_spaces": True, _CLEAN_BPE: True} if self.clean_up else {}
        write_file(Path(folder) / "tokenizer.json", self.library.save)
        write_json(Path(folder) / "tokenizer_config.json", settings)
        self.save_stop_ids(folder)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may hold it, and a shell that is not set to UTF-8 gives it
        raise ValueError(f"the text holds half of a surrogate pair at character {error.start}, which is no text.") from None


_CLEAN_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
_CLEAN = [(f" {mark}", mark) for mark in ".?!,"] + [(" ' ", "'")] + [(f" {mark}", mark) for mark in ("n't", "'m", "'s", "'ve", "'re")]


def load_tokenizer(path: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model folder, of a tokenizer.json, or of a .gguf file, for a model whose embedding has `vocab_size` rows.

    A folder without tokenizer.json and a vocabulary of 256 is a model of bytes. Raises FileNotFoundError when there is none,
    ValueError when a file is not what it should be or the ids exceed the embedding, ImportError when an extra is missing.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        from minilora.formats.gguf import read_gguf_tokenizer

        return gguf_tokenizer(read_gguf_tokenizer(path)[1], vocab_size, path)
    folder, file = (path.parent, path) if path.suffix == ".json" else (path, path / "tokenizer.json")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to take a tokenizer from.")
    if not file.is_file():
        if vocab_size == ByteTokenizer.vocab_size:
            return ByteTokenizer()
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json, and {vocab_size} tokens are more than bytes; save its fast tokenizer there."
        )
    return _fitting(_from_file(file), vocab_size, file)


def gguf_tokenizer(vocabulary: Any, vocab_size: int, path: str | Path = "the GGUF file") -> HFTokenizer:
    """The byte-level BPE in the metadata of a GGUF file, as `read_gguf_tokenizer` gives them (its GGUFTokenizer).

    `pre` says how a text is split before the merges (`split_in_bytes`). Another way of splitting gives other ids for the same text, so
    others raise ValueError, as do SentencePiece vocabularies, and tokens and merges that do not fit. Bytes that no token stands for
    (SmolLM2 lacks 21) are dropped, as in the published tokenizers.
    """
    tokenizers, ends = import_tokenizers(), vocabulary.ends
    for name, of in (("tokens", str), ("merges", str), ("token_types", int)):
        if not isinstance(values := getattr(vocabulary, name), list) or not all(isinstance(value, of) for value in values):
            raise ValueError(f"{path}: the {name} of its tokenizer are not a list of {'texts' if of is str else 'numbers'}.")
    tokens, pre = vocabulary.tokens, vocabulary.pre
    if vocabulary.kind != "gpt2" or pre not in _PRE:
        raise ValueError(
            f"{path}: its tokenizer is of model {vocabulary.kind!r} and splits text as {pre!r}; supported: model 'gpt2' with "
            f"{', '.join(map(repr, _PRE))}. Give a folder with a tokenizer.json instead."
        )
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise ValueError(f"{path}: the token {twice!r} is in the vocabulary more than once.")
    if len(vocabulary.token_types) != len(tokens) or not isinstance(vocabulary.chat_template, str | None):
        raise ValueError(f"{path}: its tokenizer needs a type for each of {len(tokens)} tokens, and a chat template that is text.")
    merges = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    for merge in merges:
        if len(merge) != 2 or not all(part in ids for part in (*merge, "".join(merge))):
            raise ValueError(f"{path}: the merge {' '.join(merge)!r} is not of two tokens that give a third.")
    for name, id in (("bos", vocabulary.bos), ("eos", vocabulary.eos), *(("eot", end) for end in ends)):
        if id is not None and not (isinstance(id, int) and 0 <= id < len(tokens)):
            raise ValueError(f"{path}: {name} is token {id}, but there are {len(tokens)} tokens.")

    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=merges))
    split_in_bytes(library, pre)
    of_types = [(token, type) for token, type in zip(tokens, vocabulary.token_types, strict=True) if type in (_CONTROL, _USER_DEFINED)]
    library.add_tokens([tokenizers.AddedToken(token, normalized=False, special=type == _CONTROL) for token, type in of_types])
    if vocabulary.add_bos and vocabulary.bos is not None:
        bos = tokens[vocabulary.bos]
        library.post_processor = tokenizers.processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, vocabulary.bos)])
    return _fitting(HFTokenizer(library, vocabulary.bos, vocabulary.eos, ends, vocabulary.chat_template, where=path), vocab_size, path)


_PRE = ("smollm", "gpt-2", "qwen2")
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def _from_file(file: Path) -> HFTokenizer:
    """tokenizer.json with what the files beside it change. The ids of ends that they name come after the tokenizer's own end token."""
    library, tokens, config = read_tokenizer(file)
    bos, eos = (library.token_to_id(tokens[name]) if name in tokens else None for name in ("bos_token", "eos_token"))
    ends: list[Any] = [eos]
    for beside in (file.parent / name for name in ("generation_config.json", "config.json")):
        given = read_json(beside).get("eos_token_id") if beside.is_file() else None
        ends += given if isinstance(given, list) else [given]
    ends = [
        id for id in ends if isinstance(id, int) and not isinstance(id, bool) and 0 <= id < 2**32 and library.id_to_token(id) is not None
    ]
    clean = bool(config.get("clean_up_tokenization_spaces")) and (type(library.model).__name__ != "BPE" or bool(config.get(_CLEAN_BPE)))
    return HFTokenizer(library, bos, next(iter(ends), None), ends, find_chat_template(file.parent), tokens, clean, file)


def _fitting(tokenizer: HFTokenizer, vocab_size: int, path: str | Path) -> HFTokenizer:
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model's embedding has {vocab_size} rows; "
            "take the tokenizer that belongs to the model."
        )
    return tokenizer
