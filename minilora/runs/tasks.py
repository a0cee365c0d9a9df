"""The data of a recipe, to train and to measure on: text in windows, records of text, texts with a class.

`finetune` and `evaluate` both read data here, with the same settings: on the same data they measure the same batches.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import to_numpy
from minilora.data.batches import Batch, check_length, held_out_windows, random_windows
from minilora.data.datasets import Dataset, batches_of, endless, few, load_dataset, load_examples, pack, packed_batches, sample
from minilora.data.examples import Example, class_names
from minilora.data.records import SPLITS, is_dataset, listed, note, read_bytes, read_records, split_files
from minilora.data.text import GENERAL, read_text, split_text, stdlib_source
from minilora.formats.fitting import named
from minilora.formats.tokenizer import ByteTokenizer, Tokenizer
from minilora.functional import cross_entropy, mse
from minilora.kernels import upcast
from minilora.runs.recipe import Recipe
from minilora.runs.run_file import Run
from minilora.training.evaluate import classification_metrics, confusion, evaluate, map_batches, pearson, perplexity

_GENERAL_WINDOW = 256


@dataclass
class Task:
    """Data to train and to measure on."""

    what: str  # in words
    headline: str  # the name of the figure that is reported first
    held_out: list[Batch]
    batches: Callable[[int], Iterator[Batch]] = lambda seed: iter(())  # endless, drawn by a seed; none where a model is only measured
    epoch: Callable[[np.random.Generator], int] | None = None  # the number of batches of one pass; None for text, which has no epochs
    labels: list[str] | None = None  # the names of the classes
    counts: dict[str, int] = field(default_factory=dict)  # figures of the data, for the results
    sha256: str = ""  # of the training data
    trained_on: dict[str, Any] = field(default_factory=dict)  # for run.json: the SHA-256 of the training data, whether the data to
    # measure on were held out of them, and the seed that drew them

    @property
    def unit(self) -> tuple[str, float]:
        """(the unit of a printed loss, in nats)."""
        return ("bits per byte", math.log(2)) if self.headline == "bits_per_byte" else ("loss", 1.0)

    def steps(self, epochs: float, accumulate: int, seed: int) -> int | None:
        """Steps that read every record `epochs` times; None without epochs. The last step of an epoch may have fewer batches."""
        if self.epoch is None:
            return None
        each = (-(-self.epoch(np.random.default_rng((seed, k))) // accumulate) for k in range(math.ceil(epochs)))
        return max(1, sum(math.ceil(round(min(1.0, epochs - k) * n, 6)) for k, n in enumerate(each)))  # 2.1 - 2 is above 0.1


def training_task(recipe: Recipe, tokenizer: Tokenizer, labels: Sequence[str] | None = None) -> Task:
    """The data of a recipe, to train and to measure on. labels: the classes of a published head; by default those of the data."""
    if recipe.kind == "text":
        return _text_task(recipe, tokenizer)
    dataset = _dataset(recipe, tokenizer, labels and _names_for(labels, recipe))
    for split, use in (("train", "train on"), ("valid", "hold out")):
        if not getattr(dataset, split):
            raise ValueError(f"{recipe.data} has no examples to {use} (split {split}).")
    if recipe.train_size is not None:
        dataset.train = few(dataset.train, recipe.train_size, dataset.labels or (), recipe.seed)
    dataset.valid = _at_most(dataset.valid, recipe)

    task = _measured(dataset.describe(), dataset.valid, recipe, tokenizer, dataset.labels)
    held_out = "valid" not in split_files(str(recipe.data))
    task.sha256 = fingerprint(str(recipe.data), recipe.encoding)
    task.trained_on = {"sha256": task.sha256, "held_out": held_out, "seed": recipe.seed}
    if recipe.kind == "classify":
        task.batches = lambda seed: endless(lambda rng: batches_of(dataset.train, recipe.batch_size, rng), seed)
        task.epoch = lambda rng: -(-len(dataset.train) // recipe.batch_size)
    else:
        task.batches = lambda seed: endless(lambda rng: packed_batches(dataset.train, recipe.tokens_per_batch, rng), seed)
        task.epoch = lambda rng: len(pack(dataset.train, recipe.tokens_per_batch, rng))
    return task


def _names_for(labels: Sequence[str], recipe: Recipe) -> Sequence[str]:
    """The classes of a published head; if it names none and the data name as many, those of the data, with a note."""
    if len(labels) < 2 or named(labels):
        return labels
    file = split_files(str(recipe.data)).get("train")
    names = class_names(file, list(read_records(file, recipe.encoding))) if file else []
    if len(names) != len(labels) or all(name in labels or name.isdecimal() for name in names):
        return labels
    note(f"{recipe.model} does not name its {len(labels)} classes; they are assumed to be {listed(names, 40)}, in this order.")
    return names


def _texts(recipe: Recipe) -> tuple[str, np.ndarray, np.ndarray]:
    """(what it is, the part to train on, the held-out part) of plain text: files, or by default the standard library's source."""
    if recipe.data is not None:
        return str(recipe.data), *split_text(read_text(recipe.data, recipe.encoding))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"Python source of the standard library {version}", stdlib_source(held_out=False), stdlib_source(held_out=True)


