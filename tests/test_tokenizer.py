"""Tokenizers and chat templates: bytes, tokenizer.json, GGUF metadata, sandboxed jinja2."""

import json
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import BPE, BYTES, CHATML, SPECIAL, TALK, library_bpe, library_wordpiece

from minilora.formats.chat import assistant_spans, find_chat_template, render_chat
from minilora.formats.tokenizer import ByteTokenizer, HFTokenizer, gguf_tokenizer, load_tokenizer


def folder_of(path, library, **files):
    path.mkdir(exist_ok=True)
    library.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def metadata(**changed):
    """The metadata of a GGUF file with BPE's vocabulary, as `read_gguf_tokenizer` returns it."""
    model = json.loads(BPE.library.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    types = [3 if token in SPECIAL else 1 for token in tokens]
    result = {"tokens": tokens, "merges": merges, "token_type": types, "bos_token_id": 1, "eos_token_id": 0, "pre": "smollm"}
    return {**result, "chat_template": CHATML, "add_bos_token": False, **changed}


# ---- encode, decode, stream ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@given(text=st.text())
def test_decode_inverts_encode_and_streams_match(tokenizer, text):
    ids = tokenizer.encode(text, add_special=False)
    assert ids.dtype == np.int64
    assert ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.stream(iter(ids))) == text


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@given(raw=st.binary(max_size=12))
def test_a_stream_of_broken_characters_matches_decode(tokenizer, raw):
    alphabet = {byte: BPE.library.token_to_id(char) for byte, char in byte_characters().items()}
    ids = [b if tokenizer is BYTES else alphabet[b] for b in raw]
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids) == raw.decode("utf-8", errors="replace")


