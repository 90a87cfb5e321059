"""Hostile and huge notebooks: nothing runs, nothing leaks, and the page stays small."""

import base64
import json
import re
from html import escape, unescape
from pathlib import Path
from urllib.parse import quote

import nbformat
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from saftnb.publish.prose import render_markdown
from saftnb.publish.sanitise import clean_html
from tests.publish import hostile
from tests.publish.conftest import publish_notebook
from tests.tools.chromium import CHROMIUM, Browser


def words(html: str) -> str:
    main = html.partition("<main>")[2].partition("</main>")[0]
    return unescape(re.sub("<[^>]*>", "", main))


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory, png) -> Path:
    """A page of a notebook that holds every snippet in every place."""
    folder = tmp_path_factory.mktemp("hostile")
    cells = [cell for snippet in hostile.SNIPPETS for cell in hostile.cells(snippet, png)]
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Safe"), *cells]), folder / "notebook.ipynb")
    return publish_notebook(folder / "notebook.ipynb", folder / "page.html")


def test_nothing_of_a_hostile_notebook_can_run_or_load(hostile_page):
    html = hostile_page.read_text()
    assert hostile.offences(html) == []
    assert "are left out" not in html
    assert html.count("<main>") == html.count("</main>") == html.count("</html>") == 1
    inside = html.partition("<main>")[2].partition("</main>")[0]
    used = {name for found in re.findall(r'class="([^"]*)"', inside) for name in found.split()}
    assert used & hostile.LAYOUT <= {"standin"}


def test_the_sanitiser_has_the_last_word():
    safe = clean_html("<p>one</p>", lambda text: text.replace("<p>one", "<script>two()</script><p>three"))
    assert safe == "<p>three</p>"


def test_a_notebook_does_not_speak_as_the_page(page, figure):
    named = dict.fromkeys(["note", "kind", "heading", "seen", "shown"], "disguise")
    html = page(new_markdown_cell("a", metadata=named), new_code_cell("b", metadata=named, outputs=[figure]))
    assert "disguise" not in html


def test_a_title_is_as_safe_as_a_text(page, png):
    for snippet in hostile.SNIPPETS[::6]:
        assert hostile.offences(page(new_markdown_cell(f"# {snippet}"), *hostile.cells(snippet, png)[:1])) == []


def test_the_check_sees_every_kind_of_attack():
    seen = [snippet for snippet in hostile.SNIPPETS if hostile.offences(snippet)]
    assert len(seen) > 40


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*hostile.PARTS, *hostile.SNIPPETS]), min_size=1, max_size=12).map("".join))
def test_no_composition_of_fragments_gets_through(html):
    for safe in (clean_html(html), render_markdown(html), clean_html(f"<table><tr><td>{html}")):
        assert hostile.offences(safe) == []
        assert clean_html(safe).count("<img") == safe.count("<img"), "what is safe stays as it is when parsed again"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_in_a_browser_no_snippet_runs_loads_or_breaks_out(tmp_path: Path, hostile_page):
    browser = Browser(tmp_path / "profile")
    try:
        alone = tmp_path / "alone.html"
        alone.write_text("<!DOCTYPE html><title>x</title>" + hostile.SNIPPETS[5])
        browser.open(alone)
        assert browser.ask("window.pwned") == 1, "without a page of ours a snippet runs"
        out = tmp_path / "page.html"
        # The second lock is taken off: what the sanitiser lets through would run.
        out.write_text(re.sub(r"<meta http-equiv[^>]*>", "", hostile_page.read_text()))
        browser.open(out)
        everything = (
            "document.querySelectorAll(':not([href^=http], [href^=mailto], nav a)')"  # links may lead elsewhere
        )
        browser.ask(everything + ".forEach(e => { e.focus && e.focus(); e.click && e.click(); })")
        assert browser.ask("[typeof window.pwned, document.title, location.protocol]") == ["undefined", "Safe", "file:"]
        assert browser.ask("[...document.body.children].map(e => e.tagName)") == ["HEADER", "MAIN", "FOOTER"]
        assert browser.ask("document.querySelectorAll('script, iframe, object, embed, svg, form').length") == 0
        assert [url for url in browser.requests() if "x.example" in url] == []
    finally:
        browser.close()


