"""tokenizer.json with all that the files beside it change, as transformers' AutoTokenizer (5.23) applies it.

The class that tokenizer_config.json names, or else that of the model's type, decides. BertTokenizer, GPT2Tokenizer, LlamaTokenizer
and Qwen2Tokenizer take the vocabulary and the post-processor of tokenizer.json only, and build the rest from the options of
tokenizer_config.json (do_lower_case, add_prefix_space, legacy, ...); the base class, PreTrainedTokenizerFast, takes tokenizer.json as it
is. Other classes of transformers that build their own are refused by name. add_bos_token and add_eos_token change nothing where
there is a tokenizer.json. One thing differs: a special token that is only a class's default, and that the vocabulary lacks, is not
added, as no model has been trained on it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minilora.formats.atomic import read_json

QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as published

_NAMES = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()
_END = "<|endoftext|>"
_DEFAULTS = {
    "BertTokenizer": dict(zip(_NAMES[2:], ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"), strict=True)),
    "GPT2Tokenizer": dict.fromkeys(_NAMES[:3], _END),
    "LlamaTokenizer": dict(zip(_NAMES[:3], ("<s>", "</s>", "<unk>"), strict=True)),
    "Qwen2Tokenizer": {"unk_token": _END, "eos_token": _END, "pad_token": _END},
}
_OF_MODEL = {"bert": "BertTokenizer", "gpt2": "GPT2Tokenizer"}
_ALIASES = {"ElectraTokenizer": "BertTokenizer", "DistilBertTokenizer": "BertTokenizer"}
_OTHERS = """Albert Bart Barthez BigBird Blenderbot CLIP Camembert CodeLlama Cohere DPRQuestionEncoder Deberta DebertaV2 Esmc Funnel
GPTNeoX Gemma Herbert LED Lasr LayoutLMv2 LayoutLMv3 LayoutXLM Luke Lxmert MBart50 MBart MPNet MarkupLM MobileBert Mvp Nllb Nougat
OpenAIGPT Pegasus Qwen3_5 Reformer RemBert RoFormer Roberta SeamlessM4T Siglip2 Splinter T5 Udop VideoPrism Whisper XGLM XLMRoberta XLNet
FNet""".split()


def read_tokenizer(file: Path) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """(the tokenizers library's object, {"bos_token": ..., ...}, tokenizer_config.json) of a tokenizer.json and the files beside it.

    Raises ValueError naming the file for what is broken or not supported, ImportError without the extra `hf`.
    """
    library, raw = _load(file)
    config, model, named_too, added_too = (read_json(f) if (f := file.parent / name).is_file() else {} for name in _BESIDE)
    where = file.parent / "tokenizer_config.json"
    kind = _kind(config, model, raw, where)
    tokenizers = import_tokenizers()

    extra: list[Any] = _tokens(config.get("extra_special_tokens") or config.get("additional_special_tokens"), where)
    named = {name: value for name, value in config.items() if name in _NAMES or (name.endswith("_token") and not isinstance(value, bool))}
    named |= config["extra_special_tokens"] if isinstance(config.get("extra_special_tokens"), dict) else {}
    listed: dict[int, Any] = {}
    if isinstance(given := config.get("added_tokens_decoder"), dict):
        for key, value in given.items():
            listed[_id(key, where)] = _token({} if isinstance(value, str) else value, "added_tokens_decoder", where)
    else:
        where = file.parent / "special_tokens_map.json"
        extra += [t for t in _tokens(named_too.get("extra_special_tokens"), where) if t not in extra]
        named |= {k: {**v, "special": True} if isinstance(v, dict) else v for k, v in named_too.items() if k.endswith("_token")}
        special = {v for v in (*named.values(), *extra) if isinstance(v, str)} | {_content(v) for v in named_too.values()}
        if not {"extra_special_tokens", "additional_special_tokens"} & config.keys() | {"extra_special_tokens"} & named_too.keys():
            extra = _tokens(named_too.get("additional_special_tokens"), where)
        where = file.parent / "added_tokens.json"
        for content, id in added_too.items():
            kept = {"content": content, "special": content in special, "normalized": content not in special}
            listed[_id(id, where)] = _token(kept, "a key", where)
        listed |= {value["id"]: _token(value, "added_tokens", file) for value in raw.get("added_tokens", ())}
    where = file.parent / "tokenizer_config.json"
    known = {added.content: added for added in listed.values()}
    every = library.get_vocab(with_added_tokens=True).keys() | known.keys() | {_content(value) for value in named.values()}
    named = {name: c for name, c in _DEFAULTS.get(kind, {}).items() if name not in named and c in every} | named
    named = {name: named[name] for name in dict.fromkeys((*_NAMES, *named)) if named.get(name) is not None}  # in this order they get ids
    as_listed = {name: known.get(_content(value)) for name, value in named.items() if name in _NAMES}
    named = {name: as_listed.get(name) or _token(value, name, where) for name, value in named.items()}
    names = {name: _content(value) for name, value in named.items()}
    if kind:
        library = _built(kind, library, raw, config, names, file)

    there = library.get_added_tokens_decoder().values()
    add = [added for _, added in sorted(listed.items()) if repr(added) not in set(map(repr, there))]
    have = {_content(added) for added in (*there, *add)}
    for value in (*named.values(), *(_token(value, "extra_special_tokens", where) for value in extra)):
        if _content(value) not in have and value not in add:  # the same token with other options is added again, and they count
            add.append(value)
    add = [tokenizers.AddedToken(added, special=True) if isinstance(added, str) else added for added in add]
    for added in add:
        added.special = added.special or added.content in names.values()
    library.add_tokens(add)
    if kind == "Qwen2Tokenizer":
        library.add_tokens([tokenizers.AddedToken(content, special=True) for content in (*names.values(), *map(_content, extra))])
    if kind == "BertTokenizer":  # whatever the post-processor of tokenizer.json is
        around = [(mark, library.token_to_id(mark)) for name in ("cls_token", "sep_token") if (mark := names.get(name))]
        if len(around) < 2:
            raise ValueError(f"{file}: BertTokenizer needs the tokens [CLS] and [SEP], which are not in the vocabulary.")
        single = f"{around[0][0]}:0 $A:0 {around[1][0]}:0"
        library.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=around)
    library.encode_special_tokens = bool(config.get("split_special_tokens"))
    return library, names, config


_BESIDE = ("tokenizer_config.json", "config.json", "special_tokens_map.json", "added_tokens.json")


def _kind(config: dict[str, Any], model: dict[str, Any], raw: dict[str, Any], where: Path) -> str:
    """The class of transformers that reads these files; "" for the base class."""
    name, of_model = config.get("tokenizer_class") or model.get("tokenizer_class"), model.get("model_type")
    if of_model == "qwen2":
        return "Qwen2Tokenizer"  # whatever the file says: transformers trusts none of these models
    kind = str(name or _OF_MODEL.get(str(of_model), "")).removesuffix("Fast")
    kind = _ALIASES.get(kind, kind)
    if kind.removesuffix("Tokenizer") in _OTHERS:
        raise ValueError(
            f"{where}: tokenizer_class {name!r} is not supported, as transformers does not take tokenizer.json as it is for it; "
            'save the tokenizer with the class "PreTrainedTokenizerFast" to use tokenizer.json.'
        )
    in_bytes = "ByteLevel" in str([raw.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")])
    return "" if kind not in _DEFAULTS or (kind == "LlamaTokenizer" and in_bytes) else kind


def _built(kind: str, library: Any, raw: dict[str, Any], config: dict[str, Any], names: dict[str, str], file: Path) -> Any:
    """What a class of transformers makes of the vocabulary and the post-processor of tokenizer.json."""
    wanted, model = "WordPiece" if kind == "BertTokenizer" else "BPE", type(library.model).__name__
    if model != wanted:
        raise ValueError(
            f"{file}: its model is {model}, but {kind} needs {wanted}; "
            'write "tokenizer_class": "PreTrainedTokenizerFast" into tokenizer_config.json to use it as it is.'
        )
    t, vocab, space = import_tokenizers(), raw["model"]["vocab"], config.get("add_prefix_space")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in raw["model"].get("merges", ())]
    try:
        if kind == "BertTokenizer":
            built = t.Tokenizer(t.models.WordPiece(vocab, unk_token=names.get("unk_token", "[UNK]")))
            chinese, lowercase = config.get("tokenize_chinese_chars", True), config.get("do_lower_case", True)
            built.normalizer = t.normalizers.BertNormalizer(True, chinese, config.get("strip_accents"), lowercase)
            built.pre_tokenizer, built.decoder = t.pre_tokenizers.BertPreTokenizer(), t.decoders.WordPiece(prefix="##")
        elif kind == "LlamaTokenizer":
            built = t.Tokenizer(t.models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
            scheme = "never" if space is False else "always" if config.get("legacy") else "first"
            built.pre_tokenizer = t.pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
            strip = [] if space is False else [t.decoders.Strip(content=" ", left=1)]
            built.decoder = t.decoders.Sequence([t.decoders.Replace("▁", " "), t.decoders.ByteFallback(), t.decoders.Fuse(), *strip])
        else:
            built = t.Tokenizer(t.models.BPE(vocab, merges))
            built.pre_tokenizer, built.decoder = t.pre_tokenizers.ByteLevel(add_prefix_space=space or False), t.decoders.ByteLevel()
        if kind == "Qwen2Tokenizer":
            built.normalizer, split = t.normalizers.NFC(), t.pre_tokenizers.Split(t.Regex(QWEN2), behavior="isolated")
            in_bytes = t.pre_tokenizers.ByteLevel(add_prefix_space=space or False, use_regex=False)
            built.pre_tokenizer = t.pre_tokenizers.Sequence([split, in_bytes])
        built.post_processor = library.post_processor or t.processors.TemplateProcessing(single="$A:0")
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{file}: a {kind} cannot be made of it and the tokenizer_config.json beside it ({error}).") from None
    return built


def _token(value: Any, name: str, where: Path) -> Any:
    """A token as a file gives it, for the library: text, or an object with what it strips. Raises ValueError naming the file."""
    try:
        if not _content(value):
            raise TypeError
        _content(value).encode("utf-8")
        if isinstance(value, str):
            return value
        return import_tokenizers().AddedToken(**{key: value[key] for key in _OPTIONS if key in value})
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {name} {_content(value)!r} holds half of a surrogate pair, which is no text.") from None
    except TypeError:
        raise ValueError(f"{where}: {name} must be a token, got {value!r:.60}.") from None


_OPTIONS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def _tokens(value: Any, where: Path) -> list[Any]:
    if not isinstance(value, (list, dict, type(None))):
        raise ValueError(f"{where}: the extra special tokens must be a list, got {value!r:.60}.")
    return list(value) if isinstance(value, list) else []


def _content(value: Any) -> str:
    """The text of a token; "" where it has none."""
    text = value.get("content") if isinstance(value, dict) else getattr(value, "content", value)
    return text if isinstance(text, str) else ""


def _id(value: Any, where: Path) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {value!r:.60} is no token id.") from None


def _load(file: Path) -> tuple[Any, dict[str, Any]]:
    """(the library's object, the JSON) of a tokenizer.json."""
    tokenizers, raw = import_tokenizers(), read_json(file)
    normalizer = raw.get("normalizer") or {}
    for step in (normalizer, *(normalizer.get("normalizers") or ())) if isinstance(normalizer, dict) else ():
        if isinstance(step, dict) and isinstance(charsmap := step.get("precompiled_charsmap"), str):
            try:
                start = base64.b64decode(charsmap)[:4]  # how many bytes of a table follow: the library believes any number
            except ValueError:
                start = b""
            size = int.from_bytes(start, "little")
            if len(start) < 4 or size % 4 or size > 3 * len(charsmap) // 4:
                raise ValueError(f"{file}: the precompiled_charsmap of its normalizer is broken.")
    with library_errors(file):
        try:
            return tokenizers.Tokenizer.from_file(str(file)), raw
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{file} is not a tokenizer that the tokenizers library can read ({error}).") from None


@contextmanager
def library_errors(where: str | Path) -> Iterator[None]:
    """Turns what the tokenizers library raises, a bare Exception or a panic, which is none, into a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{where}: the tokenizers library fails with it ({error}).") from None


def import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError("this model's tokenizer needs the tokenizers library: pip install 'minilora[hf]'") from None
    return tokenizers