def byte_characters():
    """GPT-2's character for every byte: printable ones map to themselves, the others to 256 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def test_a_stream_yields_characters_once_complete():
    assert list(BYTES.stream(BYTES.encode("a☃é"))) == ["a", "☃", "é"]
    seen = []

    def ids():
        for id in BYTES.encode("é!"):
            seen.append("".join(result))
            yield id

    result = []
    for piece in BYTES.stream(ids()):
        result.append(piece)
    assert seen == ["", "", "é"]  # what had been yielded when the next byte was read


def test_a_stream_keeps_the_spaces_between_words():
    """Some decoders drop the space before the first token: the stream must not decode a token alone."""
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁the": 0, "▁cat": 1, "s": 2}, unk_token="s"))
    library.decoder = tokenizers.decoders.Metaspace()
    tokenizer = HFTokenizer(library)
    assert list(tokenizer.stream([0, 1, 2, 1])) == ["the", " cat", "s", " cat"]
    assert tokenizer.decode([1]) == "cat"


def test_special_tokens_are_encoded_and_skipped_on_request():
    ids = BPE.encode("the<|end|>")
    assert ids[-1] == 0
    assert BPE.decode(ids) == "the<|end|>"
    assert BPE.decode(ids, skip_special=True) == "the"
    assert "".join(BPE.stream(ids, skip_special=True)) == "the"
    assert (BPE.token(0), BPE.token(None)) == ("<|end|>", "")


# ---- tokenizer.json ------------------------------------------------------------------------------------------------------------------


def test_padding_and_truncation_of_the_file_are_ignored(tmp_path):
    library = library_wordpiece()
    library.enable_padding(length=16)
    library.enable_truncation(4)
    tokenizer = load_tokenizer(folder_of(tmp_path, library), 10)
    assert tokenizer.encode("A man eating food.").tolist() == [2, 4, 5, 6, 7, 8, 9, 3]
    assert tokenizer.encode("A man", add_special=False).tolist() == [4, 5]
    assert tokenizer.vocab_size == 10
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.prefix) == (None, None, (2,))


def test_special_ids_come_from_the_tokenizer_settings(tmp_path):
    config = {"vocab_size": 400, "bos_token_id": 2, "eos_token_id": 1}
    only = load_tokenizer(folder_of(tmp_path / "a", library_bpe(), config=config), 400)
    assert (only.bos_id, only.eos_id, only.stop_ids) == (None, 1, {1})  # only the tokenizer adds a begin token, as in transformers
    both = load_tokenizer(
        folder_of(
            tmp_path / "b",
            library_bpe(),
            config=config,
            tokenizer_config={"eos_token": {"content": "<|end|>"}, "bos_token": None, "chat_template": CHATML},
            special_tokens_map={"bos_token": "<|user|>"},
            generation_config={"eos_token_id": [0, 2]},
        ),
        400,
    )
    assert (both.bos_id, both.eos_id, both.stop_ids) == (1, 0, {0, 1, 2})
    assert both.chat_template == CHATML
    assert not both.prefix


def test_a_begin_token_added_by_the_tokenizer_is_detected(tmp_path):
    library = library_bpe()
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 1)])
    tokenizer = load_tokenizer(folder_of(tmp_path, library), 400)
    assert tokenizer.prefix == (1,)
    assert tokenizer.encode("the")[0] == 1


def test_a_model_of_bytes_needs_no_file(tmp_path):
    assert isinstance(load_tokenizer(tmp_path, 256), ByteTokenizer)


def test_invalid_tokenizers_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path, 300)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_tokenizer(tmp_path / "absent", 300)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path, 256)


def test_ids_beyond_the_embedding_are_refused(tmp_path):
    size = BPE.vocab_size
    folder = folder_of(tmp_path, library_bpe())
    assert load_tokenizer(folder, size).vocab_size == size
    with pytest.raises(ValueError, match=f"ids up to {size - 1}, but the model's embedding has {size - 1} rows"):
        load_tokenizer(folder, size - 1)
    with pytest.raises(ValueError, match=f"ids up to {size - 1}, but the model's embedding has 20 rows"):
        gguf_tokenizer(metadata(), 20)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    folder_of(tmp_path, library_bpe())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'minilora\[hf\]'"):
        load_tokenizer(tmp_path, 400)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install 'minilora\[hf\]'"):
        render_chat("never compiled before", TALK)


# ---- GGUF ----------------------------------------------------------------------------------------------------------------------------


@given(text=st.text() | st.sampled_from(["the capital of France is 2024", "<|user|>naïve<|end|> ☃"]))
def test_a_gguf_vocabulary_matches_its_source_tokenizer(text):
    tokenizer = gguf_tokenizer(metadata(), 400)
    assert tokenizer.encode(text).tolist() == BPE.encode(text).tolist()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gguf_metadata_give_special_tokens_digits_and_the_begin_token():
    tokenizer = gguf_tokenizer(metadata(), 400)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids, tokenizer.chat_template) == (1, 0, {0}, CHATML)
    assert tokenizer.decode(tokenizer.encode("the<|end|>"), skip_special=True) == "the"
    digits = {"merges": ["2 0", "2 4", "20 24"], "tokens": [*metadata()["tokens"][:-3], "20", "24", "2024"]}
    for pre, expected in (("gpt-2", ["2024"]), ("smollm", ["2", "0", "2", "4"])):
        other = gguf_tokenizer(metadata(pre=pre, **digits), 400)
        assert [other.decode([i]) for i in other.encode("2024")] == expected
    assert not tokenizer.prefix
    begun = gguf_tokenizer(metadata(add_bos_token=True), 400)
    assert begun.prefix == (1,)
    assert begun.encode("the").tolist() == [1, *tokenizer.encode("the")]
    assert begun.encode("the", add_special=False).tolist() == tokenizer.encode("the").tolist()


def test_llama_3_splits_digits_by_three_and_takes_a_known_word_whole():
    """As its tokenizer.json, which has ignore_merges; "smaug-bpe" has not."""
    tokens = [*metadata()["tokens"], "20", "202", "zq"]
    vocabulary = {"merges": [*metadata()["merges"], "2 0", "20 2"], "tokens": tokens, "token_type": [*metadata()["token_type"], 1, 1, 1]}
    for pre, whole in (("llama-bpe", ["zq"]), ("smaug-bpe", ["z", "q"])):
        ours = gguf_tokenizer(metadata(pre=pre, **vocabulary), 400)
        assert [ours.decode([i]) for i in ours.encode("2024")] == ["202", "4"]
        assert [ours.decode([i]) for i in ours.encode("zq")] == whole


def test_the_splitting_of_qwen2_matches_transformers():
    vocabulary = metadata(pre="qwen2")
    ours = gguf_tokenizer(vocabulary, 400)
    qwen2 = pytest.importorskip(
        "transformers", reason="the oracle transformers is not installed: pip install 'minilora[oracle]'"
    ).Qwen2Tokenizer
    merges = [tuple(merge.split(" ")) for merge in vocabulary["merges"]]
    ids = {token: i for i, token in enumerate(vocabulary["tokens"])}
    theirs = qwen2(ids, merges, unk_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>")

    @given(st.text() | st.sampled_from(["IT'S 1234\r\n\n  x", "the\u0301 cat, the mat;  Paris"]))
    def check(text):
        assert ours.encode(text).tolist() == theirs(text)["input_ids"]

    check()


@pytest.mark.parametrize("made", [BPE, gguf_tokenizer(metadata(add_bos_token=True), 400)], ids=["bpe", "gguf"])
def test_a_saved_tokenizer_is_the_same_here_and_in_transformers(made, tmp_path):
    made.save(tmp_path)
    again = load_tokenizer(tmp_path, 400)
    apart = {"library": None, "failed": None}
    assert vars(again) | apart == vars(made) | apart
    text = "the capital of France <|user|> 2024 ☃"
    assert again.encode(text).tolist() == made.encode(text).tolist()
    auto = pytest.importorskip(
        "transformers", reason="the oracle transformers is not installed: pip install 'minilora[oracle]'"
    ).AutoTokenizer.from_pretrained(tmp_path)
    assert auto(text)["input_ids"] == made.encode(text).tolist()
    assert auto.eos_token_id == 0
    assert auto.apply_chat_template(TALK, tokenize=False) == render_chat(CHATML, TALK)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"pre": "falcon"},
            "of model 'gpt2' and splits text as 'falcon'; supported: .*'smollm', 'gpt-2', 'qwen2', 'llama-bpe', 'smaug-bpe'",
        ),
        ({"model": "plamo2"}, "of model 'plamo2' .* and 'llama'"),
        ({"model": "llama", "scores": [0.0]}, "all scores or none"),
        (
            {"model": "llama", "add_space_prefix": False, "tokens": ["a", "b" * 257], "token_type": [1, 1]},
            "has 257 characters; at most 256 are supported",
        ),
        ({"tokens": ["a", "b", "a"]}, "the token 'a' occurs twice in the vocabulary"),
        ({"merges": ["t h e"]}, "the merge 't h e' does not join two tokens"),
        ({"merges": ["q q"]}, "the merge 'q q' does not join two tokens into a third"),
        ({"eos_token_id": 7000}, "eos is token 7000"),
    ],
)
def test_inconsistent_gguf_metadata_are_refused(changed, message):
    with pytest.raises(ValueError, match=f"model.gguf: .*{message}"):
        gguf_tokenizer(metadata(**changed), 400, "model.gguf")


# ---- chat templates ------------------------------------------------------------------------------------------------------------------


def test_templates_are_found_in_all_places(tmp_path):
    assert find_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "from config"}))
    assert find_chat_template(tmp_path) == "from config"
    config.write_text(json.dumps({"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "named"}]}))
    assert find_chat_template(tmp_path) == "named"
    (tmp_path / "chat_template.jinja").write_text("from jinja")
    assert find_chat_template(tmp_path) == "from jinja"
    (tmp_path / "chat_template.jinja").unlink()
    for wrong in (7, [{"name": "default"}], ["default"]):
        config.write_text(json.dumps({"chat_template": wrong}))
        with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template must be"):
            find_chat_template(tmp_path)


def test_chatml():
    expected = "<|im_start|>user\nHi<|im_end|>\n"
    assert render_chat(CHATML, TALK[:1]) == expected
    assert render_chat(CHATML, TALK[:1], add_generation_prompt=True) == expected + "<|im_start|>assistant\n"


TEMPLATES = {
    "chatml": CHATML,
    "blocks are trimmed": "{{ bos_token }}\n{% for m in messages %}\n  {% if m.role == 'user' %}\n"
    "[{{ m.content | trim }}]\n  {% endif %}\n{% endfor %}{{ eos_token }}",
    "tojson keeps letters": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "loop controls, namespace": "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ dict(a=1).a }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}",
    "the year": "{{ strftime_now('%Y') }}",
    "no tools": "{{ tools is none }}{{ documents is none }}{{ unknown }}{{ messages[0].name }}",
}
RENDERED = {
    "blocks are trimmed": "<s>\n[Hi]\n[Bye]\n</s>",
    "loop controls, namespace": "21",
    "generation": "Hello!\nSo <b>long</b>",
    "no tools": "TrueTrue",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name):
    text = render_chat(TEMPLATES[name], TALK, True, bos_token="<s>", eos_token="</s>")
    if name in RENDERED:
        assert text == RENDERED[name]
    if name.startswith("tojson"):
        assert text.startswith('[{"role": "user", "content": "Hi"}, ')
        assert "<b>" in text
    utils = pytest.importorskip(
        "transformers.utils.chat_template_utils", reason="the oracle transformers is not installed: pip install 'minilora[oracle]'"
    )
    result, _ = utils.render_jinja_template(
        [TALK], chat_template=TEMPLATES[name], add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert text == result[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ ('%s' | format(1)).__class__ }}",
        "{{ namespace(a=1).__class__ }}",
        "{{ [''] | map(attribute='__class__') | list }}",
        "{% set ns = namespace(__class__=1) %}",
        "{{ self.__init__ }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template):
    with pytest.raises(ValueError, match=r"^the chat template tries to leave the sandbox \(.*\)\.$"):
        render_chat(template, TALK)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}\n{{ m.role }", "is invalid at line 2"),
        ("{% import 'os' as os %}", "fails with"),
        ("{{ raise_exception('roles must alternate') }}", r"refuses these messages \(roles must alternate\)"),
        ("{{ 1 / 0 }}", "fails with ZeroDivisionError"),
        ("{{ nothing.at.all }}", "fails with UndefinedError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "fails with OverflowError"),
        (None, "has no chat template; put one into"),
    ],
)
def test_a_broken_template_is_reported_in_one_sentence(template, message):
    with pytest.raises(ValueError, match=message) as caught:
        render_chat(template, TALK)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"role": "user"}, {"role": "user", "content": None}, "Hi", {"role": 1, "content": "x"}])
def test_messages_are_objects_with_role_and_content(wrong):
    with pytest.raises(ValueError, match="message 2 must be an object"):
        render_chat(CHATML, [TALK[0], wrong])


def test_objects_with_methods_are_not_passed_to_a_template():
    with pytest.raises(ValueError, match="must consist of strings"):
        render_chat(CHATML, [{**TALK[0], "image": np.zeros(2)}])


# ---- messages of the assistant -------------------------------------------------------------------------------------------------------


def spans_of(template, messages=TALK, eos="<|im_end|>"):
    text, spans = assistant_spans(template, messages, eos_token=eos)
    return [text[a:b] for a, b in spans]


def test_messages_of_the_assistant_end_with_the_end_token():
    assert spans_of(CHATML) == ["Hello!<|im_end|>", "\nSo <b>long</b><|im_end|>"]
    assert spans_of(CHATML, eos="") == ["Hello!<|im_end|>\n", "\nSo <b>long</b><|im_end|>\n"]
    assert spans_of(CHATML, TALK[:1]) == []


def test_templates_without_a_generation_prompt_or_with_a_longer_one():
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert spans_of(plain, eos="") == ["assistant: Hello!\n", "assistant: \nSo <b>long</b>\n"]
    thinking = CHATML.replace("assistant\n'", "assistant\n<think>'")
    assert spans_of(thinking) == ["Hello!<|im_end|>", "\nSo <b>long</b><|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    rewrites = "{% for m in messages %}{{ m.role }}{{ m.content if loop.last else '...' }}{% endfor %}"
    with pytest.raises(ValueError, match="changes message 2"):
        spans_of(rewrites)
