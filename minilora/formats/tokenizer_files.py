"""tokenizer.json with the changes that the files beside it make, as transformers' AutoTokenizer (5.23) applies them.

The class named in tokenizer_config.json, or that of the model type, decides. BertTokenizer, GemmaTokenizer, GPT2Tokenizer,
LlamaTokenizer, Qwen2Tokenizer, RobertaTokenizer and XLMRobertaTokenizer take only the vocabulary and the post-processor from
tokenizer.json, and build the rest from the options of tokenizer_config.json (do_lower_case, legacy, ...); the base class,
PreTrainedTokenizerFast, uses the file unchanged.
Other classes of transformers that build their own are refused by name. add_bos_token and add_eos_token have no effect beside a
tokenizer.json. One difference: a special token that is only the default of a class, and not in the vocabulary, is not added, since no
model was trained on it.
"""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minilora.formats import extra
from minilora.formats.atomic import read_json

_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as published
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

_NAMES = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()
_END = "<|endoftext|>"
_DEFAULTS = {
    "BertTokenizer": dict(zip(_NAMES[2:], ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"), strict=True)),
    "GPT2Tokenizer": dict.fromkeys(_NAMES[:3], _END),
    "GemmaTokenizer": {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "mask")},
    "LlamaTokenizer": dict(zip(_NAMES[:3], ("<s>", "</s>", "<unk>"), strict=True)),
    "Qwen2Tokenizer": {"unk_token": _END, "eos_token": _END, "pad_token": _END},
    "XLMRobertaTokenizer": dict(zip(_NAMES, ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>"), strict=True)),
}
_DEFAULTS["RobertaTokenizer"] = _DEFAULTS["XLMRobertaTokenizer"]
_OF_MODEL = {"bert": "BertTokenizer", "gpt2": "GPT2Tokenizer", "roberta": "RobertaTokenizer", "xlm-roberta": "XLMRobertaTokenizer"}
_OF_MODEL |= {"distilbert": "BertTokenizer", "gemma3_text": "GemmaTokenizer", "qwen3": "Qwen2Tokenizer"}
_FIXED = {"qwen2": "Qwen2Tokenizer", "modernbert": "", "mistral": ""}  # transformers ignores the class in these files
_ALIASES = dict.fromkeys(("ElectraTokenizer", "DistilBertTokenizer", "SqueezeBertTokenizer"), "BertTokenizer")
_MODELS = {"BertTokenizer": "WordPiece", "XLMRobertaTokenizer": "Unigram"}  # the others: BPE
_AROUND = dict.fromkeys(("BertTokenizer", "RobertaTokenizer"), ("cls_token", "sep_token"))  # added around a text
_AROUND["XLMRobertaTokenizer"] = "bos_token", "eos_token"
_LONGER = 1000  # times; published files reach 4
_OPTIONS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_OTHERS = """Albert Bart Barthez Bartpho BertGeneration BertJapanese Bertweet BigBird BioGpt Blenderbot BlenderbotSmall ByT5 CLIP CTRL
Camembert Canine Clvp CodeGen CodeLlama Cohere Cpm CpmAnt DPRContextEncoder DPRQuestionEncoder DPRReader Deberta DebertaV2 Dia Esm Esmc
FNet FSMT FastSpeech2Conformer Flaubert Funnel GPTNeoX GPTNeoXJapanese GPTSw3 Herbert LED Lasr LayoutLMv2 LayoutLMv3 LayoutXLM
Luke Lxmert M2M100 MBart MBart50 MLuke MPNet Marian MarkupLM Mgpstr MobileBert Mvp MyT5 Nllb Nougat OpenAIGPT PLBart Pegasus Perceiver
Phobert Pop2Piano ProphetNet Qwen3_5 Reformer RemBert RoCBert RoFormer SeamlessM4T Siglip Siglip2 Speech2Text SpeechT5 Splinter
T5 Tapas Tipsv2 Udop VideoPrism Vits Wav2Vec2CTC Wav2Vec2PhonemeCTC Whisper XGLM XLM XLNet""".split()


def read_tokenizer(file: Path) -> tuple[Any, dict[str, str]]:
    """(the tokenizers library's object, {"bos_token": ..., ...}) of a tokenizer.json and the files beside it.

    Raises ValueError, naming the file, for invalid or unsupported content; ImportError without the extra `hf`.
    """
    t, raw = import_tokenizers(), read_json(file)
    _check_parts(raw, file)
    for table in _charsmaps(raw):
        check_charsmap(table, file)
    with library_errors(f"{file} is not a tokenizer that the tokenizers library can read"):
        library = t.Tokenizer.from_file(str(file))
    config, where = read_json(file.with_name("tokenizer_config.json"), {}), file.parent / "tokenizer_config.json"
    kind = _kind(config, read_json(file.with_name("config.json"), {}), raw, where)
    found, extra, listed = _tokens_beside(config, raw, file)
    known = {added.content: added for added in listed.values()}
    vocabulary = library.get_vocab(with_added_tokens=True).keys() | known.keys() | {_content(value) for value in found.values()}
    found = {name: token for name, token in _DEFAULTS.get(kind, {}).items() if name not in found and token in vocabulary} | found
    tokens = {}
    for name in dict.fromkeys((*_NAMES, *found)):  # new tokens get their ids in this order
        if (value := found.get(name)) is not None:
            tokens[name] = (name in _NAMES and known.get(_content(value))) or _token(value, name, where)
    names = {name: _content(value) for name, value in tokens.items()}

    if kind:
        library = _built(kind, library, raw, config, names, file)
    present = {repr(added): added.content for added in library.get_added_tokens_decoder().values()}
    add = [added for _, added in sorted(listed.items()) if repr(added) not in present]  # also twice if the options differ
    contents = {*present.values(), *map(_content, add)}
    add += [value for value in dict.fromkeys([*tokens.values(), *extra]) if _content(value) not in contents]
    add = [t.AddedToken(added, special=True) if isinstance(added, str) else added for added in add]
    for added in add:
        added.special = added.special or added.content in names.values()
    library.add_tokens(add)
    if kind == "Qwen2Tokenizer":
        library.add_tokens([t.AddedToken(content, special=True) for content in (*names.values(), *map(_content, extra))])
    if kind in _AROUND:  # replaces the post-processor of tokenizer.json
        around = [(token, library.token_to_id(token)) for name in _AROUND[kind] if (token := names.get(name))]
        if len(around) < 2:
            raise ValueError(f"{file}: {kind} needs {' and '.join(_AROUND[kind])}, which are not in the vocabulary.")
        if kind == "RobertaTokenizer":
            trims, space = config.get("trim_offsets", True), config.get("add_prefix_space") or False
            library.post_processor = t.processors.RobertaProcessing(around[1], around[0], trims, space)
        else:
            single = f"{around[0][0]}:0 $A:0 {around[1][0]}:0"
            library.post_processor = t.processors.TemplateProcessing(single=single, special_tokens=around)
    library.encode_special_tokens = bool(config.get("split_special_tokens"))
    return library, names


def _tokens_beside(config: dict[str, Any], raw: dict[str, Any], file: Path) -> tuple[dict[str, Any], list[Any], dict[int, Any]]:
    """(special tokens by name, special tokens without a name, added tokens by id) in the files beside a tokenizer.json.

    special_tokens_map.json, added_tokens.json and the added tokens of tokenizer.json count only without an added_tokens_decoder.
    """
    fields, where = dict(config), file.parent / "tokenizer_config.json"
    if "additional_special_tokens" in fields and not fields.get("extra_special_tokens"):
        fields["extra_special_tokens"] = fields.pop("additional_special_tokens")
    of_model = dict(fields.get("model_specific_special_tokens") or {}) | _pop_named(fields)
    if isinstance(decoder := config.get("added_tokens_decoder"), dict):
        found = [(id, {} if isinstance(value, str) else value, "added_tokens_decoder", where) for id, value in decoder.items()]
    else:
        special = set()
        for name, value in read_json(file.with_name("special_tokens_map.json"), {}).items():
            special.add(_content(value))
            if name == "extra_special_tokens":
                fields[name] = [*(fields.get(name) or ()), *value] if isinstance(value, list) else value
            else:
                fields[name] = {**value, "special": True} if isinstance(value, dict) else value
        of_model |= _pop_named(fields)
        special |= {text for text in (*fields.values(), *_tokens(fields.get("extra_special_tokens"), where)) if isinstance(text, str)}
        added, found = file.parent / "added_tokens.json", []
        for content, id in read_json(file.with_name("added_tokens.json"), {}).items():
            found.append((id, {"content": content, "special": content in special, "normalized": content not in special}, "a key", added))
        found += [(value["id"], value, "added_tokens", file) for value in raw.get("added_tokens", ())]
    listed = {}
    for id, value, name, source in found:
        try:
            number = int(id)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{source}: {id!r:.60} is not a token id.") from None
        listed[number] = _token(value, name, source)
    extra = _tokens(fields.get("extra_special_tokens", fields.get("additional_special_tokens")), where)
    named = {name: value for name, value in fields.items() if name in _NAMES or (name.endswith("_token") and isinstance(value, str | dict))}
    if clash := of_model.keys() & {"template", "messages", "add_generation_prompt", "tools", "documents", "ends"}:
        raise ValueError(f"{where}: a special token cannot have the name {min(clash)!r}, which chat templates use for something else.")
    return named | of_model, [_token(value, "extra_special_tokens", where) for value in extra], listed


def _pop_named(fields: dict[str, Any]) -> dict[str, Any]:
    """The extra special tokens that have names, removed from `fields`."""
    return fields.pop("extra_special_tokens") if isinstance(fields.get("extra_special_tokens"), dict) else {}


def _kind(config: dict[str, Any], model: dict[str, Any], raw: dict[str, Any], where: Path) -> str:
    """The class of transformers that would read these files; "" for the base class."""
    name, of_model = config.get("tokenizer_class") or model.get("tokenizer_class"), model.get("model_type")
    if of_model in _FIXED:
        return _FIXED[of_model]
    kind = str(name or _OF_MODEL.get(str(of_model), "")).removesuffix("Fast")
    kind = _ALIASES.get(kind, kind)
    if kind.removesuffix("Tokenizer") in _OTHERS:
        raise ValueError(
            f"{where}: tokenizer_class {name!r} is not supported, as its tokenizer is not the one in tokenizer.json; "
            'save the tokenizer with the class "PreTrainedTokenizerFast" to use tokenizer.json.'
        )
    in_bytes = "ByteLevel" in str([raw.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")])
    return "" if kind not in _DEFAULTS or (kind == "LlamaTokenizer" and in_bytes) else kind


def _built(kind: str, library: Any, raw: dict[str, Any], config: dict[str, Any], names: dict[str, str], file: Path) -> Any:
    """The tokenizer that a class of transformers builds from the vocabulary and the post-processor of tokenizer.json."""
    expected, model = _MODELS.get(kind, "BPE"), type(library.model).__name__
    if model != expected:
        raise ValueError(
            f"{file}: its model is {model}, but {kind} needs {expected}; "
            'write "tokenizer_class": "PreTrainedTokenizerFast" into tokenizer_config.json to use it unchanged.'
        )
    t, vocab, space = import_tokenizers(), raw["model"]["vocab"], config.get("add_prefix_space")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in raw["model"].get("merges", ())]
    with library_errors(f"{file}: no {kind} can be built from it and the tokenizer_config.json beside it"):
        if kind == "BertTokenizer":
            chinese, lowercase = config.get("tokenize_chinese_chars", True), config.get("do_lower_case", True)
            built = wordpiece(vocab, names.get("unk_token", "[UNK]"), lowercase, chinese, config.get("strip_accents"))
        elif kind == "XLMRobertaTokenizer":
            pieces = [(piece, score) for piece, score in vocab]
            built = unigrams(pieces, 3, next(_charsmaps(raw), None), config.get("add_prefix_space", True))
        elif kind == "GemmaTokenizer":
            built = gemma(vocab, merges, names.get("unk_token", "<unk>"))
        elif kind == "LlamaTokenizer":
            built = t.Tokenizer(t.models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
            scheme = "never" if space is False else "always" if config.get("legacy") else "first"
            built.pre_tokenizer = t.pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
            strip = [] if space is False else [t.decoders.Strip(content=" ", left=1)]
            built.decoder = t.decoders.Sequence([t.decoders.Replace("▁", " "), t.decoders.ByteFallback(), t.decoders.Fuse(), *strip])
        else:
            built = t.Tokenizer(t.models.BPE(vocab, merges))
            split_in_bytes(built, "qwen2" if kind == "Qwen2Tokenizer" else "gpt-2", space or False)
        built.post_processor = library.post_processor or t.processors.TemplateProcessing(single="$A:0")
    return built


def wordpiece(vocab: dict[str, int], unk_token: str, lowercase: bool, chinese: bool = True, strip_accents: bool | None = None) -> Any:
    """BERT's tokenizer: words, punctuation and, with `chinese`, Chinese characters in the longest tokens; accents by default as case."""
    t = import_tokenizers()
    built = t.Tokenizer(t.models.WordPiece(vocab, unk_token=unk_token))
    built.normalizer = t.normalizers.BertNormalizer(True, chinese, strip_accents, lowercase)
    built.pre_tokenizer, built.decoder = t.pre_tokenizers.BertPreTokenizer(), t.decoders.WordPiece(prefix="##")
    return built


def unigrams(pieces: list[tuple[str, float]], unk_id: int, charsmap: bytes | None, add_prefix_space: bool) -> Any:
    """XLM-RoBERTa's tokenizer: SentencePiece's most probable split of each word. charsmap: its normalizer, as compiled by SentencePiece."""
    t = import_tokenizers()
    built = t.Tokenizer(t.models.Unigram(pieces, unk_id=unk_id, byte_fallback=False))
    if charsmap is not None:
        built.normalizer = t.normalizers.Precompiled(charsmap)
    spaces = {"replacement": "▁", "prepend_scheme": "always" if add_prefix_space else "never"}
    steps = [t.pre_tokenizers.WhitespaceSplit(), t.pre_tokenizers.Metaspace(**spaces)]
    built.pre_tokenizer, built.decoder = t.pre_tokenizers.Sequence(steps), t.decoders.Metaspace(**spaces)
    return built


def gemma(vocab: dict[str, int], merges: Any, unk_token: str, prefix: bool = False) -> Any:
    """Gemma's tokenizer: "▁" in place of a space, and the bytes of a character without a token. Llama 2's has one before the text, too."""
    t = import_tokenizers()
    built = t.Tokenizer(t.models.BPE(vocab, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    built.normalizer, built.pre_tokenizer = t.normalizers.Replace(" ", "▁"), t.pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [t.decoders.Replace("▁", " "), t.decoders.ByteFallback(), t.decoders.Fuse()]
    if prefix:
        built.normalizer = t.normalizers.Sequence([t.normalizers.Prepend("▁"), built.normalizer])
        steps.append(t.decoders.Strip(content=" ", left=1))
    built.decoder = t.decoders.Sequence(steps)
    return built


def split_in_bytes(library: Any, pre: str, add_prefix_space: bool = False) -> None:
    """Let a byte-level BPE split text as "gpt-2", "roberta-bpe" and "modern-bert" do, as "smollm" (digits one by one), or by the regular
    expression of "qwen2" or of Llama 3: "llama-bpe", which takes a word that is a token whole, and "smaug-bpe"."""
    t = import_tokenizers()
    pattern = {"qwen2": _QWEN2, "llama-bpe": _LLAMA3, "smaug-bpe": _LLAMA3}.get(pre)
    steps = [t.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=pattern is None)]
    if pre == "smollm":
        steps.insert(0, t.pre_tokenizers.Digits(individual_digits=True))
    if pre in ("qwen2", "modern-bert"):
        library.normalizer = t.normalizers.NFC()
    if pre == "llama-bpe":
        library.model.ignore_merges = True
    if pattern is not None:
        steps.insert(0, t.pre_tokenizers.Split(t.Regex(pattern), behavior="isolated"))
    library.pre_tokenizer, library.decoder = t.pre_tokenizers.Sequence(steps), t.decoders.ByteLevel()


def _token(value: Any, name: str, where: Path) -> Any:
    """A token in a file, for the library: a string, or an AddedToken with its options. Raises ValueError, naming the file."""
    try:
        if not _content(value):
            raise TypeError
        _content(value).encode("utf-8")
        if isinstance(value, str):
            return value
        return import_tokenizers().AddedToken(**{key: value[key] for key in _OPTIONS if key in value})
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {name} {_content(value)!r} has an unpaired surrogate; remove it.") from None
    except TypeError:
        raise ValueError(f"{where}: {name} must be a token, got {value!r:.60}.") from None


def _tokens(value: Any, where: Path) -> list[Any]:
    if not isinstance(value, list | None):
        raise ValueError(f"{where}: the extra special tokens must be a list, got {value!r:.60}.")
    return value or []


def _content(value: Any) -> str:
    """The text of a token; "" where it has none."""
    text = value.get("content") if isinstance(value, dict) else getattr(value, "content", value)
    return text if isinstance(text, str) else ""


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, a pre-tokenizer or a decoder, with those of sequences."""
    if isinstance(part, dict):
        yield part
        for name in ("normalizers", "pretokenizers", "decoders"):
            for step in part[name] if isinstance(part.get(name), list) else ():
                yield from _steps(step)


def _check_parts(raw: dict[str, Any], file: Path) -> None:
    """Raise ValueError for steps that make a text many times as long, one after the other, and for two tokens of one id."""
    longer = 1
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        for step in _steps(raw.get(name)):
            content = step.get("content")
            longer *= 2 if step.get("type") == "ByteLevel" else max(1, len(content)) if isinstance(content, str) else 1
            if longer > _LONGER:
                raise ValueError(f"{file}: its {name} could make a text more than {_LONGER:,} times as long; it may be damaged or hostile.")
    vocabulary = model.get("vocab") if isinstance(model := raw.get("model"), dict) else None
    ids = [id for id in vocabulary.values() if type(id) is int] if isinstance(vocabulary, dict) else []
    if len(set(ids)) < len(ids):
        raise ValueError(f"{file}: two tokens of its vocabulary have one id.")


def check_charsmap(table: bytes, file: str | Path) -> None:
    """Raise ValueError for a character map of which the size, which the library does not check, is wrong."""
    size = int.from_bytes(table[:4], "little")
    if len(table) < 4 or size % 4 or size > len(table) - 4:
        raise ValueError(f"{file}: the precompiled_charsmap of its normalizer is invalid.")


def _charsmaps(raw: dict[str, Any]) -> Iterator[bytes]:
    """The character maps of the normalizer of a tokenizer.json, as compiled by SentencePiece."""
    for step in _steps(raw.get("normalizer")):
        if isinstance(charsmap := step.get("precompiled_charsmap"), str):
            try:
                yield base64.b64decode(charsmap)
            except ValueError:
                yield b""


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises, a panic included (a BaseException), into a ValueError that starts with `what`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what} ({error}).") from None


def import_tokenizers() -> Any:
    return extra("tokenizers", "hf", "this model's tokenizer")
