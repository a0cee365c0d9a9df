"""Generated text: where it ends, and which part is shown."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import BYTES, CHATML, TALK, byte_level_bpe, sentencepiece_bpe, write_tokenizer

from minilora.data.examples import example_maker
from minilora.formats.chat import assistant_spans, find_chat_template, render_chat, turn_end
from minilora.formats.tokenizer import ByteTokenizer, HFTokenizer, gguf_tokenizer, load_tokenizer
from minilora.models.decoder import Decoder
from minilora.models.generate import generate_text

BPE = HFTokenizer(byte_level_bpe(), bos_id=3, eos_id=0, chat_template=CHATML)


class Parrot(Decoder):
    """A model that generates given tokens, whatever its input, and spaces after them."""

    config = SimpleNamespace(longest_sequence=100)

    def __init__(self, ids, size):
        self.ids, self.size = list(ids), size

    def decode(self, ids, cache):
        return np.eye(self.size)[self.ids.pop(0) if self.ids else 32]


def generated(text, stop=(), tokenizer=BYTES, n=50):
    """(the pieces shown, the result) of a model that generates `text`."""
    pieces = []
    model = Parrot(tokenizer.encode(text, add_special=False), tokenizer.vocab_size)
    result = generate_text(model, tokenizer, tokenizer.encode("x"), n, temperature=0, stop=stop, show=pieces.append)
    assert "".join(pieces) == result["text"]
    return pieces, result


@given(st.text("ab\u2603\n", max_size=12), st.lists(st.text("ab\u2603\n", min_size=1, max_size=4), max_size=3))
def test_no_part_of_a_stop_text_is_shown(text, stop):
    n = len(text.encode())
    first = min((at for at in (text.find(mark) for mark in stop) if at >= 0), default=len(text))
    result = generated(text, stop, n=n)[1]
    # of two overlapping texts, the one that is complete first counts, in reading order
    complete = min(((text.find(mark) + len(mark), text.find(mark)) for mark in stop if mark in text), default=(0, first))[0]
    assert result["ended"] == ("stop" if complete else "length")
    assert text.startswith(result["text"])
    assert not any(mark in result["text"] for mark in stop)
    if not complete:
        assert result == {"text": text, "tokens": n, "ended": "length"}


def test_a_possible_stop_text_is_held_back():
    assert generated("one\n\ntwo", ["\n\n"])[0] == ["o", "n", "e", ""]
    assert generated("one\ntwo", ["\n\n"], n=7)[0] == ["o", "n", "e", "\nt", "w", "o", ""]
    assert generated("User", ["User:"], n=4)[1] == {"text": "User", "tokens": 4, "ended": "length"}


def test_the_space_before_the_first_word_is_shown():
    tokenizer = HFTokenizer(sentencepiece_bpe(), 1, 2)
    requested, new = tokenizer.encode("the cat"), tokenizer.encode("the cat sat on")[len(tokenizer.encode("the cat")) :]
    result = generate_text(Parrot(new, tokenizer.vocab_size), tokenizer, requested, len(new), temperature=0)
    assert result["text"] == " sat on"


def test_special_tokens_are_valid_stop_texts_and_empty_texts_are_not():
    assert generated("the cat<|im_end|>sat", ["</s>"], HFTokenizer(byte_level_bpe(), eos_id=0), n=9)[1]["text"].startswith("the catsat")
    assert generated("the cat<|im_end|>sat", ["<|im_end|>"], HFTokenizer(byte_level_bpe(), eos_id=0))[1] == {
        "text": "the cat",
        "tokens": 2,
        "ended": "stop",
    }
    with pytest.raises(ValueError, match=r"--stop\) is empty"):
        generated("x", [""])
    with pytest.raises(ValueError, match="holds a special token; give that token alone"):
        generated("x", ["x<|im_end|>"], BPE)


# ---- tokens that end a text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (CHATML, "<|im_end|>"),
        ("{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}", "</s>"),
        (
            "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% generation %}{{ m.content }}{% endgeneration %}</s>\n{% endfor %}",
            "</s>",
        ),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        ("broken {{", None),
    ],
)
def test_the_token_that_ends_an_answer_is_found_in_the_template(template, token):
    assert turn_end(template, ["<|im_start|>", "<|im_end|>", "</s>"], eos_token="</s>") == token


def test_a_text_ends_at_every_end_token_of_the_files(tmp_path):
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": CHATML}
    made = {"generation_config": {"eos_token_id": [3, -1]}, "config": {"eos_token_id": 0, "bos_token_id": -1}}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "a", byte_level_bpe(), settings, **made), 400)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.stop_ids) == (4, None, {4, 3, 0, 2})
    tokenizer.save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == {"eos_token_id": [0, 2, 3, 4]}
    (tmp_path / "b" / "generation_config.json").write_text('{"eos_token_id": 0, "top_k": 5}')
    tokenizer.save_stop_ids(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == {"eos_token_id": [0, 2, 3, 4], "top_k": 5}
    again = load_tokenizer(tmp_path / "b", 400)
    assert (again.eos_id, again.stop_ids) == (4, {4, 3, 0, 2})


def test_a_prompt_is_encoded_as_in_training():
    tokenizer = HFTokenizer(sentencepiece_bpe("<s> $A </s>"), 1, 2)
    requested = tokenizer.encode_prompt("the cat")
    assert tokenizer.encode("the cat").tolist() == [*requested, 2]
    assert tokenizer.encode_prompt("<s>the").tolist().count(1) == 1
    example = example_maker("lm", tokenizer, 99, True, None, None)({"prompt": "the cat", "completion": " sat"})
    assert example.ids[: len(requested)].tolist() == requested.tolist()
    assert (example.labels[len(requested) - 1], example.labels[-1]) == (example.ids[len(requested)], 2)
    cut = example_maker("lm", tokenizer, 8, True, None, None)({"prompt": "<s>" + "the cat " * 9, "completion": " sat"})
    assert (cut.cut, cut.ids[0], len(cut.ids)) == (True, 1, 8)  # the begin token survives truncation


# ---- conversations -------------------------------------------------------------------------------------------------------------------


def answers(template, messages, **more):
    text, spans = assistant_spans(template, messages, **more)
    return [text[a:b] for a, b in spans]


def test_the_next_user_message_has_no_labels():
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert answers(plain, [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "my secret"}], eos_token="</s>") == ["Hi"]
    assert answers(CHATML, TALK, eos_token="</s>", ends=["<|im_end|>"]) == ["Hello!<|im_end|>", "\nSo <b>long</b><|im_end|>"]


def test_answers_are_found_in_templates_with_extra_or_missing_text():
    """SmolLM2 adds a system prompt before the first message; Phi-3 ends the last turn with an extra token; Qwen3 drops thinking."""
    talk = [*TALK[:2], TALK[2], {"role": "assistant", "content": "So <b>long</b>"}]
    smollm2 = "{% if messages and messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}" + CHATML
    assert answers(smollm2, talk[1:], ends=["<|im_end|>"]) == ["Hello!<|im_end|>", "So <b>long</b><|im_end|>"]
    phi3 = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    phi3 += "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
    ends = ["<|end|>", "<|user|>", "<|assistant|>"]
    assert answers(phi3, talk, eos_token="</s>", ends=ends) == ["Hello!<|end|>", "So <b>long</b><|end|>\n</s>"]
    qwen3 = CHATML.replace(
        "message['content']", "('<think>' if loop.last and message.role == 'assistant' else '') + message['content'].split('>')[-1]"
    )
    thought = [TALK[0], {**TALK[1], "content": "<think>hm</think>Hello!"}, *talk[2:3], {**TALK[3], "content": "Bye"}]
    assert answers(qwen3, thought, ends=["<|im_end|>"]) == ["Hello!<|im_end|>", "<think>Bye<|im_end|>"]


def test_a_message_may_be_excluded_from_the_labels():
    for field, value in (("weight", 0), ("train", False)):
        messages = [TALK[0], {**TALK[1], field: value}, *TALK[2:]]
        marked = "{% for m in messages if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        for template in (CHATML, marked):
            assert [text.removesuffix("<|im_end|>\n") for text in answers(template, messages)] == ["\nSo <b>long</b>"]
    for message, wrong in ((TALK[1], {"weight": 0.5}), (TALK[1], {"train": "no"}), (TALK[0], {"weight": 1})):
        with pytest.raises(ValueError, match=r'message 1: "(weight|train)" is'):
            answers(CHATML, [{**message, **wrong}])
    make = example_maker("lm", BPE, 99, False, None, CHATML)
    with pytest.raises(ValueError, match="leave out --no-mask-prompt"):
        make({"messages": [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]]})


def test_tools_have_a_separate_template(tmp_path):
    both = [{"name": "default", "template": "\n{{ messages | length }}\n"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    write_tokenizer(tmp_path, byte_level_bpe(), {"chat_template": both})
    template = find_chat_template(tmp_path)
    assert render_chat(template, TALK) == "\n4"
    assert render_chat(template, TALK, tools=[{}, {}]) == "2 tools"
    with pytest.raises(ValueError, match='"tools" must be a list of objects'):
        render_chat(template, TALK, tools="[]")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8 text"):
        find_chat_template(tmp_path)


def test_calls_of_tools_may_have_no_content(tmp_path):
    template = "{% for m in messages %}{{ m.content is none }} {{ m.name is defined }} {% endfor %}"
    calls = {"role": "assistant", "content": None, "name": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert render_chat(template, [calls]) == "True False "
    with pytest.raises(ValueError, match='message 1 must be an object with the strings "role" and "content"'):
        render_chat(template, [{**calls, "tool_calls": None}])


def test_only_the_part_of_a_long_conversation_that_fits_is_rendered():
    make = example_maker("lm", BYTES, 64, True, None, "{% for m in messages %}{{ m.content }}{% endfor %}")
    talk = [{"role": ("user", "assistant")[i % 2], "content": "words "} for i in range(4000)]
    broken = [*talk[:200], {"role": "assistant", "content": "x", "weight": 1}]
    example = make({"messages": talk})
    assert example.cut
    assert BYTES.decode(example.labels[example.labels >= 0]) == "words " * 5
    assert make({"messages": broken}).ids.tolist() == example.ids.tolist()


# ---- bad input -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "T5Tokenizer"}, "'T5Tokenizer' is not supported"),
        ({"tokenizer_class": "BertJapaneseTokenizer"}, "'BertJapaneseTokenizer' is not supported"),
        ({"tokenizer_class": "BertTokenizer"}, "its model is BPE, but BertTokenizer needs WordPiece"),
        ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": "yes"}, "no GPT2Tokenizer can be built from it"),
        ({"eos_token": 7}, "eos_token must be a token, got 7"),
        ({"eos_token": "\ud800"}, "unpaired surrogate"),
        ({"added_tokens_decoder": {"x": {"content": "y"}}}, "'x' is not a token id"),
        ({"additional_special_tokens": "x"}, "must be a list"),
        ({"extra_special_tokens": {"messages": "<x>"}}, "cannot have the name 'messages'"),
    ],
)
def test_inapplicable_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(write_tokenizer(tmp_path, byte_level_bpe(), settings), 1000)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("charsmap", ["////////", "", "AAA=", "not base64!"])
def test_a_broken_table_does_not_reach_the_library(charsmap, tmp_path):
    folder = write_tokenizer(tmp_path, byte_level_bpe())
    raw = json.loads((folder / "tokenizer.json").read_text())
    normalizer = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    for nested in (normalizer, {"type": "Sequence", "normalizers": [normalizer]}):
        (folder / "tokenizer.json").write_text(json.dumps({**raw, "normalizer": nested}))
        with pytest.raises(ValueError, match="precompiled_charsmap of its normalizer is invalid"):
            load_tokenizer(folder, 1000)


def test_invalid_unicode_is_an_error_of_one_sentence():
    for tokenizer in (BPE, ByteTokenizer()):
        with pytest.raises(ValueError, match="unpaired surrogate at character 1"):
            tokenizer.encode_prompt("a\ud800")


def test_an_unknown_word_without_a_token_for_it_is_an_error_of_one_sentence(tmp_path):
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0}, unk_token="[UNK]"))
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, words), 1000)
    with pytest.raises(ValueError, match=r"tokenizer\.json: the tokenizers library failed \(.*UNK"):
        tokenizer.encode("b")


def test_gguf_tokens_that_end_a_turn_and_metadata_of_other_types():
    tokens = ["a", "b", "<|im_end|>", "<|eom|>"]
    metadata = {"tokens": tokens, "merges": [], "token_type": [1, 1, 3, 3], "eos_token_id": 1, "pre": "gpt-2"}
    assert gguf_tokenizer({**metadata, "eot_token_id": 2, "eom_token_id": 3}, 4).stop_ids == {1, 2, 3}
    for wrong in ({"merges": [1]}, {"merges": 5}, {"token_type": ["x"]}, {"tokens": [1]}, {"token_type": [1]}, {"chat_template": 3}):
        with pytest.raises(ValueError, match=r"m\.gguf: .* tokenizer"):
            gguf_tokenizer({**metadata, **wrong}, 4, "m.gguf")
    with pytest.raises(ValueError, match=r"m\.gguf: eot is token 9"):
        gguf_tokenizer({**metadata, "eot_token_id": 9}, 4, "m.gguf")
