"""Recipe: its fields are the flags and the TOML keys, and what `resolve` returns is complete and frozen."""

import json
from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from minilora.cli import main
from minilora.cli.flags import make_parser
from minilora.runs.recipe import GROUPS, Recipe, ResolvedRecipe

PYTHON_ONLY: set[str] = set()  # fields without a flag
OTHERS = {"help", "config", "json", "out", "rows", "seeds", "quick", "resume"}  # flags of a verb, not of a recipe
VERBS = ("finetune", "study")


def groups_of(verb):
    """{title of a group in --help: names of its flags}."""
    return {group.title: {action.dest for action in group._group_actions} for group in make_parser()[1][verb]._action_groups}


@pytest.mark.parametrize("verb", VERBS)
def test_every_field_is_a_flag_in_its_group_or_for_python_only(verb):
    groups = groups_of(verb)
    for field in fields(Recipe):
        if field.name not in PYTHON_ONLY:
            assert field.name in groups[field.metadata["group"]], field.name
            assert field.metadata["help"]
    in_groups = set().union(*(groups[name] for name in GROUPS))
    assert in_groups - OTHERS == {field.name for field in fields(Recipe)} - PYTHON_ONLY
    assert {action.dest for action in make_parser()[1][verb]._actions} == in_groups | OTHERS & set().union(*groups.values())


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_the_groups(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.removesuffix(":") for line in lines if line.removesuffix(":") in GROUPS] == list(GROUPS)


def test_toml_keys_are_the_names_of_the_fields(tmp_path, monkeypatch):
    """Every field, with a value of its type, arrives in the recipe."""
    values = {
        **{field.name: field.default for field in fields(Recipe) if type(field.default) in (int, float, str) and field.default != ""},
        **{
            "data": "x.txt",
            "forgetting": "y.txt",
            "bias": "all",
            "quantize": "nf4",
            "modules_to_save": ["ln_f"],
            "layers_to_transform": [1],
            "lr": 0.5,
            "warmup": 2,
        },
        **{
            "loraplus_lr_ratio": 4,
            "steps": 3,
            "epochs": 0.5,
            "train_size": 5,
            "eval_size": 5,
            "eval_bytes": 9,
            "sample_bytes": 0,
            "reinit": 1,
            "eval_every": 2,
            "log": "tensorboard",
            "patience": 3,
        },
        **{"mask_prompt": False, "new_head": True, "use_rslora": True, "use_dora": "exact", "init_lora_weights": "pissa"},
        **{"bias_correction": False, "recompute": True, "cache": False, "tf32": True},
    }
    assert values.keys() == {field.name for field in fields(Recipe)} - PYTHON_ONLY
    (tmp_path / "a.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    args, defaults = make_parser()[1]["finetune"], {}
    monkeypatch.setattr("minilora.cli.verbs.Recipe", lambda **given: defaults.update(given) or Recipe())
    monkeypatch.setattr("minilora.cli.verbs.fields", lambda _: fields(Recipe))
    monkeypatch.setattr("minilora.cli.verbs.finetune", lambda *_: {})
    assert main(["finetune", "--config", str(tmp_path / "a.toml")]) == 0
    assert defaults == values
    assert args.get_default("lr") is None  # a parser of its own


def test_resolve_gives_a_frozen_complete_copy():
    recipe = Recipe()
    plan = recipe.resolve(lambda *_: None)
    assert isinstance(plan, ResolvedRecipe)
    assert asdict(plan).keys() == asdict(recipe).keys()
    open_fields = {
        "data",
        "forgetting",
        "layers_to_transform",
        "reinit",
        "loraplus_lr_ratio",
        "epochs",
        "train_size",
        "eval_size",
        "eval_every",
        "patience",
    }
    assert {name for name, value in asdict(plan).items() if value is None} == open_fields  # for which None is a value
    assert recipe.lr is None
    for each in (recipe, plan):
        with pytest.raises(FrozenInstanceError):
            each.lr = 1.0