def _text_task(recipe: Recipe, tokenizer: Tokenizer) -> Task:
    """Plain text in windows that start anywhere."""
    what, *texts = _texts(recipe)
    train, held_out = (tokens_of(text, tokenizer) for text in texts)
    for tokens, part in ((train, "the part to train on"), (held_out, "the held-out part")):
        check_length(tokens, recipe.window, f"{what}, {part},")
    unit = "bytes" if isinstance(tokenizer, ByteTokenizer) else "tokens"
    task = _measured_text(what, held_out, recipe, tokenizer)
    scored = sum(b.labelled for b in task.held_out)
    task.what = f"{what}: {len(train):,} {unit} to train on, {scored:,} of {len(held_out) - 1:,} held out to measure on"
    task.batches = lambda seed: random_windows(train, recipe.window, recipe.batch_size, np.random.default_rng(seed))
    task.sha256 = hashlib.sha256(np.concatenate(texts).tobytes()).hexdigest()
    if recipe.data is not None:
        task.trained_on = {"sha256": fingerprint(recipe.data, recipe.encoding), "held_out": True, "seed": recipe.seed}
    return task


def measuring_task(
    recipe: Recipe, tokenizer: Tokenizer, labels: Sequence[str] | None, split: str | None, run: Run | None, sampled: bool
) -> Task:
    """The data to measure a model on: `split` ("train", "valid", "test" or "all") of the recipe's data.

    Default: of a folder the test split, or else valid, or else what `finetune` would hold out of train; all of a file. Of the file that
    the run was trained on, only the held-out part is measured by default.
    sampled: eval_size and eval_bytes apply to any data.
    Raises ValueError when the split is empty, nothing of the data was held out, or the run's file has changed since.
    """
    if split not in (None, *SPLITS, "all"):
        raise ValueError(f"there is no split {split!r}; choose {', '.join(SPLITS)} or all.")
    text, path = recipe.kind == "text", Path(recipe.data or ".")
    files = {} if text else split_files(path)
    trained_on = {} if run is None or recipe.data is None else run.trained_on
    known = bool(trained_on) and trained_on.get("sha256") == fingerprint(path, recipe.encoding)
    same = run is not None and None not in (recipe.data, run.recipe.data) and path.resolve() == Path(str(run.recipe.data)).resolve()
    own = known or same
    if split is None and known and not (trained_on.get("held_out") or path.is_dir()):
        raise ValueError(f"the run was trained on all of {path}; give other data, or --all to measure on what it has learnt.")
    folder = path.is_dir() and not text
    split = split or ("test" if "test" in files else "valid" if own or folder or recipe.data is None else "all")
    split = "valid" if text and split == "test" else split
    drawn = split != "test" and "valid" not in files
    if own and split == "valid" and drawn and not known:
        raise ValueError(
            f"{path} is not as the run read it (its SHA-256 is another), so the held-out part is not known; "
            "give other data, or --all to measure on all of it."
        )
    if text:
        return _text_to_measure(recipe, tokenizer, split, own, sampled)
    if split == "all":
        options: dict[str, Any] = {"labels": labels, "encoding": recipe.encoding}
        parts = [load_examples(f, recipe.task, tokenizer, recipe.window, recipe.mask_prompt, **options) for f in files.values()]
        examples, where = [e for part in parts for e in part], f"all of {path}"
        if own:
            where += ", of which the run may have learnt all but what it held out"
    else:
        examples = getattr(_dataset(recipe, tokenizer, labels, run.recipe if known and run else None), split)
        where = f"the split {split} of {path}" + f", a tenth of it held out by seed {recipe.seed}" * drawn
        if own and (split == "train" or (drawn and trained_on.get("seed") != recipe.seed)):
            where += ", most of which the run has learnt"
    if sampled or (split == "valid" and known):
        examples = _at_most(examples, recipe)
    if not examples:
        raise ValueError(f"{path} has no examples in the split {split} to measure on.")
    cut = sum(e.cut for e in examples)
    what = f"{len(examples):,} sequences: {where}; window {recipe.window}, {f'{cut:,} are' if cut else 'none is'} cut"
    return _measured(what, examples, recipe, tokenizer, list(labels) if labels and len(labels) > 1 else None)


def _text_to_measure(recipe: Recipe, tokenizer: Tokenizer, split: str, own: bool, sampled: bool) -> Task:
    """own: the text is the one that the run was trained on."""
    what, train, held_out = _texts(recipe)
    every = ", all of it, training data too" if own or recipe.data is None else ""
    text, which = {
        "train": (train, ", the part to train on"),
        "valid": (held_out, ", the held-out part of it"),
        "all": (np.concatenate([train, held_out]), every),
    }[split]
    limited = recipe if sampled or split == "valid" else replace(recipe, eval_bytes=2**62)
    task = _measured_text(what + which, tokens_of(text, tokenizer), limited, tokenizer)
    scored = sum(b.labelled for b in task.held_out)
    task.what += f": {scored:,} of {task.counts['total_tokens']:,} tokens, in windows of {recipe.window}"
    return task


