r"""LaTeX to MathML, which browsers draw without a script and without the network.

latex2mathml does the parsing. What it writes is then put right for MathML Core, the part of
MathML that Chromium, Firefox and Safari share: letters take their bold or calligraphic Unicode
code points (Core knows no `mathvariant="bold"`), columns are aligned by CSS, words such as
*sign* get the spacing of a function. Only listed elements and attributes are kept, so a
formula of an untrusted notebook (`\href{javascript:...}`) cannot smuggle anything in.
"""

import html
import re
from xml.etree.ElementTree import Element, SubElement, tostring

from latex2mathml import commands
from latex2mathml.converter import convert_to_element

# fmt: off
ELEMENTS = {
    "math", "mi", "mn", "mo", "mtext", "mspace", "mrow", "mfrac", "msqrt", "mroot", "mstyle", "mpadded",
    "mphantom", "msub", "msup", "msubsup", "munder", "mover", "munderover", "mtable", "mtr", "mtd",
}
ATTRIBUTES = {
    "display", "accent", "accentunder", "stretchy", "fence", "form", "separator", "largeop", "movablelimits",
    "symmetric", "lspace", "rspace", "minsize", "maxsize", "width", "height", "depth", "voffset",
    "linethickness", "displaystyle", "scriptlevel",
}
# Environments latex2mathml does not lay out, and one that it does in their place.
ENVIRONMENTS = {
    "equation": None, "equation*": None, "aligned": "align*", "align": "align*", "eqnarray": "align*",
    "alignat*": "align*", "gather": "array", "gather*": "array", "gathered": "array", "multline": "array",
    "multline*": "array",
}
# fmt: on
PLAIN_VALUE = re.compile(r"[\w.+\-% ]*")
LIMITS = {"max", "min", "sup", "inf", "lim", "argmax", "argmin", "arg max", "arg min"}
OPERATOR_SIGNS = {"~": "∼", "±": "±", "∓": "∓"}
# First code points of the mathematical alphabets: capitals, small letters, digits.
ALPHABETS = {
    "bold": (0x1D400, 0x1D41A, 0x1D7CE),
    "italic": (0x1D434, 0x1D44E, None),
    "bold-italic": (0x1D468, 0x1D482, None),
    "sans-serif": (0x1D5A0, 0x1D5BA, 0x1D7E2),
    "monospace": (0x1D670, 0x1D68A, 0x1D7F6),
}
GREEK = {"bold": (0x1D6A8, 0x1D6C2), "bold-italic": (0x1D71C, 0x1D736)}
GREEK_VARIANTS = "∂ϵϑϰϕϱϖ"
WORD = re.compile(r"[A-Za-z]{2}")
LONGEST = 5000


class NotConverted(ValueError):
    """The formula has something that latex2mathml does not know."""


def to_mathml(latex: str, *, display: bool = False) -> str:
    r"""A formula (without its dollar signs) as a `<math>` element.

    A formula that cannot be converted comes back as its LaTeX source in `<code>`: a report is
    never lost to a formula. The source also stays in `alttext`, for screen readers and for search.
    """
    try:
        root = _convert(latex, display)
    except Exception:  # latex2mathml raises many kinds, IndexError and RecursionError among them
        source = html.escape(latex.strip())
        return f'<code class="tex{" display" if display else ""}">{source}</code>'
    root.set("alttext", " ".join(latex.split()))
    return tostring(root, encoding="unicode")


def _convert(latex: str, display: bool) -> Element:
    if len(latex) > LONGEST:
        raise NotConverted("too long for a formula")
    if "#" in latex and re.search(r"\\(?:new|def)", latex):
        raise NotConverted("a macro with an argument can double it at each of its hundred calls of itself")
    return _tidy(convert_to_element(_prepare(latex), display="block" if display else "inline"), display)


def _prepare(latex: str) -> str:
    """Rewrite what latex2mathml does not read into what it does."""

    def environment(match: re.Match[str]) -> str:
        edge, name = match.groups()
        if name not in ENVIRONMENTS:
            if f"\\{name}" not in commands.MATRICES:
                raise NotConverted(f"unknown environment {name}")
            return match[0]
        other = ENVIRONMENTS[name]
        columns = "{c}" if other == "array" and edge == "begin" else ""
        return f"\\{edge}{{{other}}}{columns}" if other else ""

    latex = re.sub(r"\\(?:label\{[^}]*\}|nonumber\b|notag\b)", "", latex.strip())
    latex = re.sub(r"\\(begin|end)\{([A-Za-z]+\*?)\}", environment, latex)
    latex = re.sub(r"\\mathop\{\\(?:mathrm|text)\{([^{}]*)\}\}", r"\\operatorname{\1}", latex)
    latex = re.sub(
        r"\\operatorname\*?\{([^{}]*)\}",
        lambda word: "\\operatorname{" + re.sub(r"\\[,;: ]|~", " ", word[1]) + "}",
        latex,
    )
    loose = _loose_breaks(latex)
    if "\\\\" in loose:
        name, columns = ("align*", "") if "&" in loose else ("array", "{c}")
        latex = f"\\begin{{{name}}}{columns}{latex}\\end{{{name}}}"
    return latex


