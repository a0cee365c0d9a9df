"""Text to token ids and back: bytes for the bundled model, `tokenizer.json` by the tokenizers library, the vocabulary of a GGUF file.

No padding and no truncation anywhere: sequences are laid end to end, and who cuts one says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.atomic import read_json, write_file, write_json
from minilora.formats.chat import find_chat_template


class Tokenizer(ABC):
    """What the rest of the package knows of a tokenizer.

    vocab_size is the largest id + 1; bos_id and eos_id are None where there are none; adds_bos tells whether `encode` puts a
    bos_id in front; stop_ids are the ids that end a text when a model writes one.
    """

    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    adds_bos: bool = False
    stop_ids: frozenset[int] = frozenset()
    chat_template: str | None = None

    @abstractmethod
    def encode(self, text: str, add_special: bool = True) -> np.ndarray:
        """Ids (T,), int64. Special tokens spelled out in the text are recognised; add_special adds those that the model wants around it."""

    @abstractmethod
    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become replacement characters."""

    def token(self, id: int | None) -> str:
        """One token as it is spelled in a text, for chat templates; "" for None."""
        return "" if id is None else self.decode([id])

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers and `load_tokenizer` read them; for bytes, nothing."""
        return None

    def stream(self, ids: Iterable[int], skip_special: bool = False) -> Iterator[str]:
        """The text of ids as they come, in pieces that end at complete characters. Joined, they are `decode` of all ids.

        A token may hold part of a character, which decodes to replacement characters at the end: they wait for the next token.
        Only the tokens since the last piece but one are decoded again: some decoders need to see what stands before a token.
        """
        window: list[int] = []
        context, told = 0, 0  # window[:context] has been told, and of the text of the window `told` characters
        for id in ids:
            window.append(int(id))
            text = self.decode(window, skip_special)
            whole = text.rstrip("\ufffd")
            if len(whole) > told:
                yield whole[told:]
                told = len(whole)
            if len(whole) == len(text):  # all of it is told: forget the tokens before the last piece
                window, context = window[context:], len(window) - context
                told = len(self.decode(window, skip_special))
        rest = self.decode(window, skip_special)[told:]
        if rest:
            yield rest


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids, 0 to 255. No special tokens."""

    vocab_size = 256

    def encode(self, text: str, add_special: bool = True) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")


class HFTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, with its padding and truncation switched off."""

    def __init__(
        self,
        library: Any,
        bos_id: int | None = None,
        eos_id: int | None = None,
        stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
    ) -> None:
        library.no_padding()
        library.no_truncation()
        self.library = library
        self.vocab_size = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id, self.eos_id = bos_id, eos_id
        self.stop_ids = frozenset(stop_ids) | (frozenset() if eos_id is None else {eos_id})
        self.chat_template = chat_template
        around = self.encode("")
        self.adds_bos = bos_id is not None and len(around) > 0 and int(around[0]) == bos_id

    def encode(self, text: str, add_special: bool = True) -> np.ndarray:
        return np.array(self.library.encode(text, add_special_tokens=add_special).ids, dtype=np.int64)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        return self.library.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token(self, id: int | None) -> str:
        return "" if id is None else self.library.id_to_token(id) or ""

    def save(self, folder: str | Path) -> None:
        named = {
            "bos_token": self.token(self.bos_id) or None,
            "eos_token": self.token(self.eos_id) or None,
            "chat_template": self.chat_template,
        }
        write_file(Path(folder) / "tokenizer.json", self.library.save)
        write_json(
            Path(folder) / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", **{name: value for name, value in named.items() if value is not None}},
        )


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

    `pre` says how a text is split before the merges: "gpt-2" words from spaces; "smollm" also every digit; "qwen2" by an expression of its
    own. Another way of splitting gives other ids for the same text, so others raise ValueError, as do SentencePiece vocabularies, and
    tokens and merges that do not fit. Bytes that no token stands for (SmolLM2 lacks 21) are dropped, as in the published tokenizers.
    """
    tokenizers = _tokenizers()
    tokens, kind, pre = list(vocabulary.tokens), getattr(vocabulary, "kind", "gpt2"), getattr(vocabulary, "pre", "smollm")
    if kind != "gpt2" or pre not in _PRE:
        raise ValueError(
            f"{path}: its tokenizer is of model {kind!r} and splits text as {pre!r}; supported: model 'gpt2' with "
            f"{', '.join(map(repr, _PRE))}. Give a folder with a tokenizer.json instead."
        )
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise ValueError(f"{path}: the token {twice!r} is in the vocabulary more than once.")
    merges = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    for merge in merges:
        if len(merge) != 2 or not all(part in ids for part in (*merge, "".join(merge))):
            raise ValueError(f"{path}: the merge {' '.join(merge)!r} is not of two tokens that give a third.")
    for name in ("bos", "eos"):
        if not 0 <= (getattr(vocabulary, name) or 0) < len(tokens):
            raise ValueError(f"{path}: {name} is token {getattr(vocabulary, name)}, but there are {len(tokens)} tokens.")

    before = tokenizers.pre_tokenizers
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=merges))
    steps = [before.ByteLevel(add_prefix_space=False, use_regex=pre != "qwen2")]
    if pre == "smollm":
        steps.insert(0, before.Digits(individual_digits=True))
    if pre == "qwen2":
        library.normalizer = tokenizers.normalizers.NFC()
        steps.insert(0, before.Split(tokenizers.Regex(_QWEN2), behavior="isolated"))
    library.pre_tokenizer = before.Sequence(steps)
    library.decoder = tokenizers.decoders.ByteLevel()
    added = [
        tokenizers.AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, vocabulary.token_types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    library.add_tokens(added)
    if vocabulary.add_bos and vocabulary.bos is not None:
        bos = tokens[vocabulary.bos]
        library.post_processor = tokenizers.processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, vocabulary.bos)])
    return _fitting(HFTokenizer(library, vocabulary.bos, vocabulary.eos, chat_template=vocabulary.chat_template), vocab_size, path)


_PRE = ("smollm", "gpt-2", "qwen2")
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as published
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def _from_file(file: Path) -> HFTokenizer:
    """tokenizer.json, with the special tokens that the files beside it name."""
    tokenizers = _tokenizers()
    try:
        library = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{file} is not a tokenizer that the tokenizers library can read ({error}).") from None
    beside = [read_json(file.parent / name) for name in _BESIDE if (file.parent / name).is_file()]
    bos, eos = _special_ids(library, beside, "bos"), _special_ids(library, beside, "eos")
    return HFTokenizer(library, next(iter(bos), None), next(iter(eos), None), eos, find_chat_template(file.parent))


_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")


def _special_ids(library: Any, beside: Sequence[dict[str, Any]], name: str) -> list[int]:
    """The ids that the files give for "bos" or "eos", the first file's first: a token (or {"content": token}), an id, or a list of ids."""
    found: list[int] = []
    for raw in beside:
        token = raw.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        id = library.token_to_id(token) if isinstance(token, str) else None
        given = raw.get(f"{name}_token_id")
        ids = [id, *(given if isinstance(given, list) else [given])]
        found += [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i not in found]
    return [i for i in found if library.id_to_token(i) is not None]


def _fitting(tokenizer: HFTokenizer, vocab_size: int, path: str | Path) -> HFTokenizer:
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model's embedding has {vocab_size} rows; "
            "take the tokenizer that belongs to the model."
        )
    return tokenizer


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError("this model's tokenizer needs the tokenizers library: pip install 'minilora[hf]'") from None
    return tokenizers
