r"""One spelling for the many ways of writing mathematics: Unicode, LaTeX, Markdown.

``plain("３½ ≤ \dfrac{x}{2}")`` is ``3\frac{1}{2} \le \frac{x}{2}``. What it returns is still LaTeX,
with fewer commands: one fraction, one text command, one sign for each relation, no spacing.
"""

from __future__ import annotations

import re
import unicodedata

_SIGNS = {
    "−": "-", "﹣": "-", "－": "-", "‐": "-", "‑": "-", "×": r"*", "⋅": "*", "·": "*", "∙": "*",
    "÷": "/", "⁄": "/", "∕": "/", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "∜": r"\sqrt[4] ",
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ",
    "≠": r"\ne ", "≡": r"\equiv ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ",
    "∅": r"\emptyset ", "∈": r"\in ", "°": r"\deg ", "º": r"\deg ", "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "≈": r"\approx ",
    "′": "'", "’": "'", "“": '"', "”": '"', "，": ", ", "；": "; ", "：": ": ", "（": "(",
    "）": ")", "、": ", ", "\u00a0": " ", "\u202f": r"\,", "\u2009": r"\,", "\u2062": "", "⟨": "(",
    "⟩": ")",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\epsilon ",
    "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ", "ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau ",
    "φ": r"\phi ", "ω": r"\omega ", "Δ": r"\Delta ", "Ω": r"\Omega ", "∨": r"\lor ",
    "∴": r"\therefore ", "⇒": r"\Rightarrow ",
}  # fmt: skip
_SUPER, _SUB = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋"
_RAISED = str.maketrans(_SUPER + _SUB, "0123456789+-n" + "0123456789+-")
_WRITTEN = str.maketrans(_SIGNS)
_SAME = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "leqslant": "le", "geq": "ge",
    "geqslant": "ge", "neq": "ne", "lt": "<", "gt": ">", "times": "*", "cdot": "*", "ast": "*",
    "div": "/", "vert": "|", "mid": "|", "langle": "(", "rangle": ")",
    "lbrack": "[", "rbrack": "]", "lbrace": r"\{", "rbrace": r"\}", "varnothing": "emptyset",
    "degree": "deg", "vee": "lor", "wedge": "land", "mod": "bmod", "mathbf": "text", "bf": "",
    "textbf": "text", "textit": "text", "textrm": "text", "texttt": "text", "textsf": "text",
    "textnormal": "text", "emph": "text", "mbox": "text", "mathrm": "text", "mathit": "text",
    "mathsf": "text", "boldsymbol": "text", "bm": "text", "operatorname": "text", "ce": "text",
    "rm": "", "displaystyle": "", "textstyle": "", "left": "", "right": "", "limits": "",
    "big": "",    "Big": "", "bigl": "", "bigr": "", "Bigl": "", "Bigr": "", "bigg": "", "Bigg": "",
    "quad": " ", "qquad": " ", "thinspace": " ", "space": " ", "varepsilon": "epsilon",
    "varphi": "phi", "cosec": "csc", "arcsin": "asin", "arccos": "acos", "arctan": "atan",
    "lg": "log", "implies": "Rightarrow", "textdegree": "deg", "textdollar": "¤",
}  # fmt: skip
_COMMAND = re.compile(r"\\([A-Za-z]+) ?")
_SPACING = re.compile(r"(?<!\\)((?:\\\\)*)(?:\\[!,:; ]|~|\\\n)")
_LETTER_IN_TEXT = re.compile(r"\\text\s*\{\s*([A-Za-z])\s*\}")
_BOLD = re.compile(r"(?<![\w*])(\*\*|__|`+)(?=\S)(.+?)(?<=\S)\1(?![\w*])")
_THOUSANDS = re.compile(
    r"(?<![\d.,])(\d{1,3})((?:(?:\\,|\{,\}|\\ |~|\u202f|,\\!|\\;|\\:)\d{3})+)(?!\d)"
)
_OVER = re.compile(r"\{([^{}]*?)\s*\\(over|choose)\b\s*([^{}]*)\}")
_FUNCTION = re.compile(  # \operatorname{arsinh} and its like are not known
    r"\\text\s*\{\s*(sin|cos|tan|cot|sec|csc|asin|acos|atan|sinh|cosh|tanh|ln|log|exp)\s*\}"
)
_WRAPPED = re.compile(r"\\text\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_ROWS = re.compile(r"\\begin\s*\{(aligned|align\*?|gathered|split)\}(.*?)\\end\s*\{\1\}", re.DOTALL)
_APART = re.compile(r"\\q?quad\s*(?=[A-Za-z](?:_\{?\w\}?)?\s*=|\\text\s*\{\s*(?:and|or))")
_DELIMITER = re.compile(r"(?<!\\)\$\$|(?<!\\)\$|\\[()\[\]]")
_CLOSES = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}


