r"""LaTeX to MathML Core, which browsers draw without a script and without the network: math-core does the work."""

import re
from html import escape

from math_core import LatexError, LatexToMathML

ELEMENTS = {
    "math", "mi", "mn", "mo", "mtext", "mspace", "mrow", "mfrac", "msqrt", "mroot", "mpadded", "mphantom",
    "msub", "msup", "msubsup", "munder", "mover", "munderover", "mmultiscripts", "mprescripts", "mtable", "mtr", "mtd",
}  # fmt: skip
ATTRIBUTES = {
    "display", "displaystyle", "scriptlevel", "mathvariant", "accent", "accentunder", "stretchy", "fence", "form",
    "separator", "largeop", "movablelimits", "symmetric", "lspace", "rspace", "minsize", "maxsize", "width", "height",
    "linethickness", "alttext",
}  # fmt: skip
# Notebooks number no equation; and environments that math-core knows by another name.
ENVIRONMENTS = {
    "equation": "", "align": "aligned", "eqnarray": "aligned", "split": "aligned", "alignat": "aligned",
    "gather": "gathered", "multline": "gathered",
}  # fmt: skip
EDGE = re.compile(rf"\\(begin|end)\{{({'|'.join(ENVIRONMENTS)})\*?\}}(?:\{{\d+\}})?")
LABEL = re.compile(r"\\(?:label|tag\*?)\{[^}]*\}")
DEFINED = re.compile(r"\\newcommand\s*\{?(\\[A-Za-z]+)\}?")  # maybe again: math-core knows more commands than others
# Nesting as deep as so many characters and expansions can make it fits the parser into half of a usual stack.
LONGEST = 1000
_convert = LatexToMathML(fancy_error=False, macros={"mbox": r"\text{#1}"}, max_expansions=10).convert_with_local_state


def to_mathml(latex: str, *, display: bool = False) -> str:
    r"""A formula (without its dollar signs) as a `<math>` element, its source in `alttext` for screen readers.

    What math-core does not know comes back as LaTeX in `<code>`: a report is never lost to a formula. So does a macro
    with an argument, which can double it at each call of itself.
    """
    try:
        if not latex.strip() or len(latex) > LONGEST or ("#" in latex and re.search(r"\\\w*(?:command|def)", latex)):
            raise LatexError
        source = EDGE.sub(lambda of: (to := ENVIRONMENTS[of[2]]) and f"\\{of[1]}{{{to}}}", LABEL.sub("", latex.strip()))
        source = DEFINED.sub(r"\\providecommand{\1}{}\\renewcommand{\1}", source)
        if display and "\\\\" in source and "\\begin" not in source:
            source = rf"\begin{{aligned}}{source}\end{{aligned}}"
        math = _convert(source, displaystyle=display)
    except LatexError:
        return f'<code class="tex{" display" if display else ""}">{escape(latex.strip())}</code>'
    return math.replace("<math", f'<math alttext="{escape(" ".join(latex.split()))}"', 1)
