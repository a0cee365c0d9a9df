"""Settings from a TOML file."""

import pytest

from minilora.formats.settings import read_settings

ALLOWED = {"lr": float, "steps": int, "model": str, "target_modules": str | list, "mask_prompt": bool, "warmup": int | None}


@pytest.fixture
def read(tmp_path):
    def read(text):
        (tmp_path / "run.toml").write_bytes(text.encode() if isinstance(text, str) else text)
        return read_settings(tmp_path / "run.toml", ALLOWED)

    return read


def test_settings_are_read_with_their_types(read):
    result = read('lr = 1\nsteps = 20\nmodel = "bert"\ntarget-modules = ["query", "value"]\nmask_prompt = false\nwarmup = 3\n')
    assert result == {"lr": 1.0, "steps": 20, "model": "bert", "target_modules": ["query", "value"], "mask_prompt": False, "warmup": 3}
    assert type(result["lr"]) is float
    assert read('target_modules = "all-linear"') == {"target_modules": "all-linear"}
    assert read("") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stesp = 3", "there is no setting 'stesp'; did you mean steps"),
        ("zzz = 3", "there is no setting 'zzz'; known: lr, "),
        ("steps = 2.5", "steps must be of type int, got 2.5"),
        ("steps = true", "steps must be of type int, got True"),
        ("mask_prompt = 1", "mask_prompt must be of type bool, got 1"),
        ('lr = "1e-3"', "lr must be of type float, got '1e-3'"),
        ("target_modules = 3", "target_modules must be of type str or list"),
        ("[model]\nname = 1", "model must be of type str, got {'name': 1}"),
        ("target-modules = []\ntarget_modules = []", "given twice"),
        ("lr = ", "is not valid TOML"),
        (b"model = '\xff'", "is not valid TOML"),
    ],
)
def test_errors_are_named(read, text, message):
    with pytest.raises(ValueError, match=rf"run\.toml.*{message}"):
        read(text)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no settings file"):
        read_settings(tmp_path / "absent.toml", ALLOWED)