def _unicode(text: str) -> str:
    made: list[str] = []
    kind = ""
    for char in text:
        now = "^" if char in _SUPER else "_" if char in _SUB else ""
        if kind and now != kind:
            made.append("}")
        if now and now != kind:
            made.append(now + "{")
        kind = now
        if now:
            made.append(char.translate(_RAISED))
        elif char.isascii() or char in _SIGNS:
            made.append(char)
        elif "VULGAR FRACTION" in unicodedata.name(char, ""):
            over, _, under = unicodedata.normalize("NFKC", char).partition("⁄")
            made.append(rf"\frac{{{over}}}{{{under}}}" if under else char)
        elif unicodedata.category(char) == "So" or char == "\ufe0f":
            continue  # a tick, a smile
        elif char.isdecimal():
            made.append(str(unicodedata.decimal(char)))
        else:
            made.append(unicodedata.normalize("NFKC", char))
    return ("".join(made) + ("}" if kind else "")).translate(_WRITTEN)


def _command(match: re.Match[str]) -> str:
    name = match.group(1)
    same = _SAME.get(name, name)
    if same and same[0].isalpha():
        return f"\\{same} "
    return same


def segments(text: str) -> list[tuple[int, int, str]]:
    r"""Where ``$..$``, ``$$..$$``, ``\(..\)`` and ``\[..\]`` stand, and what is inside.

    A dollar before a number may be money: ``$5`` closes no formula, and ``$5 and $6`` is none.
    """
    found: list[tuple[int, int, str]] = []
    opened: re.Match[str] | None = None
    for match in _DELIMITER.finditer(text):
        sign, digit = match.group(), text[match.end() : match.end() + 1].isdigit()
        if opened is not None and sign == _CLOSES[opened.group()]:
            if sign == "$" and digit:
                opened = match  # the price before it was none either
                continue
            inside = text[opened.end() : match.start()]
            if inside.strip():
                found.append((opened.start(), match.end(), inside))
            opened = None
        elif opened is None and sign in _CLOSES:
            opened = match
    return found


def plain(text: str) -> str:
    """A text in one spelling; see the module. Delimiters of formulas and emphasis are gone."""
    if not text.isascii():
        text = re.sub(r"^\s*[–—](?=\s*\d)", "-", text)
        text = _unicode(text)
    text = text.strip()
    if text.isalnum():
        return text
    text = _BOLD.sub(r"\2", text)
    if "\\" in text or "$" in text or "~" in text or "{" in text:
        text = _latex(text)
    text = text.replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ")
    text = re.sub(r"(?<=[\w)}])\s*\*\*\s*(?=[\w({-])", "^", text)
    text = re.sub(r"(?<=\d) ?[xX] ?(?=10 ?\^)", "*", text)
    return re.sub(r"\s+", " ", text).strip()


def _unwrapped(match: re.Match[str]) -> str:
    r"""\textbf{3\frac{1}{2}} is a formula, \text{3 apples} are words."""
    return match[1] if re.search(r"[\\^=+*<>{]", match[1]) else match[0]


def _over(match: re.Match[str]) -> str:
    name = "frac" if match[2] == "over" else "binom"
    return f"\\{name}{{{match[1]}}}{{{match[3]}}}"


def _latex(text: str) -> str:
    text = text.replace(r"\$", "¤")
    parts, at = [], 0
    for begin, end, inside in segments(text):
        parts += [text[at:begin], " ", inside, " "]
        at = end
    text = "".join((*parts, text[at:])).strip()
    text = text.replace("$", "¤")
    text = _THOUSANDS.sub(lambda m: m.group(1) + re.sub(r"\D", "", m.group(2)), text)
    text = _ROWS.sub(lambda m: re.sub(r"\\\\", " , ", m[2].replace("&", "")), text)
    text = _APART.sub(" , ", text)
    text = text.replace("{,}", ",").replace(r"\%", "%").replace(r"\#", "#").replace(r"\&", "&")
    text = _SPACING.sub(r"\1 ", text)
    text = re.sub(r"\^\s*\{?\s*\\(?:circ|degree)\b\s*\}?", r"\\deg ", text)
    text = re.sub(r"\\left\s*\|", r"\\lvert ", re.sub(r"\\right\s*\|", r"\\rvert ", text))
    text = _COMMAND.sub(_command, text)
    text = _FUNCTION.sub(r"\\\1 ", text)
    text = re.sub(r"\^\s*\{?\s*\\prime\s*\}?", "'", text)
    for _ in range(4):
        text, changed = _OVER.subn(_over, text)
        if not changed:
            break
    text = _WRAPPED.sub(_unwrapped, re.sub(r"\\text\s*\{\s*\}", "", text))
    text = re.sub(r"\\text\s*\{\s*([A-Za-z]{1,3})\s*\}(?=\s*_)", r"\1", text)
    return _LETTER_IN_TEXT.sub(r" \1", text)
