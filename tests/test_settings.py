"""Settings from a TOML file."""

import pytest

from minilora.cli.flags import parse


@pytest.fixture
def read(tmp_path):
    def read(text):
        (tmp_path / "run.toml").write_bytes(text.encode() if isinstance(text, str) else text)
        return parse(["finetune", "--config", str(tmp_path / "run.toml")])

    return read


def test_settings_are_read_with_their_types(read):
    result = read('lr = 1\nsteps = 20\nmodel = "bert"\ntarget-modules = ["query", "value"]\nmask_prompt = false\nuse_dora = true\n')
    expected = {"lr": 1.0, "steps": 20, "model": "bert", "target_modules": ["query", "value"], "mask_prompt": False, "use_dora": True}
    assert {name: getattr(result, name) for name in expected} == expected
    assert type(result.lr) is float
    assert read('target_modules = "all-linear"').target_modules == "all-linear"
    assert {**vars(read("")), "config": None} == vars(parse(["finetune"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stesp = 3", "there is no setting 'stesp'; did you mean steps"),
        ("zzz = 3", "there is no setting 'zzz'; known: accumulate, "),
        ("steps = 2.5", "steps must be of type int, got 2.5"),
        ("steps = true", "steps must be of type int, got True"),
        ("mask_prompt = 1", "mask_prompt must be of type bool, got 1"),
        ('lr = "1e-3"', "lr must be of type float, got '1e-3'"),
        ("use_dora = 3", "use_dora must be of type bool or str"),
        ("target_modules = 3", "target_modules must be of type str or list"),
        ("[model]\nname = 1", "model must be of type str, got {'name': 1}"),
        ("target-modules = []\ntarget_modules = []", "target-modules and target_modules are the same setting"),
        ("lr = ", "is not valid TOML"),
        (b"model = '\xff'", "is not valid TOML"),
    ],
)
def test_errors_are_named(read, text, message):
    with pytest.raises(ValueError, match=rf"run\.toml.*{message}"):
        read(text)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.toml"):
        parse(["finetune", "--config", str(tmp_path / "absent.toml")])
