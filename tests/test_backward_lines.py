"""`minilora gradcheck` executes every line of every backward function that runs on NumPy."""

import dis
import importlib
import inspect
import pkgutil
import sys
import types

import numpy as np

import minilora
from minilora.checking.catalogue import catalogue
from minilora.checking.check import Check, unchanged

ABSTRACT = {"Layer.backward"}  # raises NotImplementedError


def backward_functions():
    """{code: "module.function"} of every function whose name ends with backward."""
    found = {}
    for module in pkgutil.walk_packages(minilora.__path__, "minilora."):
        if any(part in module.name for part in (".cuda", ".checking", "__main__", ".exercises", ".explain", ".report")):
            continue
        namespace = vars(importlib.import_module(module.name))
        classes = [c for c in namespace.values() if inspect.isclass(c) and c.__module__ == module.name]
        for value in [*namespace.values(), *(f for c in classes for f in vars(c).values())]:
            own = isinstance(value, types.FunctionType) and value.__module__ == module.name and value.__name__.endswith("backward")
            if own and value.__qualname__ not in ABSTRACT and "<locals>" not in value.__qualname__:
                found[value.__code__] = f"{module.name}.{value.__qualname__}"
    return found


def test_every_line_of_every_backward_is_executed():
    functions, executed = backward_functions(), {}
    assert len(functions) > 50

    def local(frame, event, arg):
        executed.setdefault(frame.f_code, set()).add(frame.f_lineno)
        return local

    def start(frame, event, arg):
        return local if frame.f_code in functions else None

    for _, layer, x, options in catalogue():
        with unchanged(layer), np.errstate(all="ignore"):
            check = Check(layer, x, 1e-7, 0, 1, options)
            sys.settrace(start)
            try:
                check.analyse()
                list(check.contract())
            finally:
                sys.settrace(None)
    missing = []
    for code, name in functions.items():
        lines = {line for _, line in dis.findlinestarts(code) if line is not None and line > code.co_firstlineno}
        missing += [f"{name}:{line}" for line in sorted(lines - executed.get(code, set()))]
    assert not missing, "\n".join(missing)
