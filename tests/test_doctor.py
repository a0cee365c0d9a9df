"""`minilora doctor`: a wrong product is found in every layout and dtype, and nothing is trained with it."""

import json

import numpy as np
import pytest

from minilora.cli import main
from minilora.runs import doctor
from minilora.runs.finetune import finetune
from minilora.runs.recipe import Recipe


class Wrong(np.ndarray):
    """A matrix whose product is off in one number where `condition` holds, as with a broken BLAS."""

    condition = staticmethod(lambda a, b: True)

    def __matmul__(self, other):
        y = np.array(np.asarray(self) @ np.asarray(other))
        if y.dtype.kind == "f" and self.condition(self, other):
            y.flat[-1] += 1
        return y


BROKEN = {
    "float32 only": lambda a, b: a.dtype == np.float32,
    "columns": lambda a, b: b.flags.f_contiguous and not b.flags.c_contiguous,
    "large": lambda a, b: a.shape[0] > 100,
    "a matrix by its transpose": lambda a, b: np.shares_memory(a, b),
    "strided": lambda a, b: not (a.flags.c_contiguous or a.flags.f_contiguous),
}


def test_products_are_right_here():
    assert doctor.wrong_products() == []


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_product_is_found_and_nothing_is_trained(name, monkeypatch, tmp_path, capsys):
    plain = doctor.layouts
    monkeypatch.setattr(Wrong, "condition", staticmethod(BROKEN[name]))
    monkeypatch.setattr(doctor, "layouts", lambda x: {how: value.view(Wrong) for how, value in plain(x).items()})
    assert doctor.wrong_products()
    with pytest.raises(RuntimeError, match="matrix products are wrong"):
        finetune(Recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert "products   WRONG: A " in shown.out
    assert "matrix products are wrong" in shown.err


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["packages"]["numpy"] == np.__version__
    assert about["wrong_products"] == []
    assert about["blas"]