def _measured(what: str, examples: Sequence[Example], recipe: Recipe, tokenizer: Tokenizer, labels: list[str] | None) -> Task:
    counts = {"cut_sequences": sum(e.cut for e in examples)}
    if recipe.kind == "classify":
        headline = "accuracy" if examples[0].labels.dtype.kind == "i" else "pearson"
        return Task(what, headline, list(batches_of(examples, recipe.batch_size)), labels=labels, counts=counts)
    return Task(what, _headline(tokenizer), list(packed_batches(examples, recipe.tokens_per_batch)), counts=counts)


def _measured_text(what: str, tokens: np.ndarray, recipe: Recipe, tokenizer: Tokenizer) -> Task:
    if len(tokens) < 2:
        raise ValueError(f"{recipe.data} has {len(tokens)} token: there is nothing to predict.")
    batches = list(held_out_windows(tokens, recipe.window, 4, max(1, recipe.text_to_measure // recipe.window)))
    return Task(what, _headline(tokenizer), batches, counts={"total_tokens": len(tokens) - 1})


def general_task(model: Any, recipe: Recipe, tokenizer: Tokenizer) -> Task | None:
    """The text on which a model shows what it has forgotten (`Recipe.forgetting`); None for classifiers, or where none is wanted.

    Its windows do not depend on the recipe's, so that runs can be compared.
    """
    if recipe.kind == "classify" or recipe.forgetting == "":
        return None
    path = GENERAL if recipe.forgetting is None else Path(recipe.forgetting)
    if not path.exists():
        raise FileNotFoundError(f"there is no text {path} to measure forgetting on; name another with --forgetting, or none with ''.")
    tokens = tokens_of(read_text(path, "utf-8" if recipe.forgetting is None else recipe.encoding), tokenizer)
    window = max(1, min(_GENERAL_WINDOW, model.config.longest_sequence, len(tokens) - 1))
    return _measured_text(path.name, tokens, replace(recipe, window=window, eval_bytes=8192), tokenizer)


def fingerprint(data: str | Path, encoding: str = "utf-8") -> str:
    """The SHA-256 of the training data: the training split of records, or the text."""
    raw = read_bytes(split_files(data)["train"]) if is_dataset(data) else read_text(data, encoding).tobytes()
    return hashlib.sha256(raw).hexdigest()


def _dataset(recipe: Recipe, tokenizer: Tokenizer, labels: Sequence[str] | None, made: Recipe | None = None) -> Dataset:
    options: dict[str, Any] = {"labels": labels, "seed": recipe.seed, "encoding": recipe.encoding}
    options["drawn_at"] = (made.window, made.mask_prompt) if made else None
    return load_dataset(str(recipe.data), recipe.task, tokenizer, recipe.window, recipe.mask_prompt, **options)


def _at_most(examples: list[Example], recipe: Recipe) -> list[Example]:
    """recipe.eval_size of the examples, drawn by the seed in proportion to the classes."""
    return examples if recipe.eval_size is None else [examples[i] for i in sample(examples, recipe.eval_size, recipe.seed)]


def measure(model: Any, task: Task, threads: int = 1, matrix: bool = False) -> dict[str, Any]:
    """{"loss": nats a label, "tokens": the number read, and the task's own figures} on the held-out batches.

    matrix: of classes also "confusion", the rows of the confusion matrix (training/evaluate.py).
    """
    tokens = sum(len(b.ids) for b in task.held_out)
    if not task.held_out[0].per_sequence:
        loss, labelled = evaluate(model, task.held_out, threads)
        result = {"loss": loss, "tokens": tokens, "labelled_tokens": labelled, **task.counts, "perplexity": perplexity(loss)}
        return result | ({"bits_per_byte": loss / math.log(2)} if task.headline == "bits_per_byte" else {})

    def logits_of(model: Any, batch: Batch) -> np.ndarray:
        return to_numpy(upcast(model.forward(batch.ids, keep=False, offsets=batch.offsets)[0]))

    logits = np.concatenate(map_batches(model, task.held_out, logits_of, threads))
    labels = np.concatenate([b.labels for b in task.held_out])
    read = {"tokens": tokens, "sequences": len(labels), **task.counts}
    if logits.shape[1] == 1:
        return {"loss": float(mse(logits[:, 0], labels)[0]), **read, "pearson": pearson(logits[:, 0], labels)}
    figures: dict[str, Any] = classification_metrics(logits.argmax(axis=1), labels, logits.shape[1])
    if matrix:
        figures["confusion"] = confusion(logits.argmax(axis=1), labels, logits.shape[1]).tolist()
    return {"loss": float(cross_entropy(logits, labels)[0]), **read, **figures}


def tokens_of(text: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes (n,) as token ids, with a begin token if the tokenizer has one. For a model of bytes, the bytes themselves."""
    return text if isinstance(tokenizer, ByteTokenizer) else tokenizer.encode_prompt(text.tobytes().decode("utf-8"))


def _headline(tokenizer: Tokenizer) -> str:
    return "bits_per_byte" if isinstance(tokenizer, ByteTokenizer) else "perplexity"
