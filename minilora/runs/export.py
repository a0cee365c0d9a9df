"""Adapters for others: `minilora export`, in the format of another program; `info --for`, which programs read it; `push`, on the hub.

huggingface_hub finds the token, which is never printed or stored here.
"""

import re
from pathlib import Path
from typing import Any

from minilora.formats import extra
from minilora.formats.adapter import factors, save_adapter
from minilora.formats.adapter_config import read_adapter_config
from minilora.formats.fetch import model_type_of
from minilora.formats.gguf_adapter import kind_of, write_gguf_adapter
from minilora.formats.mlx import write_mlx
from minilora.formats.passport import check, readers, verdict
from minilora.lora import adaptation
from minilora.runs import Say, silent
from minilora.runs.folder import check_free
from minilora.runs.run_file import adapter_folder, open_model

_READERS = {"peft": "peft", "mlx": "mlx", "gguf": "llama.cpp"}
_FILES = ["*.safetensors", "*.json", "*.md", "*.txt", "*.model", "*.jinja"]  # that `push` uploads, not what else lies in the folder


def export(
    model: str | Path, to: str, out: str | Path, adapter: str | Path | None = None, allow_other_weights: bool = False, say: Say = silent
) -> dict[str, Any]:
    """Write the adapter of a run or an adapter folder as `to`: "peft" or "mlx", a new folder; "gguf", a new file. Returns what was written.

    Raises ValueError when there is no adapter, or the format cannot hold it (formats/passport.py); FileExistsError when `out` is in use.
    """
    out = check_free(out)
    if to == "gguf" and out.suffix != ".gguf":
        raise ValueError(f"{out}: the name of a GGUF file must end in .gguf, or nothing reads it as one.")
    if adapter is None:
        _adapter_of(model)
    opened = open_model(model, "numpy", adapter, "float32", allow_other_weights)
    config = adaptation(opened).config
    check(_READERS[to], config, kind_of(opened), str(adapter or model))
    base = config.base_model_name_or_path
    if to == "peft":
        save_adapter(opened, out)
    elif to == "mlx":
        write_mlx(out, factors(opened), len(opened.body.parts()[1]), base)
    else:
        write_gguf_adapter(out, factors(opened), opened, config.lora_alpha)
    files = [out] if out.is_file() else sorted(out.iterdir())
    say(f"wrote {', '.join(str(file) for file in files)}: {sum(file.stat().st_size for file in files) / 1e3:,.0f} kB")
    return {"to": to, "files": [str(file) for file in files]}


def passport(path: str | Path, names: str, say: Say = silent) -> dict[str, dict[str, list[str]]]:
    """Which programs read an adapter: {name: {"refused": [why, ...], "needs": [what, ...]}}, both empty where it is read as it is.

    path: a run or an adapter folder; adapter_config.json is enough, so that it can be asked before anything is trained.
    names: of readers, separated by commas, or "all". Raises ValueError for a folder without an adapter, and for an unknown name.
    """
    config, result = read_adapter_config(_adapter_of(path)), {}
    base = config.base_model_name_or_path
    model_type = model_type_of(base) if base else None
    if model_type is None:
        say(f"base        {base or 'not named'}: not at hand, so whether its architecture is supported is not checked")
    for name in readers() if names == "all" else names.split(","):
        refused, needs = verdict(name, config, model_type)
        result[name] = {"refused": refused, "needs": needs}
        source = f" ({readers()[name]['source']})"
        does = f"does not read it. {'; '.join(refused)}{source}" if refused else f"reads it{''.join(f'; {need}' for need in needs)}"
        say(f"{name:<11} {readers()[name]['name']} {does}")
    return result


def push(folder: str | Path, hub_id: str, private: bool = False, say: Say = silent) -> dict[str, Any]:
    """Upload the adapter of a run, an adapter folder or a model folder. Returns {"url": where it is}.

    Raises ValueError for a folder without an adapter or a model, or an invalid id; ImportError without huggingface_hub; OSError when the
    hub refuses.
    """
    folder = Path(folder)
    found = adapter_folder(folder) or next((f for f in (folder / "model", folder) if (f / "config.json").is_file()), None)
    if found is None:
        raise ValueError(f"{folder} has no adapter and no model to publish{'' if folder.exists() else ': there is no such folder'}.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise ValueError(f"{hub_id!r:.80} is not an id of the hub; it is your name or that of your organisation, a slash, and a name.")
    hub = extra("huggingface_hub", "hf", "publishing on the hub")
    try:
        hub.HfApi().create_repo(hub_id, private=private, exist_ok=True)
        about = hub.HfApi().upload_folder(
            repo_id=hub_id, folder_path=found, allow_patterns=_FILES, ignore_patterns=["*/*"], commit_message="Upload by minilora"
        )
    except Exception as error:  # classes of several libraries
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = {401: "it wants a token: run `hf auth login`", 403: "your token may not write there"}.get(status or 0, type(error).__name__)
        raise OSError(f"the hub refuses {hub_id}: {why}{f' (HTTP {status})' if status else ''}.") from None
    say(f"published {found} at {about.repo_url}")
    return {"url": str(about.repo_url)}


def _adapter_of(path: str | Path) -> Path:
    """The folder of the adapter of a path. Raises ValueError, with what makes one, where there is none."""
    if (folder := adapter_folder(Path(path))) is None:
        makes = f"adapter_config.json; minilora extract {path} --out FOLDER makes one of a fine-tuned model"
        raise ValueError(f"{path} has no adapter: there is no {makes if Path(path).exists() else 'such folder'}.")
    return folder
