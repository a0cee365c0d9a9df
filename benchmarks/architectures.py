"""The table of docs/models.md: every architecture on small random models of odd sizes, next to transformers and PEFT.

    python -m benchmarks.architectures           prints it
    python -m benchmarks.architectures --write   writes it into docs/models.md

The models are those of the tests (tests/golden/make_llama.py and make_relatives.py): sequences of 5, 1 and 23 tokens, beyond the
windows and the original lengths. Encoders: make_encoders.py, sequences of 5, 11, 1 and 6 tokens, one with a padding token in it.
Needs the extras `oracle` and `gguf`.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
PAGE = ROOT / "docs" / "models.md"
STEPS, LR = 30, 3e-3
HEADER = "| model | logits | loss | adapter gradients | the same in float32 | 30 steps of AdamW | greedy tokens | GGUF |"


def decoders() -> Iterator[tuple[str, str]]:
    """(group of rows, a row) of each decoder."""
    from golden import make_llama, make_relatives

    llama = {"llama, tied": "Llama", "qwen2": "Qwen2"}
    for name, words in llama.items():
        yield "decoders", _row(words, name, make_llama, make_llama.OFFSETS)
    for name in make_relatives.CASES:
        yield "decoders", _row(name, name, make_relatives, make_relatives.OFFSETS)


def encoders() -> Iterator[tuple[str, str]]:
    """As `decoders`, with a classifier that is trained too, and the largest deviation of the parameters after 30 steps."""
    sys.path.insert(0, str(ROOT / "tests" / "golden"))
    import make_encoders
    import oracle
    import test_encoders as tests

    for name in make_encoders.CASES:
        tests.GOLDEN |= make_encoders.golden(name)  # by the installed oracles
        cells, steps = [], tests.thirty_steps(name, Path(tempfile.mkdtemp()))
        for dtype in ("float64", "float32"):
            model = tests.adapted(name, Path(tempfile.mkdtemp()), dtype)
            loss, saved = model.loss(tests.data(name), tests.LABELS, tests.OFFSETS)
            model.loss_backward(saved)
            found = (tests.logits(model, name), "logits"), (loss, "loss")
            cells.append([oracle.deviation(value, tests.GOLDEN[f"{name}|{key}"]) for value, key in found])
            cells[-1].append(oracle.deviation(oracle.gradients(model), tests.part(name, "grads")))
        cells.append([*cells[0], max(cells[1]), *steps, _gguf_encoder(tests, name)])
        yield "encoders", " | ".join([f"| {name}", *(f"{cell:.0e}" if cell else "0" for cell in cells[-1])]) + " |"


def _gguf_encoder(tests: Any, name: str) -> float:
    """The deviation of the hidden states of the file that `gguf` writes, as llama.cpp's converter does, from the model's.

    Without padding in a text, whose position in RoBERTa is not in a file.
    """
    import test_gguf_encoders as files

    import minilora as ml

    with tempfile.TemporaryDirectory() as folder:
        model = ml.load_model(tests.write(name, Path(folder) / "m", id2label={i: f"class {i}" for i in range(3)}), "numpy")
        library, settings, _ = files.TOKENIZERS[model.model_type]
        files.write_tokenizer(Path(folder) / "saved", library(), settings)
        ml.save_model(model, Path(folder) / "saved")
        meta: dict[str, Any] = {"tokenizer.ggml.padding_token_id": model.config.pad_token_id}
        if model.model_type == "modernbert":
            meta["modern-bert.attention.sliding_window_pattern"] = ["sliding" in layer for layer in model.config.layer_types]
            meta["modern-bert.hidden_activation"] = model.config.hidden_act
        again = ml.load_model(files.write(Path(folder) / "a.gguf", Path(folder) / "saved", meta=meta), "numpy", report=False)
    ids = np.where(tests.data(name) == model.config.pad_token_id, 7, tests.data(name))
    states = [each.body.forward(ids, keep=False, offsets=tests.OFFSETS)[0] for each in (again, model)]
    return float(np.abs(states[0] - states[1]).max() / np.abs(states[1]).max())


def windows() -> Iterator[tuple[str, str]]:
    """Processor seconds of attention, forward and backward: 4 heads of 64 features in float32, the best of three."""
    from minilora import kernels as K

    for tokens in (2048, 4096, 8192):
        q, k, v = np.random.default_rng(0).standard_normal((3, tokens, 256)).astype("float32")
        cells = []
        for window in (None, 512):
            seconds = []
            for _ in range(3):
                began = time.process_time()
                o, saved = K.attention(q, k, v, 4, window=window)
                K.attention_backward(o, q, k, v, saved, 4)
                seconds.append(time.process_time() - began)
            cells.append(f"{min(seconds):.2f}")
        yield "windows", f"| {tokens:,} | {' | '.join(cells)} |"


TABLES: list[Callable[[], Iterator[tuple[str, str]]]] = [decoders, encoders, windows]
HEADERS = {
    "encoders": "| model | logits | loss | adapter gradients | the same in float32 | 30 steps of AdamW | parameters after them | GGUF |",
    "windows": "| tokens | seconds, all keys | seconds, a window of 512 |",
}


def _row(words: str, name: str, oracle: Any, offsets: list[int]) -> str:
    golden = {key: value.numpy() for key, value in oracle.tensors(name).items()}
    config = oracle.base_model(name).config.to_dict()
    exact = _deviations(_model(golden, config, "float64", True), golden, offsets)
    golden |= {key: value.numpy() for key, value in oracle.run(oracle.adapted_model(name, exact=False).float(), name).items()}
    single = _deviations(_model(golden, config, "float32", True), golden, offsets)
    grads, worst = max(v for k, v in exact.items() if k.startswith("grad:")), max(single.values())
    cells = [exact["logits"], exact["loss"], grads, worst, _trajectory(golden, config, oracle, name, offsets)]
    return " | ".join([f"| {words}", *map(_short, cells), _greedy(oracle, name), _gguf(golden, config)]) + " |"


def _model(golden: dict[str, np.ndarray], config: dict[str, Any], dtype: str, adapted: bool = False) -> Any:
    """Our model with the weights of a case, and its adapters."""
    import minilora as ml

    model = ml.Llama(ml.LlamaConfig.from_json(config), rng=0, dtype=dtype)
    if adapted:
        ml.inject(model, ml.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"), rng=0)
    for path, p in model.parameters():
        value = golden.get(f"lora:{path}", golden.get(f"base:{path}"))
        p.data = (value.T if value.ndim == 2 and "embed_tokens" not in path else value).astype(dtype)
    return model


def _deviations(model: Any, golden: dict[str, np.ndarray], offsets: list[int]) -> dict[str, float]:
    """{name: largest deviation relative to the largest value}."""
    found = {"logits": model.forward(golden["ids"], keep=False, offsets=offsets)[0]}
    loss, saved = model.loss(golden["ids"], golden["labels"], offsets)
    model.loss_backward(saved)
    found |= {"loss": loss, **{f"grad:{path}": p.grad.T for path, p in model.parameters() if p.trainable}}
    return {key: float(np.abs(value - golden[key]).max() / np.abs(golden[key]).max()) for key, value in found.items()}


def _trajectory(golden: dict[str, np.ndarray], config: dict[str, Any], oracle: Any, name: str, offsets: list[int]) -> float:
    """The largest relative deviation of the losses of 30 steps, in float32 on both sides."""
    import torch

    import minilora as ml

    theirs, ours, worst = oracle.adapted_model(name, exact=False).float(), _model(golden, config, "float32", True), 0.0
    options = {"lr": LR, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizer, ours_optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **options), None
    ours_optimizer = ml.AdamW(ours.parameters(), **options)
    for _ in range(STEPS):
        optimizer.zero_grad()
        expected = float(oracle.run(theirs, name)["loss"])
        optimizer.step()
        loss, saved = ours.loss(golden["ids"], golden["labels"], offsets)
        ours.loss_backward(saved)
        ours_optimizer.step()
        ours_optimizer.zero_grad()
        worst = max(worst, abs(float(loss) / expected - 1))
    return worst


def _greedy(oracle: Any, name: str) -> str:
    """Whether generation with our cache, without one, and transformers' generation give the same tokens."""
    import torch

    import minilora as ml
    from minilora.models.generate import generate

    with tempfile.TemporaryDirectory() as folder:
        base = oracle.base_model(name, False).float()
        base.save_pretrained(folder)
        model = ml.load_model(folder, "numpy")
    ids = oracle.batch(name)[0].numpy()[:5]
    n, prompt = model.config.longest_sequence - len(ids), torch.tensor(ids[None])
    sampling = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": n, "do_sample": False, "pad_token_id": 0}
    expected = base.generate(prompt, **sampling)[0, 5:].tolist()
    n, text = len(expected), ids.tolist()
    for _ in range(n):
        text.append(int(model.forward(np.array(text), keep=False)[0][-1].argmax()))
    same = list(generate(model, ids, n, 0.0)) == text[5:] == expected
    return f"the same {n}" if same else "others"


