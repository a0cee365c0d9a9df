"""Opening what a path names: a run folder, an adapter folder, a model folder, or the bundled model."""

from __future__ import annotations

from pathlib import Path

from minilora.formats.adapter import load_adapter, read_adapter_config
from minilora.formats.atomic import read_json
from minilora.formats.checkpoint import load_model, save_model
from minilora.layers import Linear
from minilora.lora import lora_layers, merge
from minilora.models import GPT2


def open_model(path: str | Path, backend: str = "auto") -> GPT2:
    """The model that a path names, with its adapter if there is one. Raises FileNotFoundError or ValueError as the loaders do."""
    folder = Path(path)
    if (folder / "model" / "config.json").is_file():  # a run of full fine-tuning
        return load_model(folder / "model", backend)
    adapter = _adapter_folder(folder)
    if adapter is None:
        if (folder / "run.json").is_file():
            raise FileNotFoundError(f"{folder} is a run that has not saved an adapter or a model.")
        return load_model(path, backend)
    model = load_model(read_adapter_config(adapter).base_model_name_or_path or "pydoc", backend)
    load_adapter(model, adapter)
    return model


def merge_run(path: str | Path, out: str | Path) -> dict[str, float]:
    """Write the merged model of a run or adapter folder to a new folder `out`. Returns {path: largest change of a weight}.

    Raises ValueError when there is no adapter, FileExistsError when `out` is in use.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is in use; name another folder with --out, or remove it first.")
    if _adapter_folder(Path(path)) is None:
        raise ValueError(f"{path} has no adapter to merge.")
    model = open_model(path, "numpy")
    changes = merge(model)
    save_model(model, out)
    return changes


def describe(path: str | Path) -> str:
    """A few lines: parameters, memory, adapters, and the names that can be adapted."""
    model = open_model(path, "numpy")
    c = model.config
    adapters = lora_layers(model)
    adapted = sum(layer.lora_A.data.size + layer.lora_B.data.size for _, layer in adapters)
    count = sum(p.data.size for _, p in model.parameters()) - adapted
    names: dict[str, list[str]] = {}
    for name, layer in model.modules():
        if isinstance(layer, Linear) and name:
            names.setdefault(name.rpartition(".")[2], []).append(f"{layer.in_features} x {layer.out_features}")
    sizes_of = f"{c.n_layer} layers, width {c.n_embd}, {c.n_head} heads, {c.vocab_size} tokens, {c.n_positions} positions"
    lines = [
        f"model       {path}: gpt2, {sizes_of}",
        f"parameters  {count:,}: {4 * count / 1e6:.1f} MB in float32",
    ]
    if adapters:
        r = ", ".join(map(str, sorted({layer.r for _, layer in adapters})))
        lines.append(f"adapter     LoRA on {len(adapters)} layers, r = {r}: {adapted:,} parameters, {adapted / count:.1%} of the model")
    if (Path(path) / "run.json").is_file():
        results = read_json(Path(path) / "run.json").get("results", {})
        if "bits_per_byte_after" in results:
            lines.append(
                f"held out    {results['bits_per_byte_before']:.3f} bits per byte before, {results['bits_per_byte_after']:.3f} after"
            )
    lines.append("adaptable   " + "; ".join(f"{name} ({len(sizes)}: {', '.join(sorted(set(sizes)))})" for name, sizes in names.items()))
    return "\n".join(lines)


def _adapter_folder(folder: Path) -> Path | None:
    """The adapter in a run folder, or the folder itself if it is an adapter."""
    return next((f for f in (folder / "adapter", folder) if (f / "adapter_config.json").is_file()), None)
