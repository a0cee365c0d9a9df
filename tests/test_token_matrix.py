"""Tokenizers, their settings, templates and records, compared with transformers' AutoTokenizer."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    bert_wordpiece,
    byte_level_bpe,
    gemma_bpe,
    library_bpe,
    roberta_bpe,
    sentencepiece_bpe,
    write_tokenizer,
    xlm_roberta,
)
from versions import skip_before

from minilora.data.examples import example_maker
from minilora.formats.tokenizer import ByteTokenizer, load_tokenizer

BERT = {"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
GPT2 = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
QWEN2 = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
GEMMA = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}


def added(content, **options):
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True, **options}


def decoder_of(library, *more):
    """added_tokens_decoder: the library's own added tokens, and more after its vocabulary."""
    own = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in json.loads(library.to_str())["added_tokens"]}
    size = library.get_vocab_size()
    return {"added_tokens_decoder": own | {str(size + i): token for i, token in enumerate(more)}}


MASK = {"__type": "AddedToken", **added("<mask>", lstrip=True)}
FOLDERS = {
    "bert": (bert_wordpiece, BERT, {}),
    "bert, cased": (bert_wordpiece, {**BERT, "do_lower_case": False}, {}),
    "bert, cased file, no settings": (lambda: bert_wordpiece(False), None, {"config": {"model_type": "bert"}}),
    "bert, accents": (bert_wordpiece, {**BERT, "strip_accents": False}, {}),
    "bert, cased without accents": (bert_wordpiece, {**BERT, "do_lower_case": False, "strip_accents": True}, {}),
    "bert, Chinese words": (bert_wordpiece, {**BERT, "tokenize_chinese_chars": False}, {}),
    "bert, BertTokenizerFast": (bert_wordpiece, {**BERT, "tokenizer_class": "BertTokenizerFast", "do_lower_case": False}, {}),
    "bert, taken as it is": (lambda: bert_wordpiece(False), {**BERT, "tokenizer_class": "PreTrainedTokenizerFast"}, {}),
    "bert, SqueezeBertTokenizer": (bert_wordpiece, {**BERT, "tokenizer_class": "SqueezeBertTokenizer", "do_lower_case": False}, {}),
    "bert, XLMRobertaTokenizer": (xlm_roberta, {"tokenizer_class": "XLMRobertaTokenizer"}, {"config": {"model_type": "bert"}}),
    "bert, XLMRobertaTokenizer, no prefix space": (xlm_roberta, {"tokenizer_class": "XLMRobertaTokenizer", "add_prefix_space": None}, {}),
    "distilbert": (bert_wordpiece, {**BERT, "tokenizer_class": "DistilBertTokenizer"}, {"config": {"model_type": "distilbert"}}),
    "distilbert, no settings": (bert_wordpiece, None, {"config": {"model_type": "distilbert"}}),
    "roberta": (roberta_bpe, {"tokenizer_class": "RobertaTokenizer", "mask_token": MASK}, {"config": {"model_type": "roberta"}}),
    "roberta, no settings": (roberta_bpe, None, {"config": {"model_type": "roberta"}}),
    "roberta, prefix space": (roberta_bpe, {"tokenizer_class": "RobertaTokenizerFast", "add_prefix_space": True}, {}),
    "roberta, offsets with spaces": (roberta_bpe, {"tokenizer_class": "RobertaTokenizer", "trim_offsets": False}, {}),
    "xlm-roberta": (xlm_roberta, {"mask_token": MASK}, {"config": {"model_type": "xlm-roberta"}}),
    "modernbert": (bert_wordpiece, {**BERT, "tokenizer_class": "RobertaTokenizer"}, {"config": {"model_type": "modernbert"}}),
    "gpt2": (byte_level_bpe, GPT2, {}),
    "gpt2, prefix space": (byte_level_bpe, {**GPT2, "add_prefix_space": True}, {}),
    "gpt2, digits in the file": (library_bpe, {**GPT2, "bos_token": "<|end|>", "eos_token": "<|end|>", "unk_token": "<|end|>"}, {}),
    "gpt2, no settings": (byte_level_bpe, None, {"config": {"model_type": "gpt2"}}),
    "gpt2, add_bos_token": (byte_level_bpe, {**GPT2, "add_bos_token": True, "add_eos_token": True}, {}),
    "gpt2, a new token": (byte_level_bpe, {**GPT2, **decoder_of(byte_level_bpe(), added("<new>"))}, {}),
    "gpt2, a new token that strips": (
        byte_level_bpe,
        {**GPT2, **decoder_of(byte_level_bpe(), added("<new>", lstrip=True, special=False))},
        {},
    ),
    "gpt2, pad_token is new": (byte_level_bpe, {**GPT2, "pad_token": "<new>"}, {}),
    "gpt2, a word is a special token": (byte_level_bpe, {**GPT2, "additional_special_tokens": ["cat", "<new>"]}, {}),
    "gpt2, extra tokens": (byte_level_bpe, {**GPT2, "extra_special_tokens": {"image_token": "<new>"}}, {}),
    "gpt2, named and unnamed extra tokens": (
        byte_level_bpe,
        {**GPT2, "extra_special_tokens": {"image_token": "<new>"}, "additional_special_tokens": ["cat"], "seen_token": 3},
        {},
    ),
    "gpt2, model_specific_special_tokens": (byte_level_bpe, {**GPT2, "model_specific_special_tokens": {"image_token": "<new>"}}, {}),
    "gpt2, named tokens in special_tokens_map": (
        byte_level_bpe,
        GPT2,
        {"special_tokens_map": {"bos_token": None, "extra_special_tokens": {"image_token": "<new>"}, "additional_special_tokens": ["cat"]}},
    ),
    "gpt2, special_tokens_map": (byte_level_bpe, GPT2, {"special_tokens_map": {"eos_token": added("</s>"), "pad_token": "<new>"}}),
    "gpt2, added_tokens.json": (byte_level_bpe, GPT2, {"added_tokens": {"<new>": byte_level_bpe().get_vocab_size()}}),
    "gpt2, special tokens split": (byte_level_bpe, {**GPT2, "split_special_tokens": True}, {}),
    "llama": (sentencepiece_bpe, LLAMA, {}),
    "llama, legacy": (sentencepiece_bpe, {**LLAMA, "legacy": True}, {}),
    "llama, no prefix space": (sentencepiece_bpe, {**LLAMA, "add_prefix_space": False}, {}),
    "llama, no begin token requested": (sentencepiece_bpe, {**LLAMA, "add_bos_token": False}, {}),
    "llama, an end token in the file": (lambda: sentencepiece_bpe("<s> $A </s>"), LLAMA, {}),
    "llama, taken as it is": (sentencepiece_bpe, {**LLAMA, "tokenizer_class": "PreTrainedTokenizerFast"}, {}),
    "llama, an unknown class": (sentencepiece_bpe, {**LLAMA, "tokenizer_class": "OurTokenizer"}, {}),
    "llama, bytes": (byte_level_bpe, {**LLAMA, "unk_token": None}, {}),
    "llama, new tokens": (sentencepiece_bpe, {**LLAMA, "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}, {}),
    "qwen2": (byte_level_bpe, QWEN2, {}),
    "qwen2, another class": (byte_level_bpe, {**QWEN2, "tokenizer_class": "PreTrainedTokenizerFast"}, {"config": {"model_type": "qwen2"}}),
    "qwen2, prefix space": (byte_level_bpe, {**QWEN2, "add_prefix_space": True}, {"config": {"model_type": "qwen2"}}),
    "qwen3": (byte_level_bpe, QWEN2, {"config": {"model_type": "qwen3"}}),
    "qwen3, another class": (byte_level_bpe, {**QWEN2, "tokenizer_class": "PreTrainedTokenizerFast"}, {"config": {"model_type": "qwen3"}}),
    "qwen3, no class": (byte_level_bpe, {"eos_token": "<|im_end|>"}, {"config": {"model_type": "qwen3"}}),
    "gemma": (gemma_bpe, GEMMA, {}),
    "gemma, GemmaTokenizerFast": (gemma_bpe, {**GEMMA, "tokenizer_class": "GemmaTokenizerFast", "add_bos_token": True}, {}),
    "gemma, no class": (gemma_bpe, None, {"config": {"model_type": "gemma3_text"}}),
    "gemma, new tokens": (gemma_bpe, {**GEMMA, "eos_token": "<end_of_turn>", "additional_special_tokens": ["<new>"]}, {}),
    "gemma, named tokens": (gemma_bpe, {**GEMMA, "extra_special_tokens": {"boi_token": "<start_of_image>"}, "legacy": None}, {}),
    "plain": (byte_level_bpe, PLAIN, {}),
    "plain, digits": (library_bpe, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}, {}),
    "plain, cleaned up": (byte_level_bpe, {**PLAIN, "clean_up_tokenization_spaces": True}, {}),
    "plain, no settings": (byte_level_bpe, None, {}),
}
TEXTS = [
    "",
    "the cat",
    " the cat ",
    "The Cat isn't naïve , he ' s",
    "héllo HÉLLO é",
    "日本語 is 日 本",
    "foobar  2024    12\n\n  x\n",
    "☃🎉",
]
TEXTS += [
    "a\tb\r\nc",
    "a<new>b <new> c",
    "cat cats the cat",
    "<s>the cat</s>",
    "x <|im_end|> y<|endoftext|>",
    "[CLS] a [MASK] b[SEP]",
    "a <mask> b</s>",
    "<unk> <0x41>",
]


@pytest.fixture(scope="module")
def auto():
    module = pytest.importorskip("transformers", reason="the oracle transformers is not installed: pip install 'minilora[oracle]'")
    return module.AutoTokenizer.from_pretrained


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_texts_match_transformers(name, auto, tmp_path):
    if name in ("gpt2, named and unnamed extra tokens", "llama, bytes"):
        skip_before(pytest.importorskip("transformers"), (5, 23), "reads such a file otherwise")
    library, config, files = FOLDERS[name]
    folder = write_tokenizer(tmp_path / "a", library(), config, **files)
    ours, theirs = load_tokenizer(folder, 1000), auto(folder)
    ours.save(write_tokenizer(tmp_path / "b", library(), config=files.get("config")))
    saved = load_tokenizer(tmp_path / "b", 1000), auto(tmp_path / "b")
    for text in TEXTS:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, special).tolist() == ids, (text, theirs.convert_ids_to_tokens(ids))
            assert saved[0].encode(text, special).tolist() == ids
            assert saved[1](text, add_special_tokens=special)["input_ids"] == ids
            for skip in (False, True):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip) == saved[0].decode(ids, skip)
                assert saved[1].decode(ids, skip_special_tokens=skip) == ours.decode(ids, skip)
        spans = theirs(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert ours.offsets(text).tolist() == [list(span) for span in spans]
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


# ---- records -------------------------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "as Qwen2.5's": "{% if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{% else %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    + CHATML.replace("in messages", "in messages if m.role != 'system'"),
    "as Llama 2's": "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}{% else %}"
    "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
    "as Llama 3's": "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_end|>\n\n' + m.content | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}",
    "words": "{% for m in messages %}{{ m.role.upper() + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}",
    "messages only": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "pad, unk, documents": "{{ pad_token }}{{ unk_token }}{{ documents | length if documents else 0 }}" + CHATML,
    "marked": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}",
    "the last answer is marked": "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}|{% endif %}{% endfor %}",
}
TALKS = {
    "a turn": [("user", "the cat"), ("assistant", "sat on the mat")],
    "two turns": [("user", "Hello  World"), ("assistant", "naïve\n\n"), ("user", " 2024"), ("assistant", " x")],
    "a system": [("system", "héllo"), ("user", "<|im_end|> 日本"), ("assistant", "☃")],
    "the assistant begins": [("assistant", "help"), ("user", "foobar"), ("assistant", "the")],
    "the user ends": [("user", "a"), ("assistant", "b"), ("user", "my secret")],
}
CHAT_TOKENIZERS = {
    name: FOLDERS[name]
    for name in ("gpt2", "gpt2, prefix space", "llama", "llama, legacy", "llama, taken as it is", "qwen2", "plain, digits")
}