def _gguf(golden: dict[str, np.ndarray], config: dict[str, Any]) -> str:
    """The deviation of the logits of the file that `gguf` writes, as llama.cpp's converter does, from the model's; "-": it has no key.

    Which layers of SmolLM3 are rotated, and which of Gemma 3 have a window, is not in a file but in llama.cpp; the model is made so.
    """
    import test_gguf

    import minilora as ml

    c = ml.LlamaConfig.from_json(config)
    if c.model_type == "smollm3":
        config = config | {"no_rope_layers": None, "no_rope_layer_interval": 4, "use_sliding_window": False, "layer_types": None}
    elif c.model_type == "gemma3_text":
        bases = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
        config = config | {"layer_types": None, "sliding_window_pattern": 6, "query_pre_attn_scalar": c.head_dim, "rope_parameters": bases}
    elif c.sliding_window or {"mscale", "attention_factor", "dynamic"} & {*(c.rope_scaling or {}), (c.rope_scaling or {}).get("rope_type")}:
        return "-"
    model = _model(golden, config, "float32")
    with tempfile.TemporaryDirectory() as folder:
        again = ml.load_model(test_gguf.write(Path(folder) / "a.gguf", model), "numpy")
    expected = model.forward(golden["ids"][:5], keep=False)[0]
    return _short(float(np.abs(again.forward(golden["ids"][:5], keep=False)[0] - expected).max() / np.abs(expected).max()))


def _short(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def tables() -> dict[str, str]:
    """{group: its table}."""
    found: dict[str, list[str]] = {}
    for make in TABLES:
        for group, row in make():
            header = HEADERS.get(group, HEADER)
            found.setdefault(group, [header, "|" + "---|" * header.count(" | ") + "---|"]).append(row)
            print(row, file=sys.stderr)
    return {group: "\n".join(rows) for group, rows in found.items()}


def main() -> None:
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):
        made = tables()
    page = PAGE.read_text()
    for group, table in made.items():
        begin, end = f"<!-- {group} -->", f"<!-- /{group} -->"
        page = page[: page.index(begin)] + f"{begin}\n\n{table}\n\n" + page[page.index(end) :]
        print(table)
    if "--write" in sys.argv:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