PLOTLY = '<div id="a" class="plotly-graph-div"></div><script>Plotly.newPlot( "a", [{"x": [1]}], {}, {})</script>'


@pytest.mark.parametrize(
    ("data", "title"),
    [
        ({"application/vnd.plotly.v1+json": {"data": [], "layout": {"xaxis": {"title": {"text": "step"}},
          "title": {"text": "Gain <b>by</b> ρ"}}}, "text/plain": "Figure({…})"}, "Gain by ρ”, “step"),
        ({"text/html": PLOTLY.replace("{}, {}", '{"xaxis": {"title": "step"}, "title": {"text": "T2"}}, {}')},
         "step”, “T2"),
        ({"text/html": PLOTLY, "text/plain": "<p>"}, ""),
        ({"application/vnd.vegalite.v5+json": {"title": "Bars", "mark": "bar"}, "text/plain": "alt.Chart(…)"}, "Bars"),
        ({"text/html": '<div id="v"></div><script>var spec = {"title": {"text": "V"}}; embed(spec)</script>'}, "V"),
        ({"application/vnd.bokehjs_exec.v0+json": "", "text/html": '<div id="b" data-root-id="p1"></div>',
          "application/javascript": 'const docs_json = {"title": {"type":"object","name":"Title","attributes":'
          '{"text":"Lines \\"1\\""}}}'}, 'Lines "1"'),
        ({"text/html": "<iframe src='https://x.example'></iframe>", "text/plain": "<IPython.IFrame>"}, ""),
        ({"application/javascript": "alert(1)", "text/plain": "<IPython.core.display.Javascript object>"}, ""),
        ({"application/vnd.plotly.v1+json": {"layout": "x"}}, ""),
    ],
)  # fmt: skip
def test_a_line_stands_in_for_what_needs_a_script(shown, data, title):
    html = shown("display_data", data=data)
    said = f" (“{title}”)" if title else ""
    assert words(html := f"<main>{html}").strip() == (
        f"An interactive figure{said}: here it cannot run. It is in the notebook, which JupyterLab opens."
    )
    assert 'class="rich"' not in html


def test_a_picture_in_the_bundle_is_shown_instead_of_a_line(shown, png):
    html = shown("display_data", data={"application/vnd.plotly.v1+json": {}, "text/html": PLOTLY, "image/png": png})
    assert f"base64,{png}" in html
    assert "interactive" not in html


def json_escaped(text: str) -> str:
    """As PHP and others write JSON."""
    return json.dumps(text)[1:-1].replace("/", "\\/")


def small(text: str) -> str:
    """URL-encoded, with small letters in the codes."""
    return re.sub("%..", lambda code: code[0].lower(), quote(text))


SECRET = "s3cr&t/<w>+%ö'=Zq\"9"


@pytest.fixture
def secret(monkeypatch) -> str:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-node-17")
    return SECRET


@pytest.mark.parametrize("write", [str, escape, quote, lambda s: quote(s, safe=""), small, json_escaped],
                         ids=["plain", "html", "url", "url, all", "url, small", "json"])  # fmt: skip