def messages_of(talk):
    return [{"role": role, "content": content} for role, content in talk]


@pytest.fixture(scope="module")
def chat_tokenizers(tmp_path_factory):
    """{name: folder} of the tokenizers of decoders, each with a pad, a begin and an end token."""
    made = {}
    for name, (library, config, files) in CHAT_TOKENIZERS.items():
        config = {"bos_token": "<s>", "pad_token": "<|endoftext|>", **config}
        made[name] = write_tokenizer(tmp_path_factory.mktemp("chat") / "t", library(), config, **files)
    return made


def example_of(tokenizer, record, template=None, **options):
    """(ids with the last label, which of them are trained on) of a record."""
    make = example_maker("lm", tokenizer, options.pop("window", 5000), options.pop("mask", True), None, template)
    example = make(record)
    last = example.labels[-1]
    return np.append(example.ids, last if last >= 0 else -1), np.append([False], example.labels >= 0)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CHAT_TOKENIZERS)
def test_conversations_match_apply_chat_template(name, template, chat_tokenizers, auto):
    ours, theirs = load_tokenizer(chat_tokenizers[name], 1000), auto(chat_tokenizers[name])
    for key, talk in TALKS.items():
        messages = messages_of(talk)
        extra = {"tools": [{"name": "f"}], "documents": [{"title": "a", "text": "b"}]}
        requested = dict(chat_template=TEMPLATES[template], **extra)
        for prompt in (False, True):
            ours.chat_template = TEMPLATES[template]
            assert ours.render(messages, prompt, **extra) == theirs.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=False, **requested
            )
        expected = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask="{% generation %}" in TEMPLATES[template], **requested
        )
        if not any(expected.get("assistant_masks", [1, 1])[1:]):
            continue
        ids, labelled = example_of(ours, {"messages": messages, **extra}, TEMPLATES[template])
        known = ids[:-1] if ids[-1] < 0 else ids  # an unlabelled last token belongs to no message
        assert known.tolist() == expected["input_ids"][: len(known)], (key, ours.decode(known), theirs.decode(expected["input_ids"]))
        if "assistant_masks" in expected:
            assert labelled.tolist()[1:] == [bool(m) for m in expected["assistant_masks"]][1 : len(labelled)], key


