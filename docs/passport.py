"""Fill in the table of docs/adapters-elsewhere.md from the rules of formats/passport.toml: `python docs/passport.py`."""

from __future__ import annotations

import re
from pathlib import Path

from minilora.formats.passport import readers

PAGE = Path(__file__).parent / "adapters-elsewhere.md"
FEATURES = {
    "method": "bottleneck adapters, partial tuning",
    "vera": "VeRA",
    "dora": "DoRA",
    "modules_to_save": "fully trained modules (`modules_to_save`)",
    "bias": "biases",
    "embedding": "adapters of embeddings and heads",
    "patterns": "`rank_pattern`, `alpha_pattern`",
    "rank": "ranks above 16",
}


def table() -> str:
    """Features down, readers across."""
    rules = readers()
    lines = ["| | " + " | ".join(each["name"] for each in rules.values()) + " |", "|---|" + "---|" * len(rules)]
    lines.append(
        "| how | "
        + " | ".join("as it is" if r["format"] == "peft" else f"`minilora export --to {r['format']}`" for r in rules.values())
        + " |"
    )
    lines.append("| base models | " + " | ".join(r.get("architectures", "all").replace(" ", ", ") for r in rules.values()) + " |")
    for name, words in FEATURES.items():
        cells = []
        for r in rules.values():
            refused, needed = r["refuses"].get(name), r.get("needs", {}).get(name, "").format("RANK")
            cells.append(f"**no**: {refused}" if refused else needed or "yes")
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    lines.append("| source | " + " | ".join(r["source"] for r in rules.values()) + " |")
    return "\n".join(lines)


def filled(page: str) -> str:
    return re.sub(r"<!-- passport -->.*?<!-- end -->", lambda _: f"<!-- passport -->\n{table()}\n<!-- end -->", page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
