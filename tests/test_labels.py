"""The class of a label depends neither on sorting, nor on the machine, nor on the run; and the held-out part is a fair sample."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import BYTES

from minilora.data.datasets import hold_out, load_dataset, load_examples, sample
from minilora.data.examples import Example, at_line, class_names, reader

HERE = Path("x.jsonl")


def names(labels):
    return class_names(HERE, [(i, {"label": label}) for i, label in enumerate(labels)])


def read(classes, label):
    with at_line(HERE, 3):
        return reader(classes)({"label": label})


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 9, 2], ["2", "9", "10"]),
        (["1", "01", "001", "7", "007", "2"], ["001", "01", "1", "2", "007", "7"]),  # equal numbers are ordered by their text
        ([3, "x", -1, "10"], ["-1", "3", "10", "x"]),
        ([" x ", "x", "y\n"], ["x", "y"]),
        (["9" * 5000, 1], ["1", "9" * 5000]),
        ([10**30, 2], ["2", str(10**30)]),
        (["nano", "inf", "1e"], ["1e", "inf", "nano"]),
    ],
)
def test_classes_have_a_fixed_order(labels, expected):
    assert names(labels) == expected
    for seed in range(5):
        random.Random(seed).shuffle(labels)
        assert names(labels) == expected


def test_the_order_of_classes_does_not_depend_on_the_process():
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_labels import names; "
    code += "print(names(['1', '01', '001', 'b', 'a', '7', '007']))"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2", "3")
    ]
    assert {run.stdout for run in runs} == {"['001', '01', '1', '007', '7', 'a', 'b']\n"}


def test_a_label_is_a_name_or_an_index_if_no_class_is_a_number():
    heads = ["positive", "negative", "neutral"]
    assert [read(heads, label) for label in ("negative", " positive ", 2, "0")] == [1, 0, 2, 0]
    assert [read(["LABEL_0", "LABEL_1"], label) for label in ("LABEL_1", 0, "1")] == [1, 0, 1]
    assert [read(["0", "2"], label) for label in ("2", 0)] == [1, 0]
    assert [read(["0.5", "1.5", " true"], label) for label in ("1.5", "true")] == [1, 2]  # names of a published head
    for classes, label in ((heads, "Positive"), (heads, 3), (heads, "01"), (["0", "2"], 1), (heads, -1)):
        with pytest.raises(ValueError, match=r"x\.jsonl, line 3: the label .* is none of the classes"):
            read(classes, label)
    with pytest.raises(ValueError, match="names a class twice"):
        reader(["a", "a"])


@pytest.mark.parametrize("label", [0.5, "0.5", "1.0", "1e-3", True, None, ["x"], float("nan"), "NaN", "", " ", {"a": 1}])
def test_scores_booleans_and_missing_values_are_not_classes(label):
    with pytest.raises(ValueError, match=r"x\.jsonl, line 3: the label .*"):
        read(["a", "b"], label)


def test_labels_of_a_model_with_one_output_are_values():
    assert [read(["LABEL_0"], label) for label in (0.5, 3, "-1.25", " 2 ", "1e-3", 0)] == [0.5, 3.0, -1.25, 2.0, 0.001, 0.0]
    for label in ("good", True, None, float("nan"), "inf", -100, "-100.0"):
        with pytest.raises(ValueError, match=r"x\.jsonl, line 3: this model has one output, so the label must be a number"):
            read(["LABEL_0"], label)


def test_a_published_head_keeps_its_order_or_refuses_with_both_lists(tmp_path):
    rows = [{"text": f"text {i}", "label": ["negative", "positive"][i % 2]} for i in range(20)]
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    data = load_dataset(file, "classify", BYTES, 20, labels=["positive", "negative"])
    assert data.labels == ["positive", "negative"]
    assert Counter(int(e.labels[0]) for e in data.train + data.valid) == {0: 10, 1: 10}
    texts = {BYTES.decode(e.ids): int(e.labels[0]) for e in data.train + data.valid}
    assert all(texts[row["text"]] == data.labels.index(row["label"]) for row in rows)
    with pytest.raises(
        ValueError, match=r"none of the classes: good, bad\. The data have negative, positive; rename them, or .*--new-head"
    ):
        load_dataset(file, "classify", BYTES, 20, labels=["good", "bad"])
    assert [e.labels.tolist() for e in load_examples(file, "classify", BYTES, 20, labels=["negative", "positive"])] == [[0], [1]] * 10


# ---- the held-out part ---------------------------------------------------------------------------------------------------------------


def labelled(counts):
    """Distinct examples, counts[c] of class c, ordered by class."""
    classes = np.repeat(np.arange(len(counts)), counts)
    return [Example(np.array([i, 7]), np.array([c]), per_sequence=True) for i, c in enumerate(classes)]


@pytest.mark.parametrize("counts", [[100, 100], [180, 20], [9, 9, 9, 9, 9], [29, 1], [40, 3, 1, 1], [2, 2]])
def test_over_fifty_seeds_every_class_has_its_share_and_none_is_held_out_completely(counts):
    examples, total = labelled(counts), max(1, round(sum(counts) / 10))
    held_counts, first = Counter(), set()
    for seed in range(50):
        train, held = hold_out(examples, "x", seed)
        assert len(train) + len(held) == len(examples)
        assert len(held) == total
        kept = Counter(int(e.labels[0]) for e in train)
        assert set(kept) == set(range(len(counts)))
        for c, n in enumerate(counts):
            assert abs(n - kept[c] - n * total / sum(counts)) < 1 + 1e-9  # its share, rounded to complete examples
        held_counts.update(int(e.ids[0]) for e in held)
        first.add(tuple(sorted(int(e.ids[0]) for e in held)))
        assert [int(e.ids[0]) for e in held] == [int(e.ids[0]) for e in hold_out(examples, "x", seed)[1]]
    assert len(first) > (1 if sum(counts) < 10 else 10)  # other examples for another seed
    if min(counts) >= 9:  # no example is held out far more often than others: 50 draws of a tenth, 5 on average
        assert max(held_counts.values()) <= 17
        assert len(held_counts) > 0.9 * len(examples)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 200), st.integers(0, 99))
def test_a_sample_has_the_size_and_the_class_shares(counts, size, seed):
    examples = labelled(counts)
    chosen = sample(examples, size, seed)
    assert len(chosen) == len(set(chosen)) == min(size, len(examples))
    assert chosen == sorted(chosen)
    got = Counter(int(examples[i].labels[0]) for i in chosen)
    for c, n in enumerate(counts):
        assert abs(got[c] - min(size, len(examples)) * n / len(examples)) < 1 + 1e-9


def test_values_are_not_stratified():
    examples = [Example(np.array([i, 7]), np.array([i / 3]), per_sequence=True) for i in range(30)]
    assert len(hold_out(examples, "x")[1]) == 3


def test_when_each_class_has_one_text_nothing_can_be_held_out():
    with pytest.raises(ValueError, match="x has too few records to hold one out"):
        hold_out(labelled([1, 1, 1]), "x")