PIECES = [
    "the",
    " cat",
    "foo",
    "bar",
    " ",
    "  ",
    "\n",
    "\n\n",
    "e",
    "\u0301",
    "é",
    "日本",
    "☃",
    "12",
    "'s",
    "<s>",
    "</s>",
    "<|im_end|>",
    "\t",
    "A",
]
ANY = st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1")  # templates that mark answers, and are refused
TEXT = st.lists(st.sampled_from(PIECES), max_size=6).map("".join) | st.text(ANY, max_size=8)


@pytest.mark.parametrize("name", ["bytes", *CHAT_TOKENIZERS])
def test_the_ids_decode_to_the_record(name, chat_tokenizers):
    """For any text, also where a merge, a prefix space or a normalizer reaches across a boundary."""
    tokenizer = ByteTokenizer() if name == "bytes" else load_tokenizer(chat_tokenizers[name], 1000)
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    usual = [key for key in TEMPLATES if name != "bytes" or "s_token" not in TEMPLATES[key]]  # bytes have no begin or end token to write

    def spelled(text, behind=()):
        ids = tokenizer.begin(tokenizer.encode(text, add_special=False)).tolist()
        return tokenizer.decode(ids if not behind or ids[-1:] == behind else [*ids, *behind])

    def usable(record, template=None, **options):
        try:
            return example_of(tokenizer, record, template, **options)
        except ValueError as error:
            if "nothing to learn" not in str(error):
                raise
            return None, None

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(TEXT, TEXT, TEXT, TEXT, st.sampled_from(usual))
    def check(a, b, c, d, template):
        for record, text, behind in (({"text": a}, a, []), ({"prompt": a, "completion": b}, a + b, end)):
            ids, labelled = usable(record)
            if ids is not None:
                assert tokenizer.decode(ids) == spelled(text, behind)
                requested, first = tokenizer.encode_prompt(a), np.flatnonzero(labelled)[0]
                composed = not unicodedata.normalize("NFC", a + b).startswith(unicodedata.normalize("NFC", a))  # across the boundary
                if "prompt" in record and first >= len(requested) and not composed:
                    assert np.array_equal(ids[: len(requested)], requested)
        messages = messages_of([("user", a), ("assistant", b), ("user", c), ("assistant", d), ("user", "the end")])
        tokenizer.chat_template = TEMPLATES[template]
        text = tokenizer.render(messages)
        ids, labelled = usable({"messages": messages}, TEMPLATES[template], mask=False)
        assert ids is None or np.array_equal(ids, tokenizer.encode(text, add_special=False))
        ids, labelled = usable({"messages": messages}, TEMPLATES[template])
        if ids is not None:
            past = tokenizer.offsets(text)[: len(ids)][labelled][:, 1].max()
            assert past <= len(tokenizer.render(messages[:4]))  # "the end" belongs to the user

    check()


@pytest.mark.parametrize("name", CHAT_TOKENIZERS)
def test_streams_match_decode(name, chat_tokenizers):
    tokenizer = load_tokenizer(chat_tokenizers[name], 1000)
    ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=9) | TEXT.map(lambda text: tokenizer.encode(text).tolist())

    @settings(max_examples=150, deadline=None)
    @given(ids, st.booleans())
    def check(ids, skip):
        assert "".join(tokenizer.stream(ids, skip)) == tokenizer.decode(ids, skip)

    check()
