"""Text to train on: Python source of the standard library, which needs no download, or the user's files. A token is a byte."""

import importlib.util
import json
from pathlib import Path

import numpy as np

from minilora.data.records import SPLITS, decode_bytes, listed, note, read_bytes

# Modules that exist as source files in Python 3.10 to 3.13. The held-out ones are never trained on.
TRAIN = """argparse ast bdb calendar cmd code codeop colorsys compileall configparser contextlib copy csv dataclasses decimal dis
doctest filecmp fileinput fnmatch fractions ftplib functools getopt getpass gettext glob graphlib gzip hashlib heapq hmac imaplib
inspect ipaddress keyword linecache locale lzma mailbox mimetypes netrc numbers operator optparse pdb pickle pickletools pkgutil platform
plistlib poplib pprint profile pstats pyclbr queue quopri random rlcompleter runpy sched secrets selectors shelve shlex shutil signal
smtplib socket socketserver statistics stringprep struct subprocess symtable tabnanny tarfile tempfile textwrap threading timeit
token trace traceback tracemalloc tty types typing uuid warnings wave weakref webbrowser zipapp zipimport""".split()
GENERAL = Path(__file__).parent / "general.txt"  # a page of English, on which fine-tuning is not meant to change a model
HELD_OUT = "bisect bz2 cProfile difflib enum ssl string tokenize".split()


def stdlib_source(held_out: bool) -> np.ndarray:
    """The bytes (n,) of the standard library's source: of the modules in TRAIN, or of those in HELD_OUT."""
    specs = (importlib.util.find_spec(name) for name in (HELD_OUT if held_out else TRAIN))
    files = [spec.origin for spec in specs if spec is not None and spec.origin and spec.origin.endswith(".py")]
    return np.frombuffer(b"\n\n".join(Path(file).read_bytes() for file in files), dtype=np.uint8)


def read_text(path: str | Path, encoding: str = "utf-8") -> np.ndarray:
    """The UTF-8 bytes (n,) of a text file, or of all .py, .txt and .md files below a folder, in the order of their names.

    Files are separated by an empty line; those of a folder that are not read are named on standard error. Raises FileNotFoundError when
    there is no text file; ValueError for an empty text, binary data, another encoding, records that are not in a record file, and a
    folder whose files are the splits of one text.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts))
        paths = [p for p in inside if p.suffix.lower() in (".py", ".txt", ".md")]
        if not paths:
            raise FileNotFoundError(f"there are no .py, .txt or .md files below {path}.")
        if others := [str(p.relative_to(path)) for p in inside if p not in set(paths)]:
            note(f"{path}: only .py, .txt and .md files are read; {listed(others)} {'is' if len(others) == 1 else 'are'} not.")
    else:
        paths = [path]
    tops = {p.stem.lower(): p.name for p in paths if p.parent == path and p.suffix.lower() == ".txt"}
    parts = [[tops[name] for name in names if name in tops] for names in SPLITS.values()]
    if parts[0] and (parts[1] or parts[2]):
        raise ValueError(f"{path} holds {parts[0][0]} and {(parts[1] + parts[2])[0]}, which would be learnt as one text; give one file.")
    text = "\n\n".join(decode_bytes(read_bytes(p), p, encoding) for p in paths)
    if not text.strip():
        raise ValueError(f"{path} is empty: there is nothing to train on.")
    if len(paths) == 1 and _starts_with_record(text):
        raise ValueError(f"{path} holds records, but its name is not that of a record file; rename it to end in .jsonl.")
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)


def _starts_with_record(text: str) -> bool:
    text = text.lstrip()
    text = text[text.startswith("[") :].lstrip()
    try:
        value = json.JSONDecoder().raw_decode(text)[0] if text.startswith("{") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value.keys() & {"text", "prompt", "completion", "messages"})


def split_text(text: np.ndarray, fraction: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """(train, held out): the last `fraction` of the bytes, without cutting a UTF-8 character, is held out."""
    cut = int(len(text) * (1 - fraction))
    while 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:  # inside a character
        cut -= 1
    return text[:cut], text[cut:]
