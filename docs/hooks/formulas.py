"""Formulas become MathML when the site is built: browsers draw it without a script, and screen readers read it."""

from __future__ import annotations

import html
import re
from typing import Any

from math_core import LatexToMathML

CONVERTER = LatexToMathML(macros={"softmax": r"\operatorname{softmax}", "sigmoid": r"\operatorname{sigmoid}"})
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    display = found[2] == "["
    math = CONVERTER.convert_with_local_state(html.unescape(found[3]).strip(), displaystyle=display)
    return f'<div class="formula" tabindex="0">{math}</div>' if display else math