def test_no_form_of_a_secret_is_told(page, png, secret, write):
    told = f"{write(secret)} ~ {write('/home/alice/x')} ~ {write('gpu-node-17')}"
    colours = told[:5] + "\x1b[31m" + told[5:7] + "\x1b[0m" + told[7:]
    entities = "".join(f"&#x{ord(c):x};" for c in secret)
    htmls = [
        f"<p>{told}</p>", f"<table><tr><td>{told}</td><td>1</td></tr></table>", f"<p>{entities}</p>",
        f'<img alt="{escape(told)}" src="data:image/png;base64,{png}">', f'<a href="https://x.example/?k={escape(told)}">x</a>',
        f"<p>{escape(secret[:6])}<b>{escape(secret[6:9])}</b>{escape(secret[9:])}</p>",
        f"<p title='{entities}'>x</p>",
    ]  # fmt: skip
    outputs = [
        new_output("stream", name="stdout", text=colours),
        new_output("stream", name="stderr", text=colours),
        new_output("error", ename=told, evalue=colours, traceback=[colours, told]),
        *(new_output("display_data", data={"text/html": html}) for html in htmls),
        *(new_output("display_data", data={kind: told}) for kind in ("text/plain", "text/markdown", "text/latex")),
        new_output("display_data", data={"image/svg+xml": f"<svg><text>{told}</text></svg>"}),
        new_output("display_data", data={"application/vnd.plotly.v1+json": {"layout": {"title": told}}}),
        new_output("display_data", data={"image/png": png}),
    ]
    html = page(
        new_markdown_cell(f"# About {told}"), new_markdown_cell(f"{told}\n\n| a |\n|---|\n| {told} |\n\n`{told}`"),
        new_code_cell(f"key = '''{told}'''", outputs=outputs, metadata={"alt": told, "key": secret}),
    )  # fmt: skip
    pictures = re.findall(r"data:image/svg\+xml;base64,([^\"]*)", html)
    shown = html + "".join(base64.b64decode(picture).decode() for picture in pictures)
    tagless = re.sub("<[^>]*>", "", html)
    for form in (shown, unescape(shown), unescape(unescape(shown)), unescape(tagless)):
        for hidden in (
            secret,
            escape(secret),
            quote(secret),
            quote(secret, safe=""),
            small(secret),
            json_escaped(secret),
        ):
            assert hidden not in form
        assert "alice" not in form
        assert "gpu-node-17" not in form
    assert f"base64,{png}" in html, "pictures are untouched"


def test_text_that_turns_around_is_seen_and_turns_nothing(page):
    source = 'if access != "user\u202e \u2066// only admins\u2069 \u2066":'
    html = page(
        new_markdown_cell(f"# שלום\n\n&#x202e;abc {source}"),
        new_code_cell(source, outputs=[
            new_output("stream", name="stdout", text=source),
            new_output("display_data", data={"text/html": "<bdo dir=rtl>abc</bdo>&#8238;x<p dir=rtl>مرحبا</p>"}),
        ]),
    )  # fmt: skip
    assert not re.search("[\u202a-\u202e\u2066-\u2069]|&#(?:x202e|8238)|<bdo", html)
    assert html.count("[U+202E]") == 5
    assert "[U+2066]// only admins[U+2069]" in words(html)
    assert '<h1 dir="auto">שלום</h1>' in html
    assert '<section class="prose" dir="auto">' in html
    assert '<p dir="rtl">مرحبا</p>' in html


