"""A matrix of tokenizers, settings beside them, templates and records against transformers, whose AutoTokenizer is the judge."""

import json

import pytest
from small_tokenizers import bert_wordpiece, byte_level_bpe, library_bpe, sentencepiece_bpe, write_tokenizer

from minilora.formats.tokenizer import load_tokenizer

BERT = {"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
GPT2 = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
QWEN2 = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}


def added(content, **options):
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True, **options}


def decoder_of(library, *more):
    """added_tokens_decoder: the library's own added tokens, and more behind its vocabulary."""
    own = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in json.loads(library.to_str())["added_tokens"]}
    size = library.get_vocab_size()
    return {"added_tokens_decoder": own | {str(size + i): token for i, token in enumerate(more)}}


FOLDERS = {
    "bert": (bert_wordpiece, BERT, {}),
    "bert, cased": (bert_wordpiece, {**BERT, "do_lower_case": False}, {}),
    "bert, cased file, no settings": (lambda: bert_wordpiece(False), None, {"config": {"model_type": "bert"}}),
    "bert, accents": (bert_wordpiece, {**BERT, "strip_accents": False}, {}),
    "bert, cased without accents": (bert_wordpiece, {**BERT, "do_lower_case": False, "strip_accents": True}, {}),
    "bert, Chinese words": (bert_wordpiece, {**BERT, "tokenize_chinese_chars": False}, {}),
    "bert, BertTokenizerFast": (bert_wordpiece, {**BERT, "tokenizer_class": "BertTokenizerFast", "do_lower_case": False}, {}),
    "bert, taken as it is": (lambda: bert_wordpiece(False), {**BERT, "tokenizer_class": "PreTrainedTokenizerFast"}, {}),
    "bert, cleaned up": (bert_wordpiece, {**BERT, "clean_up_tokenization_spaces": True}, {}),
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
    "gpt2, special_tokens_map": (byte_level_bpe, GPT2, {"special_tokens_map": {"eos_token": added("</s>"), "pad_token": "<new>"}}),
    "gpt2, added_tokens.json": (byte_level_bpe, GPT2, {"added_tokens": {"<new>": byte_level_bpe().get_vocab_size()}}),
    "gpt2, special tokens split": (byte_level_bpe, {**GPT2, "split_special_tokens": True}, {}),
    "llama": (sentencepiece_bpe, LLAMA, {}),
    "llama, legacy": (sentencepiece_bpe, {**LLAMA, "legacy": True}, {}),
    "llama, no prefix space": (sentencepiece_bpe, {**LLAMA, "add_prefix_space": False}, {}),
    "llama, no begin token asked": (sentencepiece_bpe, {**LLAMA, "add_bos_token": False}, {}),
    "llama, an end token in the file": (lambda: sentencepiece_bpe("<s> $A </s>"), LLAMA, {}),
    "llama, taken as it is": (sentencepiece_bpe, {**LLAMA, "tokenizer_class": "PreTrainedTokenizerFast"}, {}),
    "llama, an unknown class": (sentencepiece_bpe, {**LLAMA, "tokenizer_class": "OurTokenizer"}, {}),
    "llama, bytes": (byte_level_bpe, {**LLAMA, "unk_token": None}, {}),
    "llama, new tokens": (sentencepiece_bpe, {**LLAMA, "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}, {}),
    "qwen2": (byte_level_bpe, QWEN2, {}),
    "qwen2, another class": (byte_level_bpe, {**QWEN2, "tokenizer_class": "PreTrainedTokenizerFast"}, {"config": {"model_type": "qwen2"}}),
    "qwen2, prefix space": (byte_level_bpe, {**QWEN2, "add_prefix_space": True}, {}),
    "plain": (byte_level_bpe, PLAIN, {}),
    "plain, digits": (library_bpe, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}, {}),
    "plain, cleaned up": (byte_level_bpe, {**PLAIN, "clean_up_tokenization_spaces": True}, {}),
    "plain, cleaned up all the same": (
        byte_level_bpe,
        {**PLAIN, "clean_up_tokenization_spaces": True, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True},
        {},
    ),
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
    "<unk> <0x41>",
]


@pytest.fixture(scope="module")
def auto():
    module = pytest.importorskip("transformers", reason="the oracle transformers is not installed: pip install 'minilora[oracle]'")
    return module.AutoTokenizer.from_pretrained


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_texts_are_those_of_transformers(name, auto, tmp_path):
    library, config, files = FOLDERS[name]
    folder = write_tokenizer(tmp_path / "a", library(), config, **files)
    ours, theirs = load_tokenizer(folder, 1000), auto(folder)
    ours.save(tmp_path / "b")
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
