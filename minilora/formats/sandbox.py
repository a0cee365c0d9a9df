"""Programs that come with a model, run in a process of their own with limits: chat templates, and regular expressions of adapters.

Either may ask for any time and memory, and neither jinja2's sandbox nor `re` has a limit. This file is both sides: `render` and `can_match`
send a line of JSON to a process that runs it, which answers with one. The process is started once, ends with this one, and is killed and
replaced when an answer takes more than SECONDS of processor time. Its memory is limited where the system can do that (not on Windows).
"""

import atexit
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Collection, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

MARKS = "\ufdd0", "\ufdd1"  # noncharacters around what the filter "generation" passes on
SECONDS, WALL = 1.0, 30.0  # of processor time; by the clock, where only that can be limited
MEMORY, OUTPUT = 64 * 2**20, 2**20  # bytes; characters, beyond eight times those of the request


def render(template: str, context: dict[str, Any]) -> str:
    """The text of a chat template. Raises ValueError when it is invalid, fails, or exceeds a limit; ImportError without jinja2."""
    answer = _ask({"template": template, "context": context})
    if answer is None:
        raise ValueError(f"the chat template takes more than {SECONDS:g} s or {MEMORY // 2**20} MB; it may be damaged or hostile.")
    if "missing" in answer:
        raise ImportError(answer["missing"])
    if "error" in answer:
        raise ValueError(f"the chat template {answer['error']}.")
    return answer["text"]


def can_match(expressions: Sequence[str], texts: Collection[str]) -> bool:
    """Whether all of these regular expressions, at the start of all of these texts, match or fail to match within the limits."""
    answer = _ask({"expressions": list(expressions), "texts": list(texts)})
    return answer is not None and "error" not in answer


# ---- this side ---------------------------------------------------------------------------------------------------------------------------

_processes: dict[int, subprocess.Popen[str]] = {}  # by the process that started it: a fork starts its own
_lock = threading.Lock()


def _ask(request: dict[str, Any]) -> Any:
    """The answer; None if the process had to be killed."""
    with _lock:
        process: Any = _processes.get(os.getpid())
        if process is None or process.poll() is not None:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "encoding": "ascii"}
            process = subprocess.Popen([sys.executable, __file__], start_new_session=True, **pipes)  # Ctrl-C is for the run
            _processes[os.getpid()] = process
            atexit.register(_end, process)
        late, answer = threading.Timer(WALL, process.kill), ""
        if os.name == "nt":  # elsewhere the process has a timer of its own
            late.start()
        try:
            print(json.dumps(request), file=process.stdin, flush=True)
            answer = process.stdout.readline()
        except OSError:  # it has ended
            pass
        finally:
            late.cancel()
            if not answer:  # also after Ctrl-C: the next request must not get this one's answer
                _end(process)
        return json.loads(answer) if answer else None


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


# ---- the other side ----------------------------------------------------------------------------------------------------------------------


def _serve() -> None:
    sys.path.pop(0)  # this folder, whose modules have the names of libraries
    with contextlib.suppress(ImportError):
        _environment()  # before the limit of memory
    set_timer = _limit()
    for line in sys.stdin:
        set_timer(SECONDS)
        request, answer = json.loads(line), {}
        try:
            if "template" in request:
                answer = _rendered(request["template"], request["context"], OUTPUT + 8 * len(line))
            else:
                for expression in request["expressions"]:
                    for text in request["texts"]:
                        re.match(expression, text)
        except Exception as error:
            answer = {"error": f"fails with {type(error).__name__}"}
        set_timer(0)
        print(json.dumps(answer), flush=True)


def _limit() -> Any:
    """Limit the memory of this process. The result starts a timer, which ends the process; or stops it, with 0."""
    if os.name == "nt":  # the caller's clock alone
        return lambda seconds: None
    import resource
    import signal

    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as file:
        here = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (here + MEMORY, here + MEMORY))
    return lambda seconds: signal.setitimer(signal.ITIMER_PROF, seconds)


def _rendered(template: str, context: dict[str, Any], most: int) -> dict[str, str]:
    """{"text": ...}, or {"error": what it does, in one sentence}."""
    try:
        environment = _environment()
    except ImportError as error:
        return {"missing": str(error)}
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

    kinds: dict[type[Exception], str] = {SecurityError: "tries to leave the sandbox", TemplateError: "refuses these messages"}
    kinds |= {MemoryError: f"needs more than {MEMORY // 2**20} MB", RecursionError: "is nested too deeply"}
    try:
        text = _compiled(environment, template).render(context)  # plain data: no Python objects
        return {"text": text} if len(text) <= most else {"error": f"writes {len(text):,} characters, which is too much"}
    except Exception as error:
        what = kinds.get(type(error), f"fails with {type(error).__name__}")
        if isinstance(error, TemplateSyntaxError):
            what = f"is invalid at line {error.lineno}"
        return {"error": f"{what} ({str(error).rstrip('.'):.300})" if str(error) else what}


@lru_cache(maxsize=8)
def _compiled(environment: Any, template: str) -> Any:
    return environment.from_string(template)


@lru_cache(maxsize=1)
def _environment() -> Any:
    """The environment of transformers, in a sandbox that raises at the first violation."""
    from importlib.metadata import version

    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    if tuple(int(part) for part in version("jinja2").split(".")[:3] if part.isdigit()) < (3, 1, 6):
        raise ImportError(f"jinja2 {version('jinja2')} has known ways out of its sandbox; pip install 'jinja2>=3.1.6'")

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"access to attribute {attribute!r}")  # jinja2 returns an undefined value

    class PlainNamespace(Namespace):
        """jinja2's namespace, without names that start with an underscore: Python would take those for methods."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`, so that namespace(self=...) works as in jinja2's own
            Namespace.__init__(args[0])
            for name, value in dict(*args[1:], **kwargs).items():
                args[0][name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace with the name {name!r}")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        """jinja2's own tojson escapes HTML."""
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters |= {"tojson": tojson, "generation": lambda text: MARKS[0] + text + MARKS[1]}
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "namespace": PlainNamespace,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),  # a function: the type has methods
    }
    return environment


if __name__ == "__main__":
    _serve()