def _loose_breaks(latex: str) -> set[str]:
    r"""Which of `\\` and `&` stand outside of every brace and environment."""
    depth, found = 0, set()
    for token in re.findall(r"\\begin\{[A-Za-z]+\*?\}|\\end\{[A-Za-z]+\*?\}|\\.|[{}&]", latex, re.DOTALL):
        if token == "{" or token.startswith("\\begin"):
            depth += 1
        elif token == "}" or token.startswith("\\end"):
            depth -= 1
        elif depth == 0:
            found.add(token)
    return found


def _tidy(element: Element, display: bool, close_columns: bool = False) -> Element:
    """A clean copy of one element and what is inside it."""
    if element.tag not in ELEMENTS:
        raise NotConverted(f"unknown element {element.tag}")
    text = html.unescape(element.text or "")
    if element.text == "&" or (element.tag != "mtext" and text.startswith("\\") and len(text) > 1):
        raise NotConverted(f"unknown command {text}")
    kept = {k: v for k, v in element.items() if k in ATTRIBUTES and PLAIN_VALUE.fullmatch(v)}
    copy = Element("mrow" if element.tag == "mo" and len(element) else element.tag, kept)
    copy.text = text
    _style(copy, element, close_columns)
    close_columns = close_columns or "columnspacing" in element.attrib
    copy.extend(_tidy(child, display, close_columns) for child in element)
    _space(copy)
    _join_letters(copy)
    if display and copy.tag in ("msub", "msubsup", "msup") and copy[0].text in LIMITS:
        copy.tag = {"msub": "munder", "msup": "mover", "msubsup": "munderover"}[copy.tag]
    return copy


def _style(copy: Element, element: Element, close_columns: bool) -> None:
    """Alphabets and column alignment, which MathML Core has no attributes for."""
    variant = element.get("mathvariant", "")
    if variant == "normal":
        copy.set("mathvariant", "normal")
    elif element.tag == "mtext" and variant:
        weight = {"bold": "font-weight:bold", "italic": "font-style:italic"}
        copy.set("style", weight.get(variant, f"font-family:{variant}"))
    elif variant:
        copy.text = "".join(_letter(character, variant) for character in copy.text or "")
    side = element.get("columnalign", "")
    if side in ("left", "right", "center"):
        # Firefox reads columnalign; Chromium takes "right" for its block children with a prefix only.
        align = f"text-align:{side}" + (";text-align:-webkit-right" if side == "right" else "")
        closed = f";padding-{side}:0" if close_columns and side != "center" else ""
        copy.set("columnalign", side)
        copy.set("style", align + closed)


def _letter(character: str, variant: str) -> str:
    """The code point of a letter in one of the mathematical alphabets."""
    if variant in GREEK:
        capitals, small = GREEK[variant]
        if "Α" <= character <= "Ω":
            return chr(capitals + ord(character) - ord("Α"))
        if "α" <= character <= "ω":
            return chr(small + ord(character) - ord("α"))
        if character in GREEK_VARIANTS:
            return chr(small + 25 + GREEK_VARIANTS.index(character))
    capitals, small, digits = ALPHABETS.get(variant, (None, None, None))
    for first, start in (("A", capitals), ("a", small), ("0", digits)):
        size = 10 if first == "0" else 26
        if start and 0 <= ord(character) - ord(first) < size:
            if start + ord(character) - ord(first) == 0x1D455:
                return "ℎ"  # Unicode left this place of the italic alphabet empty
            return chr(start + ord(character) - ord(first))
    return character


def _space(row: Element) -> None:
    """Spacing of function words, bars and the comma in 1{,}000."""
    cores = [_core(child) for child in row]
    for position, core in enumerate(cores):
        word = core.text or ""
        if core.tag == "mi" and word in OPERATOR_SIGNS:
            core.tag, core.text = "mo", OPERATOR_SIGNS[word]
        elif core.tag in ("mo", "mi") and WORD.match(word) and "mathvariant" not in core.attrib:
            following = _core(row[position + 1]).text if position + 1 < len(row) else ""
            core.tag = "mo"
            before = cores[position - 1] if position else None
            touching = before is None or (before.tag == "mo" and before.text not in (")", "]", "}"))
            core.set("lspace", "0" if touching else "0.167em")
            core.set("rspace", "0" if following in ("(", "[", "{") else "0.167em")
    for bar in "|‖":
        bars = [core for core in cores if core.tag == "mo" and core.text == bar and "form" not in core.attrib]
        for position, core in enumerate(bars if len(bars) % 2 == 0 else []):
            core.set("form", "postfix" if position % 2 else "prefix")  # one alone is "given", as in p(y|x)
            core.set("fence", "true")
            core.attrib.setdefault("stretchy", "false")  # else one with a subscript has another height
    if len(row) == 1 and row.tag == "mrow" and row[0].text == ",":
        row[0].set("lspace", "0")
        row[0].set("rspace", "0")


def _core(element: Element) -> Element:
    """What carries the spacing: the base of a script, else the element itself."""
    scripted = element.tag in ("msub", "msup", "msubsup", "munder", "mover", "munderover")
    return element[0] if scripted and len(element) else element


def _join_letters(row: Element) -> None:
    r"""One `<mi>` for the upright letters of `\mathrm{SAM}`, which come one by one."""
    letters = [child.text or "" for child in row]
    if (
        row.tag == "mrow"
        and len(letters) > 1
        and all(child.tag == "mi" and child.get("mathvariant") == "normal" for child in row)
    ):
        row[:] = []
        SubElement(row, "mi", mathvariant="normal").text = "".join(letters)
