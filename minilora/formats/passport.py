"""Which programs read an adapter: the rules of passport.toml, applied to its configuration. Nothing has to be trained for that."""

from functools import cache
from importlib.resources import files
from typing import Any

from minilora.formats import tomllib
from minilora.lora import LoraConfig

_EMBEDDINGS = {"embed_tokens", "wte", "wpe", "word_embeddings", "tok_embeddings", "lm_head"}
_USUAL = 16  # vLLM's largest rank, unless it is started for another


@cache
def readers() -> dict[str, dict[str, Any]]:
    """{name for --for: its rules}."""
    return tomllib.loads(files("minilora.formats").joinpath("passport.toml").read_text(encoding="utf-8"))


def features(config: Any) -> dict[str, str]:
    """{feature: in words} of the configuration of an adapter that some reader may refuse."""
    if not isinstance(config, LoraConfig):
        return {"method": config.method}
    saved, targets = list(config.saved_modules), config.target_modules
    named = [targets] if isinstance(targets, str) else targets
    embeddings = sorted({name.rpartition(".")[2] for name in named} & _EMBEDDINGS)
    differ = any(r != config.r for r in config.rank_pattern.values())
    differ = differ or any(alpha != config.lora_alpha for alpha in config.alpha_pattern.values())
    rank = max([config.r, *config.rank_pattern.values()])
    found = {
        "vera": config.method if config.peft_type == "VERA" else "",
        "dora": "DoRA" if config.use_dora else "",
        "modules_to_save": f"modules_to_save ({', '.join(saved)})" if saved else "",
        "bias": f"bias={config.bias!r}" if config.bias != "none" else "",
        "embedding": f"an adapter of {', '.join(embeddings)}" if embeddings else "",
        "patterns": "rank_pattern or alpha_pattern" if differ else "",
        "rank": str(rank) if rank > _USUAL else "",
    }
    return {name: words for name, words in found.items() if words}


def verdict(reader: str, config: Any, model_type: str | None = None) -> tuple[list[str], list[str]]:
    """(why the reader refuses such an adapter, what it needs), each a sentence; both empty where it reads it as it is.

    model_type: of the base, None where that is not known. Raises ValueError for an unknown reader.
    """
    if reader not in readers():
        raise ValueError(f"there is no reader {reader!r}; choose from {', '.join(readers())}.")
    rules, found = readers()[reader], features(config)
    refused = [f"{words}: {rules['refuses'][name]}" for name, words in found.items() if name in rules["refuses"]]
    known = rules.get("architectures", model_type or "").split()
    if model_type is not None and model_type not in known:
        refused.append(f"{model_type}: its models with adapters are {', '.join(known)}")
    needs = [rule.format(found[name]) for name, rule in rules.get("needs", {}).items() if name in found]
    if rules["format"] != "peft":
        needs.append(f"minilora export ADAPTER --to {rules['format']}")
    return refused, needs


def check(reader: str, config: Any, model_type: str, what: str) -> None:
    """Raise ValueError, with all reasons and what to do, when the reader refuses such an adapter."""
    if refused := verdict(reader, config, model_type)[0]:
        rules = readers()[reader]
        do = "merge it into its base (minilora merge) and share the model"
        raise ValueError(f"{rules['name']} does not read {what}: {'; '.join(refused)} ({rules['source']}). You can {do}.")
