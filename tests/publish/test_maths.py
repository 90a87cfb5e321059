"""Formulas become MathML that is well formed, says what the LaTeX says, and can do no harm."""

import re
from itertools import pairwise
from xml.etree.ElementTree import Element, fromstring

import pytest

from saftnb.publish.maths import ATTRIBUTES, ELEMENTS, to_mathml

FORMULAS = [
    r"\hat\theta = \theta_0 + \lambda \sum_{t=1}^{T} \tau_t",
    r"\min_w \max_{\|\epsilon\|_2 \le \rho} L(w + \epsilon)",
    r"\hat\epsilon = \rho\,\frac{T_w^2 \nabla L(w)}{\lVert T_w \nabla L(w) \rVert_2}",
    r"\left[\Delta W_1 \cdots \Delta W_n\right] = U \Sigma V^\top",
    r"\operatorname{sign}(\tau) \odot |\tau|",
    r"\begin{aligned} a &= b \\ c &= d \end{aligned}",
    r"\begin{cases} 1 & x > 0 \\ 0 & \text{otherwise} \end{cases}",
    r"\mathbb{E}_{x \sim \mathcal{D}} \log p(y \mid x)",
    r"\boldsymbol{\theta} \in \mathbb{R}^d",
    r"a = b \\ c = d",
]


def parsed(mathml: str) -> Element:
    """Raises where it is not well formed."""
    return fromstring(mathml.replace("&ApplyFunction;", ""))


def words(mathml: str) -> str:
    return "".join(parsed(mathml).itertext())


@pytest.mark.parametrize("display", [False, True])
@pytest.mark.parametrize("latex", FORMULAS)
def test_a_formula_is_mathml_of_known_elements_only(latex, display):
    mathml = to_mathml(latex, display=display)
    root = parsed(mathml)
    assert root.tag == "math"
    assert root.get("display") == ("block" if display else None)
    assert root.get("alttext") == latex
    for element in root.iter():
        assert element.tag in ELEMENTS
        assert set(element.attrib) <= ATTRIBUTES | {"style"}
        assert "\\" not in (element.text or "")
        assert "&" not in (element.text or "")


def test_letters_keep_their_alphabet_without_attributes():
    assert words(to_mathml(r"\boldsymbol{\theta}")) == "𝜽"
    assert words(to_mathml(r"\mathbf{AB1}")) == "𝐀𝐁𝟏"
    assert words(to_mathml(r"\boldsymbol{\Omega}\boldsymbol{\epsilon}")) == "𝛀𝝐"
    assert words(to_mathml(r"\mathit{hi}")) == "ℎ𝑖"
    assert words(to_mathml(r"\mathbb{E}\mathcal{D}")).rstrip("\ufe00") == "𝔼𝒟"


def test_upright_words_are_one_identifier():
    (word,) = parsed(to_mathml(r"\mathrm{SAM}")).iter("mi")
    assert word.text == "SAM"


def test_limits_stand_below_in_display_and_beside_in_text():
    assert "<munder>" in to_mathml(r"\max_x f", display=True)
    assert "<msub>" in to_mathml(r"\max_x f")
    assert "<munder>" in to_mathml(r"\operatorname*{arg\,max}_x f", display=True)
    assert "<munderover>" in to_mathml(r"\sum_{t=1}^T \tau_t", display=True)


def test_aligned_rows_are_a_table_aligned_at_the_sign():
    for name in ("align", "align*", "aligned", "split", "eqnarray"):
        math = to_mathml(rf"\begin{{{name}}} a &= b \label{{x}} \\ cc &= d \end{{{name}}}", display=True)
        styles = [cell.get("style", "") for cell in parsed(math).iter("mtd")]
        assert ["text-align: right" in style for style in styles] == [True, False] * 2
        assert "(1)" not in math, "no equation is numbered"


def test_rows_that_no_environment_holds_stand_below_one_another():
    for latex in (r"a \\ b", r"\begin{gather} a \\ b \end{gather}", r"\begin{multline*} a \\ b \end{multline*}"):
        assert to_mathml(latex, display=True).count("<mtr>") == 2
    assert "<mtable" not in to_mathml(r"\begin{equation} a \end{equation}", display=True)


def test_a_norm_has_two_sides():
    signs = parsed(to_mathml(r"x + \lVert w \rVert_2")).iter("mo")
    bars = [(sign.get("form"), sign.get("stretchy")) for sign in signs if sign.text == "‖"]
    assert bars == [("prefix", "false"), ("postfix", "false")]


@pytest.mark.parametrize(
    "latex", [r"\frac{a}{", r"\unknowncommand{x}", "", r"\begin{tikz}x\end{tikz}", "a & b", "x" * 6000, "{" * 5000]
)
def test_what_cannot_be_converted_is_shown_as_its_source(latex):
    html = to_mathml(latex, display=True)
    assert html.startswith('<code class="tex display">')
    assert latex.replace("&", "&amp;") in html


def test_macros_that_multiply_do_not_hang():
    names = ["x", *(f"z{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    bombs = [rf"\newcommand{{\{name}}}{{\{inner}\{inner}}}" for inner, name in pairwise(names)]
    assert to_mathml("".join(bombs) + rf"\{names[-1]}").startswith("<code")
    assert to_mathml(r"\newcommand{\x}[1]{\x{#1#1}}\x{a}").startswith("<code")
    assert to_mathml(r"\def\x#1{\x{#1#1}}\x{a}").startswith("<code")
    assert to_mathml(r"\providecommand{\x}[1]{\x{#1#1}}\x{a}").startswith("<code")
    deep = [
        r"\def\a{" + r"\sqrt" * 20 + r"}\def\b{" + r"\a" * 20 + "}" + r"\b" * 20 + "1",
        r"\def\a{" + r"\sqrt" * 80 + "}" + r"\a" * 200 + "1",
    ]  # would overflow the parser's stack
    assert [to_mathml(latex)[:5] for latex in deep] == ["<code"] * 2
    for name in ("R", "mine"):
        assert words(to_mathml(rf"\newcommand{{\{name}}}{{\mathbb{{Q}}}} \{name}")) == "ℚ"


@pytest.mark.parametrize(
    "latex",
    [
        r"\href{javascript:alert(1)}{x}",
        r"\style{background:url(https://x.example)}{x}",
        r"\text{&lt;script&gt;alert(1)&lt;/script&gt;}",
        r"\text{<img src=x onerror=alert(1)>}",
        "<script>alert(1)</script>",
        r"\frac{<script>alert(1)</script>}{",
        r'\text{" onload="alert(1)}',
    ],
)
def test_a_formula_cannot_carry_html(latex):
    html = to_mathml(latex)
    inside = re.sub(r'alttext="[^"]*"', "", html)
    assert not re.search(r"<(?!/?(?:math|m\w+|code)\b)", inside)
    assert not re.search(r"<[^>]*\b(?:href|onload|onerror|class=\"(?!tex)|url)", inside)
