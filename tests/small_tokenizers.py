"""Small tokenizers and a conversation for tests."""

import base64
import json
import zlib

import tokenizers

from minilora.formats.tokenizer import ByteTokenizer, HFTokenizer

SPECIAL = ["<|end|>", "<|user|>", "<|bot|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "\nSo <b>long</b>"},
]


def library_bpe():
    """A byte-level BPE like GPT-2's, trained on a few words."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(["the cat sat on the mat; the capital of France is Paris 2024 naïve ☃"] * 20, trainer)
    return library


def library_wordpiece():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "man", "eat", "##ing", "food", "."]
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    library.normalizer = tokenizers.normalizers.BertNormalizer()
    library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    library.decoder = tokenizers.decoders.WordPiece()
    library.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    library.add_special_tokens(words[:4])
    return library


BYTES, BPE = ByteTokenizer(), HFTokenizer(library_bpe(), eos_id=0, chat_template=CHATML)


# ---- one tokenizer of each published kind ---------------------------------------------------------------------------------------------

WORDS = ["the cat sat on the mat, isn't it?  def f(x):\n    return 2024 naïve ☃", "Hello World! 日本語 héllo foobar 12\n\n"] * 20


def byte_level_bpe():
    """As GPT-2's: spaces belong to the words after them."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(WORDS, trainer)
    return library


def sentencepiece_bpe(post="<s> $A"):
    """As Llama 2's: "▁" in place of a space and before a text, byte fallback, a begin token."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    library.normalizer = tokenizers.normalizers.Sequence(steps)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", behavior="merged_with_next")  # only for training: no token spans two words
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    library.train_from_iterator(WORDS, tokenizers.trainers.BpeTrainer(vocab_size=380, special_tokens=special, show_progress=False))
    raw = json.loads(library.to_str())
    raw |= {"pre_tokenizer": None, "added_tokens": [token for token in raw["added_tokens"] if not token["content"].startswith("<0x")]}
    library = tokenizers.Tokenizer.from_str(json.dumps(raw))
    steps = tokenizers.decoders
    library.decoder = steps.Sequence([steps.Replace("▁", " "), steps.ByteFallback(), steps.Fuse(), steps.Strip(" ", 1, 0)])
    marks = [(mark, library.token_to_id(mark)) for mark in ("<s>", "</s>")]
    library.post_processor = tokenizers.processors.TemplateProcessing(single=post, special_tokens=marks)
    return library


def gemma_bpe():
    """As Gemma 3's: "▁" in place of a space, byte fallback, a begin token."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", behavior="merged_with_next")  # only for training, as above
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", *(f"<0x{i:02X}>" for i in range(256))]
    library.train_from_iterator(WORDS, tokenizers.trainers.BpeTrainer(vocab_size=380, special_tokens=special, show_progress=False))
    raw = json.loads(library.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if not token["content"].startswith("<0x")]
    library = tokenizers.Tokenizer.from_str(json.dumps(raw))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", behavior="merged_with_previous")
    steps = tokenizers.decoders
    library.decoder = steps.Sequence([steps.Replace("▁", " "), steps.ByteFallback(), steps.Fuse()])
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return library


def bert_wordpiece(lowercase=True):
    """As BERT's, with a vocabulary of words and of all the characters in them."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    library.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    both = [*WORDS, *(word.lower() for word in WORDS), *(word.replace("ï", "i").replace("é", "e") for word in WORDS)]
    library.train_from_iterator(both, tokenizers.trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    library.decoder = tokenizers.decoders.WordPiece()
    library.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return library


def xlm_roberta():
    """As in XLM-RoBERTa and multilingual E5: SentencePiece unigrams with scores; without the normalizer table of the published one."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    library = tokenizers.Tokenizer(tokenizers.models.Unigram())
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    library.train_from_iterator(WORDS, trainer)
    library.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    return library


# A normalizer as SentencePiece compiles it: Ａ ﬁ １ … and e + accent to A fi 1 ... é; tabs, newlines and wide spaces to spaces
CHARSMAP = zlib.decompress(
    base64.b85decode(
        "c-kG)cZ?TB6ae6NznlgL{D(BfP^5@(7A*8$6)B=3A|j$F7^zAxcl2_ohleO2AS!rZK|s0!Vh>H}9R(vKqV(RrWs`5;ynVBiN#0DPM?|TJ{P`ma+!D!?xuIYx3Kfs"
        "Yk{6QCuHu!Oin;QXVP<+NGOI^?F3TF~Ki_gpyj9G{Z5Am^QHo%xD8}uSpd@#&dO#}f6if5buMuU%GL+*kDo~!gsmMK4!giuE_maW=+(%U&;2|F55gx`?qZ&1-L2YV"
        "Lmpas^9t~+gV;a$vCN!rRkMSsv(}GsCqz$cU%M(1sleFV$+Vcz@c$SVlM<<@AGcVAE7kQbNc!jQX<5gaxJFh2m^rNTPgWmL_FMW8EH|S441~P!b3_{Cd2*VjhR?>7"
        "vGJ?^JVk~1A&p0MBfk|ZZHgA!`JG{$erjW~2-s1z_XFAjPkQvNkX3~3R^D%Syluww)T=Mvg1<dD*NX}lwSA5CWEMzf@_=Y7cV<{_G&MH>&ZF2Tl!*{G>E$jK7ANhf"
        "w`3Xleeo1QM(&9I9BOBPvCVpoNTls_SY-1-o*v&5XvWNZb;~)q4lS3TlFaG8T|L}j|v^XXnO={U`ad<{r95?<qsqr5tIl*a8ah5Zj=NuQgz-2CRl`CB5+Rf{qk&)p"
        "R)sL>-VtroR0F!Z%%K"
    )
)


def xlm_roberta_normalized():
    """As published, with a normalizer, and <mask> in the vocabulary of the unigrams."""
    raw = json.loads(xlm_roberta().to_str())
    raw["model"]["vocab"].append(["<mask>", 0.0])
    raw["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(CHARSMAP).decode()}
    library = tokenizers.Tokenizer.from_str(json.dumps(raw))
    around = [("<s>", 0), ("</s>", 2)]
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=around
    )
    return library


def modernbert_bpe():
    """As ModernBERT's: composed characters, BERT's special tokens, and a run of spaces that is a token."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.normalizer = tokenizers.normalizers.NFC()
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet, special = tokenizers.pre_tokenizers.ByteLevel.alphabet(), ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(WORDS, trainer)
    library.add_special_tokens([tokenizers.AddedToken("[MASK]", lstrip=True)])
    library.add_tokens([tokenizers.AddedToken("   ", normalized=True)])
    marks = [("[CLS]", 1), ("[SEP]", 2)]
    library.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return library


def roberta_bpe():
    """As RoBERTa's: GPT-2's with other special tokens; a space before <mask> belongs to it."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet, special = tokenizers.pre_tokenizers.ByteLevel.alphabet(), ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(WORDS, trainer)
    library.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    library.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return library


def write_tokenizer(folder, library, settings=None, **files):
    """Write a tokenizer folder as published: tokenizer.json, tokenizer_config.json, and `files` {name without .json: content}."""
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    for name, content in {"tokenizer_config": settings, **files}.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
