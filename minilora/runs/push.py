"""`minilora push`: publish an adapter or a model on the hub. huggingface_hub finds the token, which is never printed or stored here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from minilora.formats import extra
from minilora.runs import Say, silent
from minilora.runs.run_file import adapter_folder

_FILES = ["*.safetensors", "*.json", "*.md", "*.txt", "*.model", "*.jinja"]  # not what else lies in the folder


def push(folder: str | Path, hub_id: str, private: bool = False, say: Say = silent) -> dict[str, Any]:
    """Upload the adapter of a run, an adapter folder or a model folder. Returns {"url": where it is}.

    Raises ValueError for a folder without an adapter or a model, or an invalid id; ImportError without huggingface_hub; OSError when the
    hub refuses.
    """
    folder = Path(folder)
    found = adapter_folder(folder) or next((f for f in (folder / "model", folder) if (f / "config.json").is_file()), None)
    if found is None:
        raise ValueError(f"{folder} has no adapter and no model to publish.")
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
