"""The tokenizer in the metadata of a GGUF file: byte-level BPE, SentencePiece's BPE, or an encoder's WordPiece or unigrams."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilora.formats.gguf_encoder import ARCHITECTURES as ENCODERS
from minilora.formats.tokenizer_files import check_charsmap, gemma, import_tokenizers, library_errors, split_in_bytes, unigrams, wordpiece

_PRE = ("smollm", "gpt-2", "qwen2", "llama-bpe", "smaug-bpe", "roberta-bpe", "modern-bert")
_LONGEST = 256  # characters of a token of SentencePiece: it is split at every place
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # values of token_type
_DEFAULTS = {"bert": {"unknown": 100, "seperator": 102}, "t5": {"bos": 0, "eos": 2, "unknown": 3}}  # of encoders


def from_metadata(vocabulary: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The arguments of HFTokenizer for what `read_gguf_tokenizer` returns.

    `pre` names how a text is split before the merges (`split_in_bytes`); other ways would give other ids. Bytes without a token
    (SmolLM2 lacks 21) are dropped, as in the published tokenizers. SentencePiece joins those two tokens next that make the token with the
    highest score, the first of equal ones: every split of a token into two is a merge, in that order. Its tokens of spaces are written as
    such. It puts a space before a text, and after each special token, unless add_space_prefix is false (Gemma).

    An encoder's WordPiece ("bert") marks the tokens that begin a word by "▁", and not the others by "##". It lower-cases a text where the
    file says so; where it says nothing, unless the vocabulary has capitals. It and unigrams ("t5") always put special tokens around a
    text. A space before the token of a mask belongs to it, except in WordPiece.

    Raises ValueError for another `pre`, and inconsistent tokens, scores and merges.
    """
    t = import_tokenizers()
    get: Callable[..., Any] = vocabulary.get
    tokens, merges, template = get("tokens"), get("merges", []), get("chat_template")
    types, scores, table = get("token_type", [_NORMAL] * len(tokens or ())), get("scores", []), get("precompiled_charsmap", [])
    model, pre, encoder = get("model", "gpt2"), get("pre", "default"), get("architecture") in ENCODERS
    words, unigram = encoder and model == "bert", encoder and model == "t5"
    pieces, prefix = model == "llama", get("add_space_prefix") is not False
    lists = [("tokens", tokens, str), ("merges", merges, str), ("token_type", types, int)]
    lists += [("scores", scores, float), ("precompiled_charsmap", table, int)] if unigram or pieces else []
    for name, values, of in lists:
        if not isinstance(values, list) or not all(isinstance(value, of) for value in values):
            raise ValueError(f"{path}: the {name} of its tokenizer must be a list of {'strings' if of is str else 'numbers'}.")
    if not (pieces or words or unigram) and (model != "gpt2" or pre not in _PRE):
        raise ValueError(
            f"{path}: its tokenizer is of model {model!r} and splits text as {pre!r}; supported: model 'gpt2' with "
            f"{', '.join(map(repr, _PRE))}, and 'llama'. Use a folder with a tokenizer.json instead."
        )
    n, control = len(tokens), [kind == _CONTROL for kind in types]
    if pieces:
        tokens = ["▁" * len(token) if not token.strip(" ") else token for token in tokens]
    if words:
        tokens = [w if fixed else w[1:] if w[:1] == "▁" else f"##{w}" for w, fixed in zip(tokens, control, strict=False)]
    if unigram and type(i := get("mask_token_id")) is int and types[i : i + 1] == [_UNUSED]:  # not in sentencepiece.bpe.model
        tokens, types = [*tokens[:i], "<mask>", *tokens[i + 1 :]], [*types[:i], _CONTROL, *types[i + 1 :]]
    ids = {token: i for i, token in enumerate(tokens)}
    if duplicates := [token for i, token in enumerate(tokens) if ids[token] != i]:
        raise ValueError(f"{path}: the token {duplicates[0]!r} occurs twice in the vocabulary.")
    if unigram and (charsmap := bytes(value & 0xFF for value in table)):
        check_charsmap(charsmap, path)
    if len(types) != n or ((unigram or scores) and len(scores) != n) or not isinstance(template, str | None):
        raise ValueError(f"{path}: its tokenizer needs a type for each of {n} tokens, all scores or none, and a string as template.")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if pieces:
        if (longest := max(map(len, tokens), default=0)) > _LONGEST:
            raise ValueError(f"{path}: a token of its tokenizer has {longest:,} characters; at most {_LONGEST} are supported.")
        best = sorted(range(n), key=lambda i: -scores[i]) if scores else range(n)
        splits = ((tokens[j][:i], tokens[j][i:]) for j in best for i in range(len(tokens[j]) - 1, 0, -1))
        pairs = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
    for pair in pairs:
        if len(pair) != 2 or not all(part in ids for part in (*pair, "".join(pair))):
            raise ValueError(f"{path}: the merge {' '.join(pair)!r} does not join two tokens into a third.")
    default, names = _DEFAULTS.get(model * encoder, {}), "unknown bos eos eot eom".split()  # eot ends a turn, eom a message
    names += ["seperator", "padding", "mask"] * encoder
    default = default | ({"bos": get("cls_token_id", 101)} if words else {})  # so it is called in older files
    special = {name: get(f"{name}_token_id", default.get(name)) for name in names}
    for name, id in special.items():
        if id is not None and not (isinstance(id, int) and 0 <= id < n):
            raise ValueError(f"{path}: {name} is token {id}, but there are {n} tokens.")

    def options(i: int) -> dict[str, bool]:
        plain = types[i] == _USER_DEFINED
        return {"normalized": encoder and plain, "special": not plain, "lstrip": not words and i == special.get("mask")}

    unk, bos, eos = (special[name] for name in ("unknown", "bos", "eos"))
    with library_errors(f"{path}: its tokenizer cannot be built"):
        if words:
            capitals = any(token != token.lower() for token, kind in zip(tokens, types, strict=True) if kind == _NORMAL)
            library = wordpiece(ids, tokens[unk], get("normalizer.lowercase", not capitals), strip_accents=get("normalizer.strip_accents"))
        elif unigram:
            library = unigrams(list(zip(tokens, scores, strict=True)), unk, charsmap or None, prefix)
        elif pieces:
            library = gemma(ids, pairs, "<unk>" if unk is None else tokens[unk], prefix)
        else:
            library = t.Tokenizer(t.models.BPE(vocab=ids, merges=pairs))
            split_in_bytes(library, pre)
        kinds = (_CONTROL, _USER_DEFINED, _UNKNOWN if unigram else _CONTROL)
        library.add_tokens([t.AddedToken(token, **options(i)) for i, token in enumerate(tokens) if types[i] in kinds and token.strip("▁")])
        last = special["seperator"] if words else eos
        begin = [tokens[bos]] if bos is not None and (words or unigram or get("add_bos_token", pieces or encoder)) else []
        end = [tokens[last]] if encoder and last is not None and (words or unigram or get("add_eos_token", True)) else []
        if begin or end:
            marks = [(token, ids[token]) for token in dict.fromkeys([*begin, *end])]
            library.post_processor = t.processors.TemplateProcessing(single=[*begin, "$A", *end], special_tokens=marks)
    if not encoder:
        return {"library": library, "bos_id": bos, "eos_id": eos, "stop_ids": (special["eot"], special["eom"]), "chat_template": template}
    others = {"unk": unk, "pad": special["padding"], "mask": special["mask"]}
    named = {"cls": begin, "sep": end, **{name: [tokens[i]] for name, i in others.items() if i is not None}}
    return {"library": library, "tokens": {f"{name}_token": found[0] for name, found in named.items() if found}}