def large(kind: str, png: str) -> list:
    if kind == "stream":
        return [new_code_cell("x", outputs=[new_output("stream", name="stdout", text="line of text\n" * 500_000)])]
    if kind == "line":
        texts = ["x" * 10_000_000, "/tmp/" * 200_000, "\x1b[3" * 300_000, "5%|" * 300_000]
        return [
            new_code_cell(
                "x", outputs=[new_output("stream", name=n, text=t) for t in texts for n in ("stdout", "stderr")]
            )
        ]
    if kind == "table":
        frame = pd.DataFrame({"a": range(20_000), "b": "word"})
        return [new_code_cell("x", outputs=[new_output("display_data", data={"text/html": frame.to_html()})])]
    if kind == "wide":
        data = {"text/html": f"<table><tr>{'<td>1</td>' * 200_000}</tr></table>", "text/plain": "a wide table"}
        return [new_code_cell("x", outputs=[new_output("display_data", data=data)])]
    if kind == "deep":
        data = {"text/html": "<div>" * 2_000 + "inside", "text/plain": "a deep thing"}
        return [
            new_code_cell("x", outputs=[new_output("display_data", data=data)]),
            new_markdown_cell("<div>" * 200_000),
        ]
    if kind == "outputs":
        return [new_code_cell("x", outputs=[new_output("stream", text=f"output {i}.") for i in range(1_000)])]
    if kind == "drawing":
        uses = [f"<use href='#a{i + 1}'/>" * 10 for i in range(9)]
        nest = "".join(f"<g id='a{i}'>{inner}</g>" for i, inner in enumerate(uses))
        drawing = f"<svg xmlns='http://www.w3.org/2000/svg'>{nest}<g id='a9'><rect/></g></svg>"
        url = f"data:image/svg+xml;base64,{base64.b64encode(drawing.encode()).decode()}"
        datas = ({"image/svg+xml": drawing}, {"text/html": f'<img alt="x" src="{url}">'})
        return [new_code_cell("x", outputs=[new_output("display_data", data=data) for data in datas])]
    if kind == "lines":
        return [new_code_cell("x", outputs=[new_output("stream", name="stdout", text="a" + "\n" * 5_000_000 + "b")])]
    if kind == "spaces":
        return [new_markdown_cell("a" + " " * 19_000 + "b")]
    if kind == "title":
        return [new_markdown_cell("# " + "Very " * 3_000)]
    if kind == "prose":
        return [new_markdown_cell("**word** " * 5_000), new_code_cell("a = 1\n" * 200_000)]
    figure = new_output(
        "display_data", data={"image/png": base64.b64encode(base64.b64decode(png) + bytes(60_000)).decode()}
    )
    return [new_code_cell(f"draw({i})", outputs=[figure], id=f"c{i}") for i in range(400)]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("stream", r"… 499,\d{3} lines left out …"),
        ("line", r"characters left out …"),
        ("table", r"HTML of \d,\d{3},\d{3} characters is too large for this page"),
        ("wide", r"HTML of 2,000,0\d\d characters is too large for this page.*a wide table"),
        ("deep", r"x\s+a deep thing"),
        ("outputs", r"output 0\..*output 999\."),
        ("prose", r"\*\*word\*\* .*… 199,\d{3} lines left out …"),
        ("drawing", r"A picture is too large for this page"),
        ("lines", r"… 4,999,\d{3} lines left out …"),
        ("spaces", r"a {1,100}b"),
        ("title", ""),
        ("figures", r"From here on, what is large is left out"),
    ],
)
def test_a_page_stays_small_and_says_what_is_left_out(page, png, kind, told):
    html = page(*large(kind, png))
    assert re.search(told, words(html), re.DOTALL)
    assert len(html) < 21e6
    assert html.count("<") < 100_000
    assert kind == "figures" or len(html) < 1_000_000
    assert len(max(re.findall(r"<(?:title|h1)[^>]*>(.*?)</", html))) < 250
    assert "svg+xml" not in html


def test_a_drawing_of_many_marks_is_shown(shown):
    """As matplotlib draws a scatter: one shape, named once and used for each point."""
    points = "".join(f"<use xlink:href='#m' x='{i}' clip-path='url(#c)'/>" for i in range(20_000))
    drawing = (
        "<svg xmlns='http://www.w3.org/2000/svg' xmlns:xlink='http://www.w3.org/1999/xlink'><defs>"
        f"<path id='m'/><clipPath id='c'><rect/></clipPath></defs>{points}</svg>"
    )
    assert base64.b64encode(drawing.encode()).decode() in shown("display_data", data={"image/svg+xml": drawing})


def test_of_a_very_long_text_no_half_of_a_secret_is_left(shown, secret):
    for before in (199_990, 200_000 - len(secret) // 2, 200_000 - 3):
        text = "y" * before + secret + "z" * 300_000
        html = unescape(shown("stream", name="stdout", text=text) + shown("stream", name="stdout", text=text[::-1]))
        for half in (secret[:4], secret[-4:], secret[::-1][:4], secret[::-1][-4:]):
            assert half not in html
