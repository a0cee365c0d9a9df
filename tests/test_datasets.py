"""From records to examples to batches: what is trained on, truncated, refused, and every example once an epoch."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import BPE, BYTES, CHATML, TALK, library_bpe, library_wordpiece
from tiny import write_jsonl

from minilora.data.batches import Batch
from minilora.data.datasets import (
    Example,
    batches_of,
    collate,
    endless,
    hold_out,
    load_dataset,
    load_examples,
    packed_batches,
    read_records,
)
from minilora.data.examples import encode_pair
from minilora.data.records import is_dataset
from minilora.formats.tokenizer import HFTokenizer


def one(tmp_path, record, tokenizer=BPE, max_length=400, **options):
    """The example from one record."""
    (example,) = load_examples(write_jsonl(tmp_path / "one.jsonl", [record]), "lm", tokenizer, max_length, **options)
    return example


def labelled(example, tokenizer=BPE):
    return tokenizer.decode(example.labels[example.labels != -100])


def texts(*words):
    return [{"text": word} for word in words]


# ---- labels --------------------------------------------------------------------------------------------------------------------------


def test_every_token_of_a_text_has_a_label(tmp_path):
    example = one(tmp_path, {"text": "abcd", "source": "ignored"}, BYTES)
    assert example.ids.tolist() == [97, 98, 99]
    assert example.labels.tolist() == [98, 99, 100]
    assert not example.cut


def test_only_the_completion_and_its_end_have_labels(tmp_path):
    record = {"prompt": "the capital of France is", "completion": " Paris"}
    example = one(tmp_path, record)
    assert BPE.decode(example.ids) == "the capital of France is Paris"
    assert labelled(example) == " Paris<|end|>"
    first = int(np.flatnonzero(example.labels != -100)[0])
    assert BPE.decode(example.ids[: first + 1]) == record["prompt"]  # the row of the last prompt token predicts the first answer token
    everything = one(tmp_path, record, mask_prompt=False)
    assert labelled(everything) == "the capital of France is Paris<|end|>".removeprefix(BPE.decode(everything.ids[:1]))
    assert labelled(one(tmp_path, {**record, "completion": " Paris<|end|>"})) == " Paris<|end|>"  # only once


def bpe_with_begin_token():
    """BPE with a begin token that its tokenizer.json adds."""
    import tokenizers

    library = library_bpe()
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 1)])
    return HFTokenizer(library, bos_id=1, eos_id=0, chat_template=CHATML)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE, bpe_with_begin_token()], ids=["bytes", "bpe", "bos"])
def test_a_prompt_is_tokenized_as_in_generation(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "one.jsonl"
    end = tokenizer.token(tokenizer.eos_id)

    @given(prompt=st.text(max_size=9) | st.just("the cat is "), completion=st.text(min_size=2, max_size=9) | st.just("Paris cat"))
    def check(prompt, completion):
        if not completion.strip() or (not prompt and len(tokenizer.encode(completion)) < 2):
            return
        (example,) = load_examples(write_jsonl(path, [{"prompt": prompt, "completion": completion}]), "lm", tokenizer, 100)
        requested = tokenizer.encode(prompt)
        assert np.array_equal(example.ids[: len(requested)], requested)
        tokens = np.append(example.ids, example.labels[-1])
        assert tokenizer.decode(tokens) == tokenizer.decode(tokenizer.prefix) + prompt + completion + end
        expected = np.where(np.arange(len(example.ids)) + 1 < len(requested), -100, tokens[1:])
        assert example.labels.tolist() == expected.tolist()

    check()


def test_no_merge_crosses_the_boundary():
    ids, n = encode_pair(BPE, "the capital is ", "Paris")
    assert ids.tolist() == [*BPE.encode("the capital is "), *BPE.encode("Paris")]
    assert len(BPE.encode("the capital is Paris")) < len(ids)
    assert n == len(BPE.encode("the capital is "))


def test_messages_of_the_assistant_have_labels(tmp_path):
    example = one(tmp_path, {"messages": TALK}, chat_template=CHATML.replace("<|im_end|>", "<|end|>"))
    assert labelled(example) == "Hello!<|end|>\nSo <b>long</b><|end|>"
    assert BPE.decode(example.ids).startswith("<|im_start|>user\nHi<|end|>\n<|im_start|>assistant\nHello!<|end|>\n<|im_start|>user")
    everything = one(tmp_path, {"messages": TALK}, mask_prompt=False)
    assert (everything.labels != -100).all()
    assert np.array_equal(everything.ids[1:], everything.labels[:-1])


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_only_messages_of_the_assistant_have_labels(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "one.jsonl"

    @given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text(max_size=6)), min_size=1, max_size=5))
    def check(turns):
        if not any(role == "assistant" and content.strip() for role, content in turns):
            return
        messages = [{"role": role, "content": content} for role, content in turns]
        (example,) = load_examples(write_jsonl(path, [{"messages": messages}]), "lm", tokenizer, 2000, chat_template=CHATML)
        end = "<|im_end|>\n"  # here without the end token of the tokenizer
        assert labelled(example, tokenizer) == "".join(content + end for role, content in turns if role == "assistant")

    check()


def test_messages_without_a_template_explain_how_to_pass_one(tmp_path):
    with pytest.raises(ValueError, match=r"one\.jsonl, line 1: this model has no chat template; put one into chat_template\.jinja"):
        one(tmp_path, {"messages": TALK}, BYTES)


# ---- truncation ----------------------------------------------------------------------------------------------------------------------


def test_a_long_text_is_truncated_at_its_end(tmp_path):
    example = one(tmp_path, {"text": "abcdefgh"}, BYTES, 4)
    assert (bytes(example.ids.tolist()), bytes(example.labels.tolist()), example.cut) == (b"abcd", b"bcde", True)
    assert not one(tmp_path, {"text": "abcde"}, BYTES, 4).cut


@pytest.mark.parametrize(
    ("prompt", "completion", "ids", "cut"),
    [
        ("0123", "abcd", "0123abc", False),
        ("0123456789", "abc", "3456789ab", True),  # the end of the prompt
        ("0123", "abcdefghijklmn", "0123abcde", True),  # the beginning of the completion
        ("0123456789", "abcdefghijklmn", "56789abcd", True),  # half of each
        ("", "abcdefghijklmn", "abcdefghi", True),
    ],
)
def test_a_long_prompt_and_completion_keep_the_middle(prompt, completion, ids, cut, tmp_path):
    example = one(tmp_path, {"prompt": prompt, "completion": completion}, BYTES, 9)
    assert bytes(example.ids.tolist()).decode() == ids
    assert example.cut == cut
    letters = "".join(c for c in ids if c.isalpha())
    assert labelled(example, BYTES) == completion[: len(letters) + 1][0 if prompt else 1 :]


def test_the_begin_token_survives_truncation(tmp_path):
    tokenizer = bpe_with_begin_token()
    record = {"prompt": "the cat sat on the mat " * 9, "completion": "the cat " * 9}
    example = one(tmp_path, record, tokenizer, 10)
    assert example.ids[0] == 1
    assert len(example.ids) == 10
    assert labelled(example).startswith("the")
    assert 0 not in example.labels  # the end was cut off: no label in the middle


def test_messages_without_a_remaining_answer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="line 1: nothing to learn is left within 6 tokens"):
        one(tmp_path, {"messages": TALK}, max_length=6)


def test_a_truncated_text_keeps_its_special_tokens(tmp_path):
    tokenizer = HFTokenizer(library_wordpiece())
    file = write_jsonl(tmp_path / "one.jsonl", [{"text": "A man eating food.", "label": "b"}, {"text": "food", "label": "a"}])
    long, short = load_examples(file, "classify", tokenizer, 5, labels=["a", "b"])
    assert (long.ids.tolist(), long.labels.tolist(), long.cut) == ([2, 4, 5, 6, 3], [1], True)
    assert (short.ids.tolist(), short.labels.tolist(), short.cut) == ([2, 8, 3], [0], False)
    assert len(load_examples(file, "classify", tokenizer, 2, labels=["a", "b"])[0].ids) == 2


# ---- classes -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names"),
    [(["yes", "no", "yes"], ["no", "yes"]), ([10, 2, 2], ["2", "10"]), (["10", "2", "-1"], ["-1", "2", "10"]), ([1, "x", 1], ["1", "x"])],
)
def test_classes_are_the_sorted_labels_of_the_training_data(labels, names, tmp_path):
    records = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    write_jsonl(tmp_path / "train.jsonl", records)
    write_jsonl(tmp_path / "valid.jsonl", records[:1])
    data = load_dataset(tmp_path, "classify", BPE, 20)
    assert data.labels == names
    assert [names[int(e.labels[0])] for e in data.train] == [str(label) for label in labels]
    assert collate(data.train).per_sequence
    rows = "".join(f"{label},text {i}\n" for i, label in enumerate(labels))
    (tmp_path / "same.csv").write_text("label,text\n" + rows)
    same = load_examples(tmp_path / "same.csv", "classify", BPE, 20, labels=names)
    assert [e.labels.tolist() for e in same] == [e.labels.tolist() for e in data.train]


def test_a_saved_model_keeps_its_classes(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{"text": "a b", "label": "y"}])
    data = load_dataset(tmp_path, "classify", BPE, 20, labels=["z", "y", "x"])
    assert (data.test[0].labels.tolist(), data.labels, data.train, data.valid) == ([1], ["z", "y", "x"], [], [])
    with pytest.raises(FileNotFoundError, match="without it the classes are not known"):
        load_dataset(tmp_path, "classify", BPE, 20)


# ---- files and splits ----------------------------------------------------------------------------------------------------------------


def test_csv_with_quotes_commas_and_newlines(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeffid,completion,prompt\n1,"b, ""c""\nd",a\n\n2,f,e\n'.encode())
    assert list(read_records(tmp_path / "a.csv")) == [
        (2, {"id": "1", "completion": 'b, "c"\nd', "prompt": "a"}),
        (5, {"id": "2", "completion": "f", "prompt": "e"}),
    ]
    examples = load_examples(tmp_path / "a.csv", "lm", BYTES, 20)
    assert [labelled(e, BYTES) for e in examples] == ['b, "c"\nd', "f"]


def test_files_of_a_folder_are_splits(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", texts("aaa", "bbb"))
    write_jsonl(tmp_path / "valid.jsonl", texts("ccc"))
    (tmp_path / "test.csv").write_text("text\nddd\neee\n")
    data = load_dataset(tmp_path, "lm", BYTES, 2)
    assert [[chr(e.ids[0]) for e in split] for split in (data.train, data.valid, data.test)] == [["a", "b"], ["c"], ["d", "e"]]
    assert data.labels is None
    assert data.describe() == "train 2 sequences of 4 tokens; valid 1 sequences of 2 tokens; test 2 sequences of 4 tokens"
    assert is_dataset(tmp_path)
    assert is_dataset(tmp_path / "test.csv")
    assert not is_dataset(tmp_path.parent / "poem.txt")


@pytest.mark.parametrize("as_folder", [False, True])
def test_data_without_a_validation_split_are_split_deterministically(as_folder, tmp_path):
    file = write_jsonl(tmp_path / "train.jsonl", texts(*(f"number {i % 50}" for i in range(100))))
    path = tmp_path if as_folder else file
    data = load_dataset(path, "lm", BYTES, 20)
    kept, held = full_texts(data.train), full_texts(data.valid)
    assert (len(kept), len(held)) == (90, 10)
    assert not set(kept) & set(held)  # copies of a text are in one split
    assert full_texts(load_dataset(path, "lm", BYTES, 20).valid) == held
    assert full_texts(load_dataset(path, "lm", BYTES, 20, seed=1).valid) != held


def full_texts(examples):
    """The texts of examples; the last token of each is only a label."""
    return [BYTES.decode([*e.ids, e.labels[-1]]) for e in examples]


def test_a_class_may_be_in_one_split_only(tmp_path):
    records = [{"text": f"number {i}", "label": "rare" if i == 0 else i % 2} for i in range(12)]
    file = write_jsonl(tmp_path / "all.jsonl", records)
    for seed in range(12):
        assert load_dataset(file, "classify", BYTES, 20, seed=seed).labels == ["0", "1", "rare"]


A, B = '{"text": "a b", "label": 0}\n', '{"text": "a c", "label": 1}\n'
BAD = {
    "no JSON": ("x.jsonl", A + '{"text": "a b"\n', "lm", "line 2: this is not JSON"),
    "no object": ("x.jsonl", A + "[1]\n", "lm", "line 2: expected a JSON object, got list"),
    "two objects": ("x.jsonl", A[:-1] + A, "lm", "line 1: this is not JSON"),
    "deep": ("x.jsonl", "[" * 100_000, "lm", "this is not JSON"),
    "latin-1": ("x.jsonl", A.encode() + b'{"text": "na\xefve"}\n', "lm", "line 2: this is not UTF-8 text"),
    "empty": ("x.jsonl", "", "lm", "x.jsonl is empty"),
    "only empty lines": ("x.jsonl", "\n \n", "classify", "x.jsonl is empty"),
    "no field": ("x.jsonl", '{"txt": "a b"}', "lm", "line 1: expected the field \"text\", or .*; it has 'txt'"),
    "half a pair": ("x.jsonl", '{"prompt": "a b"}', "lm", "line 1: expected .*; it has 'prompt'"),
    "number": ("x.jsonl", A + '{"text": 3}', "lm", "line 2: 'text' must be text, got 3"),
    "surrogate": ("x.jsonl", '{"text": "a\\ud800b"}', "lm", "line 1: the text has an unpaired surrogate"),
    "surrogate in chat": (
        "x.jsonl",
        '{"messages": [{"role": "assistant", "content": "\\ud800b"}]}',
        "lm",
        "line 1: the text has an unpaired surrogate",
    ),
    "empty text": ("x.jsonl", '{"text": " "}', "lm", "line 1: the text is empty"),
    "short text": ("x.jsonl", '{"text": "a"}', "lm", "line 1: there is nothing to learn from so short a text"),
    "empty completion": ("x.jsonl", '{"prompt": "a", "completion": " "}', "lm", "line 1: the completion is empty"),
    "no messages": ("x.jsonl", '{"messages": []}', "lm", 'line 1: "messages" must be a list'),
    "broken message": ("x.jsonl", '{"messages": [{"role": "user"}]}', "lm", "line 1: message 1 must be an object with"),
    "no answer": ("x.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "lm", "line 1: no message of the assistant"),
    "empty answer": ("x.jsonl", '{"messages": [{"role": "assistant", "content": ""}]}', "lm", "line 1: no message of the assistant"),
    "no label": ("x.jsonl", A + '{"text": "a b"}', "classify", 'line 2: expected the fields "text" and "label"; it has \'text\''),
    "NaN": ("x.jsonl", A + B + '{"text": "a b", "label": NaN}', "classify", "line 3: the label must be an integer or a name, got nan"),
    "float": ("x.jsonl", A + '{"text": "a b", "label": 0.5}', "classify", "line 2: the label must be .*, got 0.5"),
    "null": ("x.jsonl", A + '{"text": "a b", "label": null}', "classify", "line 2: the label must be .*, got None"),
    "true": ("x.jsonl", A + '{"text": "a b", "label": true}', "classify", "line 2: the label must be .*, got True"),
    "one class": ("x.jsonl", A + A, "classify", "all 2 records have the label '0'"),
    "no text": ("x.jsonl", A + '{"label": 1}', "classify", "line 2: expected the fields"),
    "one record": ("x.jsonl", A, "lm", "x.jsonl has too few records to hold one out"),
    "csv header": ("x.csv", "title\nabc\n", "lm", "line 2: expected the field .*; it has 'title'"),
    "csv twice": ("x.csv", "text,text\na b,c\n", "lm", "line 1: the header names a column twice"),
    "csv short row": ("x.csv", 'text,label\n"a\nb",1\nc d\n', "classify", r"line 4: expected 2 fields \(text, label\), got 1"),
    "csv long row": ("x.csv", "text,label\na, b,1\n", "classify", "line 2: expected 2 fields .*, got 3"),
    "csv quote": ("x.csv", 'text,label\na b,1\n"c d,0\n', "classify", "line 3: this is not CSV"),
    "csv latin-1": ("x.csv", b"text\na b\nna\xefve\n", "lm", "line 3: this is not UTF-8 text"),
    "csv nan": ("x.csv", "text,label\na b,1\nc d,nan\n", "classify", "line 3: the label must be .*, got 'nan'"),
    "csv no label": ("x.csv", "text,label\na b,1\nc d,\n", "classify", "line 3: the label must be .*, got ''"),
    "csv only a header": ("x.csv", "text,label\n", "classify", "x.csv is empty"),
    "kind": ("x.txt", A, "lm", "x.txt is not a record file; its name must end in .jsonl, .ndjson"),
    "task": ("x.jsonl", A + B, "regress", "unknown task 'regress'; choose lm or classify"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_reported_with_file_and_line(case, tmp_path):
    name, content, task, message = BAD[case]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset(tmp_path / name, task, BYTES, 20, chat_template=CHATML)
    assert str(tmp_path / name) in str(caught.value) or case == "task"


def test_a_label_that_training_has_not_seen_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text(A + B)
    (tmp_path / "valid.jsonl").write_text(A + '{"text": "d", "label": 2}')
    with pytest.raises(ValueError, match=r"valid\.jsonl, line 2: the label '2' is none of the classes: 0, 1"):
        load_dataset(tmp_path, "classify", BYTES, 20)


def test_folders_without_a_dataset(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no records in .*: expected train\.jsonl"):
        load_dataset(tmp_path, "lm", BYTES, 20)
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        load_dataset(tmp_path / "absent", "lm", BYTES, 20)
    for name in ("train.jsonl", "train.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"has both train\.csv and train\.jsonl"):
        load_dataset(tmp_path, "lm", BYTES, 20)


def test_sequences_in_both_splits_are_counted(tmp_path, capsys):
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"text {i}"} for i in range(9)])
    write_jsonl(tmp_path / "dev.jsonl", [{"text": "text 3"}, {"text": "text 8"}, {"text": "other"}])
    load_dataset(tmp_path, "lm", BYTES, 20)
    assert "2 of the 3 sequences of valid are in train too." in capsys.readouterr().err
    load_dataset(tmp_path / "train.jsonl", "lm", BYTES, 20)
    assert "in train too" not in capsys.readouterr().err


# ---- batches -------------------------------------------------------------------------------------------------------------------------


def examples_of(lengths):
    """Examples of these lengths; every id of one is its index."""
    return [Example(np.full(n, i), np.full(n, i)) for i, n in enumerate(lengths)]


def sequences(batch):
    """[(number, length), ...] of the examples in a batch."""
    return [(int(batch.ids[a]), int(b - a)) for a, b in zip(batch.offsets, batch.offsets[1:], strict=False)]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 64), st.none() | st.integers(0, 5))
def test_packed_batches_hold_every_example_once_within_the_limit(lengths, limit, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    batches = list(packed_batches(examples_of(lengths), limit, rng))
    assert sorted(s for batch in batches for s in sequences(batch)) == list(enumerate(lengths))
    for batch in batches:
        assert len(batch.ids) <= limit or len(sequences(batch)) == 1
        assert batch.labels.tolist() == batch.ids.tolist()


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_packed_batches_are_few_and_about_equal(seed):
    lengths = np.random.default_rng(0).integers(5, 60, 400)
    batches = list(packed_batches(examples_of(lengths), 512, None if seed is None else np.random.default_rng(seed)))
    assert len(batches) <= -(-lengths.sum() // 512) + 1
    sizes = [len(batch.ids) for batch in batches]
    assert min(sizes) > 0.9 * max(sizes)


def test_epochs_differ_and_are_the_same_for_the_same_seed():
    examples = examples_of(np.random.default_rng(0).integers(5, 60, 40))

    def epochs(seed):
        stream = endless(lambda rng: packed_batches(examples, 300, rng), seed)
        n = len(list(packed_batches(examples, 300, np.random.default_rng((seed, 0)))))
        first = [sequences(batch) for batch in islice(stream, n)]
        return first, [sequences(batch) for batch in islice(stream, n)]

    first, second = epochs(0)
    assert sorted(s for batch in first for s in batch) == sorted(sequences(collate(examples)))
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}  # different batches, not only another order
    assert epochs(0) == (first, second)
    assert epochs(1)[0] != first
    with pytest.raises(ValueError, match="nothing to train on"):
        next(endless(lambda rng: packed_batches([], 300, rng)))


@given(st.integers(0, 30), st.integers(1, 9), st.booleans())
def test_fixed_size_batches_hold_every_example_once(n, size, shuffled):
    examples = examples_of([1 + i % 3 for i in range(n)])
    batches = list(batches_of(examples, size, np.random.default_rng(0) if shuffled else None))
    seen = [s for batch in batches for s in sequences(batch)]
    assert sorted(seen) == sequences(collate(examples)) if n else not seen
    assert [len(sequences(batch)) for batch in batches] == [size] * (n // size) + [n % size] * (n % size > 0)
    if not shuffled:
        assert [i for i, _ in seen] == list(range(n))


def test_batches_without_examples_are_refused():
    for wrong in (lambda: batches_of(examples_of([1]), 0), lambda: packed_batches(examples_of([1]), 0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            next(wrong())


def test_hold_out_keeps_the_order_and_at_least_one_example():
    examples = examples_of([3] * 5)
    train, held = hold_out(examples, "x.jsonl")
    assert len(held) == 1
    assert [int(e.ids[0]) for e in train] == [i for i in range(5) if i != int(held[0].ids[0])]


def test_a_batch_of_classes_is_split_by_sequences():
    batch = Batch(np.arange(10), np.array([0, -100, 2, 1]), np.array([0, 4, 5, 6, 10]), per_sequence=True)
    assert batch.labelled == 3
    shards = batch.split(2)
    assert [s.labels.tolist() for s in shards] == [[0, -100], [2, 1]]
    assert [s.ids.tolist() for s in shards] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [s.offsets.tolist() for s in shards] == [[0, 4, 5], [0, 1, 5]]
    assert sum(s.labelled for s in shards) == 3
    assert all(s.per_sequence for s in shards)
    for labels, per_sequence in ((np.zeros(10, int), True), (np.zeros(4, int), False)):
        with pytest.raises(ValueError, match="do not fit"):
            Batch(batch.ids, labels, batch.offsets, per_sequence)
