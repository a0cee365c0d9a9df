"""`minilora info`: the contents of a model or a run."""

from pathlib import Path
from typing import Any

from minilora.adapters import bottlenecks
from minilora.formats.adapter import load_adapter
from minilora.kernels.report import report
from minilora.layers import Linear
from minilora.lora import adaptation, lora_layers
from minilora.runs import Say, silent
from minilora.runs.export import passport
from minilora.runs.run_file import open_base, run_of


def describe(
    model: str | Path,
    allow_other_weights: bool = False,
    kernels: bool = False,
    backend: str = "numpy",
    readers: str | None = None,
    say: Say = silent,
) -> dict[str, Any]:
    """Parameters, memory, adapters, results, and the names of adaptable layers. Raises as the loaders do.

    kernels: also which implementation each operation of the model runs on `backend`, and why (kernels/report.py).
    readers: instead, which of these programs read the adapter (export.py).
    """
    if readers is not None:
        return {"model": str(model), "readers": passport(model, readers, say)}
    opened, adapter = open_base(model, backend)
    count = sum(p.data.size for _, p in opened.parameters())
    names: dict[str, list[str]] = {}
    for name, layer in opened.modules():
        if isinstance(layer, Linear) and name:
            names.setdefault(name.rpartition(".")[2], []).append(f"{layer.in_features} x {layer.out_features}")
    result: dict[str, Any] = {
        "model": str(model),
        "model_type": opened.model_type,
        "config": {key: value for key, value in opened.config.to_json().items() if isinstance(value, (int, float, str))},
        "parameters": count,
        "bytes_float32": 4 * count,
        "adaptable": {name: {"layers": len(sizes), "sizes": sorted(set(sizes))} for name, sizes in names.items()},
    }
    say(f"model       {model}: {opened.model_type}, " + ", ".join(f"{k} {v}" for k, v in result["config"].items() if type(v) is int))
    say(f"parameters  {count:,}: {4 * count / 1e6:.1f} MB in float32")
    if adapter is not None:
        config = load_adapter(opened, adapter, allow_other_weights)
        layers = len(lora_layers(opened)) + len(bottlenecks(opened))
        trained = sum(value.size for value in adaptation(opened).base_values.values())
        added = sum(p.data.size for _, p in opened.parameters()) - count + trained
        ranks = sorted({layer.r for _, layer in lora_layers(opened)})
        result["adapter"] = {"method": config.method, "layers": layers, **({"r": ranks} if ranks else {}), "parameters": added}
        where = (f" on {layers} layers" if layers else "") + (f", r = {', '.join(map(str, ranks))}" if ranks else "")
        say(f"adapter     {config.method}{where}: {added:,} parameters, {added / count:.1%} of the model")
    if (Path(model) / "run.json").is_file() and (run := run_of(model)) is not None:
        result["results"] = run.results
        if "after" in run.results:
            name = run.results["headline"]
            before, after = (run.results[when].get(name) for when in ("before", "after"))
            if before is not None and after is not None:  # null where a figure is not finite
                say(f"held out    {name.replace('_', ' ')} {before:.3f} before, {after:.3f} after")
    say("adaptable   " + "; ".join(f"{name} ({v['layers']}: {', '.join(v['sizes'])})" for name, v in result["adaptable"].items()))
    if kernels:
        rows = report(opened)
        result["kernels"] = [row._asdict() for row in rows]
        for row in rows:
            say(f"kernel      {row.operation:<20} {row.implementation:<10} {row.why}")
    return result
