"""The pages in a real Chromium without a network: nothing is asked for, nothing complains, all is seen."""

import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from saftnb.publish import publish_runs
from tests.publish.conftest import adding, publish_notebook
from tests.tools.chromium import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

FIGURES = """[...document.images].map(i => {
    return {alt: i.alt, natural: i.naturalWidth, shown: i.getBoundingClientRect().width};
})"""
FORMULAS = """[...document.querySelectorAll("math")].map(m => {
    const box = m.getBoundingClientRect();
    return {width: box.width, height: box.height, kind: m.namespaceURI};
})"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
CONTRAST = """(() => {
    const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = rgb => { const [r, g, b] = rgb.map(channel); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const read = css => (css.match(/[\\d.]+/g) || []).map(Number);
    const behind = e => {
        for (; e; e = e.parentElement) {
            const c = read(getComputedStyle(e).backgroundColor);
            if (c.length === 3 || c[3] > 0) return c.slice(0, 3);
        }
        return [255, 255, 255];
    };
    const found = [];
    const texts = "p, td, th, h1, h2, a, dt, dd, pre, summary, small, b, .status, mi";
    for (const e of document.querySelectorAll(texts))
        if (e.textContent.trim() && e.getClientRects().length) {
            const [a, b] = [light(read(getComputedStyle(e).color).slice(0, 3)), light(behind(e))];
            found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 80)]);
        }
    return found.sort((x, y) => x[0] - y[0])[0];
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def report(add_run, runs, headline, tmp_path) -> Path:
    """The folder of a report with a wide table, a sweep and a failed run."""
    wide = {"columns": ["method", *(f"task_{i}" for i in range(12))], "data": [["ties", *[0.5] * 12]]}
    add_run("01_saft-a", results={"headline": headline, "gain": 0.05})
    add_run("02_wide-a", results={"headline": wide})
    for rho in (0.1, 0.2):
        add_run(f"03_rho-{rho}", overrides={"rho": rho}, results={"headline": headline})
    add_run("04_bad-a", status="failed", reason="ValueError: " + "a very long reason " * 15)
    return publish_runs(runs, tmp_path / "report").parent


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("name", ["index", "01_saft-a", "04_bad-a"])
def test_a_report_opens_without_network_and_shows_everything(browser, report, name, width, scheme):
    browser.open(report / f"{name}.html", width=width, scheme=scheme)
    assert browser.complaints() == []
    assert browser.requests() == []
    figures = browser.ask(FIGURES)
    assert figures
    for figure in figures:
        assert figure["alt"]
        assert figure["natural"] == 40
        assert figure["shown"] > 10
    formulas = browser.ask(FORMULAS)
    assert formulas
    for formula in formulas:
        assert formula["kind"] == "http://www.w3.org/1998/Math/MathML"
        assert min(formula["width"], formula["height"]) > 3
    assert browser.ask(OVERFLOW) <= 0, "the page itself does not scroll sideways"
    ratio, where = browser.ask(CONTRAST)
    assert ratio >= 4.5, where


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_a_notebook_coloured_is_read_on_light_and_on_dark_pages(browser, page, tmp_path, scheme):
    """pandas's colours are chosen for a light page, and say only half: a background, or a colour of text."""
    table = pd.DataFrame({"task": ["a", "b"], "merged": [0.7, 0.75]}).style.highlight_max(color="#ffe3b3").to_html()
    inline = '<p>plain <span style="color: #000">black</span> <b style="background: yellow">marked</b></p>'
    outputs = [new_output("display_data", data={"text/html": html}) for html in (table, inline)]
    page(new_code_cell("x", outputs=outputs), new_markdown_cell(f"words\n\n{inline}"))
    browser.open(tmp_path / "page.html", scheme=scheme)
    ratio, where = browser.ask(CONTRAST)
    assert ratio >= 4.5, where


SEEN = "getComputedStyle(document.querySelector('{}')).display !== 'none'"


def test_the_code_is_shown_by_one_switch_with_the_keyboard_and_is_printed_as_it_is_shown(browser, report):
    browser.open(report / "01_saft-a.html")
    code, only = SEEN.format(".code"), SEEN.format(".only-code")
    assert (browser.ask(code), browser.ask(only)) == (False, False)
    for _ in range(10):
        browser.press("Tab")
        if browser.ask("document.activeElement.id") == "show-code":
            break
    browser.press(" ", " ")
    assert browser.ask("document.querySelector('#show-code').checked")
    assert (browser.ask(code), browser.ask(only)) == (True, True)
    ratio, where = browser.ask(CONTRAST)
    assert ratio >= 4.5, where
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert (browser.ask(code), browser.ask(SEEN.format(".switch"))) == (True, False)
    browser.click("document.querySelector('h1')")
    browser.open(report / "01_saft-a.html", media="print")
    assert (browser.ask(code), browser.ask(SEEN.format(".switch"))) == (False, False)
    assert browser.complaints() == []


@pytest.fixture(scope="module")
def large(tmp_path_factory, cells) -> Path:
    """The index of a grid of 153 runs of four notebooks; two did not end well."""
    runs = tmp_path_factory.mktemp("large") / "runs" / "pocket"
    runs.mkdir(parents=True)
    add_run = adding(runs, cells)
    for task in range(50):
        for seed in range(3):
            status = {} if (task, seed) != (7, 1) else {"status": "failed", "reason": "ValueError: no such task"}
            add_run(
                f"02_finetune-{task:02}{seed}", seconds=100.0 - task, overrides={"task": f"t{task}", "seed": seed},
                results={"accuracy": (task * 7 % 50) / 50, **({} if task % 5 else {"extra": task})}, **status,
            )  # fmt: skip
    for name in ("01_one-a", "03_two-a"):
        add_run(name, results={"gain": 0.5})
    add_run("04_bad-a", status="killed", reason="out of memory")
    return publish_runs(runs, runs.parents[1] / "report")


SHOWN = "[...document.querySelectorAll('.runs tbody')].filter(r => r.offsetParent)"
ROWS = SHOWN + ".map(r => r.rows[0].cells[{}].textContent)"
COUNT = "document.querySelector('output').textContent"
HEAD = "[...document.querySelectorAll('.batch:last-child thead th')][{}]"


def test_runs_are_sorted_by_any_column(browser, large):
    browser.open(large, width=1400)
    column = "[...document.querySelectorAll('.batch:last-child tbody')].map(r => r.rows[0].cells[{}].textContent)"
    assert browser.ask(f"{HEAD.format(2)}.textContent") == "accuracy"
    browser.click(f"{HEAD.format(2)}.querySelector('button')")
    shown = browser.ask(column.format(2))
    assert shown[-1] == "", "what is missing comes last"
    assert list(map(float, shown[:-1])) == sorted(map(float, shown[:-1]))
    assert browser.ask(f"{HEAD.format(2)}.ariaSort") == "ascending"
    assert browser.ask(column.format(0))[:6] == ["t0", "t0", "t0", "t43", "t43", "t43"], "in their order where equal"
    browser.press("Enter", "\r")
    shown = browser.ask(column.format(2))
    assert shown[-1] == ""
    assert list(map(float, shown[:-1])) == sorted(map(float, shown[:-1]), reverse=True)
    assert browser.ask(f"{HEAD.format(2)}.ariaSort") == "descending"
    browser.click(f"{HEAD.format(1)}.querySelector('button')")
    assert browser.ask(column.format(1)) == ["0"] * 50 + ["1"] * 50 + ["2"] * 50
    assert browser.ask("document.querySelectorAll('[aria-sort]').length") == 1
    seconds = browser.ask("[...document.querySelectorAll('.batch:last-child td.time')].map(c => +c.dataset.value)")
    browser.click(f"{HEAD.format(4)}.querySelector('button')")
    assert browser.ask(
        "[...document.querySelectorAll('.batch:last-child td.time')].map(c => +c.dataset.value)"
    ) == sorted(seconds)
    assert browser.ask("document.querySelector('[id=\"02_finetune-071\"] + .why').textContent").startswith("ValueError")
    assert browser.complaints() == []


def test_runs_are_found_by_words_and_status(browser, large):
    browser.open(large, width=1400)
    assert browser.ask(COUNT) == "153 of 153 runs"
    browser.click("document.querySelector('[type=search]')")
    browser.type("FINETUNE t7 ")
    assert browser.ask(COUNT) == "3 of 153 runs"
    assert browser.ask(ROWS.format(0)) == ["t7"] * 3
    assert browser.ask("[...document.querySelectorAll('.batch')].map(b => b.hidden)") == [True, False]
    browser.type("no such task")
    assert browser.ask(ROWS.format(1)) == ["1"]
    browser.ask("document.querySelector('[type=search]').select()")
    browser.type("suite=pocket")
    assert browser.ask(COUNT) == "153 of 153 runs"
    browser.press("Tab")
    assert browser.ask("document.activeElement.tagName") == "SELECT"
    browser.press("n", "n")  # the first that begins so: not done
    assert browser.ask(COUNT) == "2 of 153 runs"
    assert len(browser.ask(ROWS.format(0))) == 2
    assert browser.complaints() == []


def test_without_its_script_an_index_is_complete(browser, large):
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(large)
    text = large.read_text().partition("<main>")[2].partition("<script>")[0]
    assert text.count("<tbody") == 153
    assert not re.search(r"<(?:tbody|tr|table)[^>]* hidden", text)
    browser.send("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.ask(f"{SHOWN}.length") == 153
    assert not browser.ask(SEEN.format("[role=search]"))
    assert large.stat().st_size < 3e6


def test_aligned_equations_meet_at_their_sign(browser, notebook, tmp_path):
    formula = new_markdown_cell(r"$$\begin{aligned} a &= b \\ \theta_{\text{merged}} &= d \end{aligned}$$")
    browser.open(publish_notebook(notebook(formula), tmp_path / "page.html"))
    left, right = (
        browser.ask(f"[...document.querySelectorAll('{side}')].map(e => e.getBoundingClientRect().{edge})")
        for side, edge in (("mtr > mtd:first-child > :last-child", "right"), ("mtd:last-child > mo", "left"))
    )
    assert left[0] == pytest.approx(left[1], abs=1.5)
    assert right[0] == pytest.approx(right[1], abs=1.5)


def test_headings_stand_above_their_numbers(browser, notebook, tmp_path):
    index = pd.MultiIndex.from_product([["sgd", "saft"], [1, 2]], names=["a", "b"])
    frame = pd.DataFrame({"merged": 0.7, "said": ["x", "y", 1, 2], "n": 3}, index=index)
    html = frame.style.to_html() + frame.to_html()
    cell = new_code_cell("x", outputs=[new_output("display_data", data={"text/html": html})])
    browser.open(publish_notebook(notebook(cell), tmp_path / "page.html"))
    aligned = "[...document.querySelectorAll('{}')].map(e => [e.textContent.trim(), getComputedStyle(e).textAlign])"
    heads = [head for head in browser.ask(aligned.format("thead th")) if head[0]]
    names = [["merged", "right"], ["said", "left"], ["n", "right"], ["a", "left"], ["b", "left"]]
    assert heads == names * 2, "pandas writes the names of an index below those of the columns"
    cells = dict(browser.ask(aligned.format("tbody td")))
    assert cells == {
        "0.700000": "right",
        "0.7": "right",
        "3": "right",
        "x": "left",
        "y": "left",
        "1": "right",
        "2": "right",
    }


def test_every_link_of_the_index_leads_to_a_page(browser, report):
    browser.open(report / "index.html")
    links = browser.ask("[...document.links].map(link => link.getAttribute('href'))")
    assert {link for link in links if not link.startswith("#")} == {
        path.name for path in report.iterdir() if path.name != "index.html"
    }
    for link in links:
        assert not link.startswith("#") or browser.ask(f"!!document.getElementById({link[1:]!r})")


def test_a_hostile_notebook_runs_nothing_and_asks_for_nothing(browser, notebook, tmp_path, figure):
    attack = (
        "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"
        "<svg onload='window.pwned = 1'><iframe srcdoc='<script>parent.pwned = 1</script>'></iframe><img src='http://x.example/spy.png'>"
        "<link rel=stylesheet href='http://x.example/a.css'>"
        "<style>#T_a{background:url(http://x.example/b)}</style>"
        "<a href='javascript:window.pwned = 1'>x</a><details open ontoggle='window.pwned = 1'>x</details>"
    )
    path = notebook(
        new_markdown_cell(f"# Title\n\n{attack}"),
        new_code_cell("x", outputs=[new_output("display_data", data={"text/html": attack}), figure]),
        new_code_cell("x", outputs=[new_output("display_data", data={"text/markdown": attack})]),
        new_code_cell("x", outputs=[new_output("display_data", data={"image/svg+xml": attack})]),
    )
    browser.open(publish_notebook(path, tmp_path / "page.html"))
    assert browser.ask("typeof window.pwned") == "undefined"
    active = "script, iframe, object, svg, a[href^=javascript]"
    assert browser.ask(f"document.querySelectorAll('{active}').length") == 0
    assert browser.complaints() == []
    assert browser.requests() == []
    assert browser.ask("document.images[0].naturalWidth") in (0, 40)


def test_the_policy_alone_would_stop_a_script(browser, notebook, tmp_path, cells):
    page = publish_notebook(notebook(*cells), tmp_path / "page.html")
    attack = "<script>window.pwned = 1</script><img src=http://x.example/spy.png onerror='window.pwned = 1'>"
    page.write_text(page.read_text().replace("</main>", f"{attack}</main>"))
    browser.open(page)
    assert browser.ask("typeof window.pwned") == "undefined"
    assert browser.requests() == ["http://x.example/spy.png"], "the other tests would see a request"
    assert "csp" in [event["params"].get("blockedReason") for event in browser.events], "refused, not failed"
    assert len(browser.complaints()) >= 2, "the other tests would see a complaint"


def test_a_hostile_run_runs_nothing_in_the_index_where_our_script_runs(browser, add_run, runs, headline, tmp_path):
    attack = "<img src=x onerror='window.pwned = 1'><script>window.pwned = 1</script>"
    table = headline | {"data": [[attack, 1]]}
    for value in (attack, "'\"><script>window.pwned = 1</script>"):
        add_run(
            f"01_{len(value)}-a", overrides={value: value, "seed": 1}, parameters={value: value},
            notebook=f"01 {value}", results={"headline": table, "verdict": attack, value: value},
            own_cells=[new_markdown_cell(f"# <b class=runs>{attack}</b>"), new_markdown_cell(attack)],
            status="done", reason=attack,
        )  # fmt: skip
    index = publish_runs(runs, tmp_path / "report")
    browser.open(index)
    assert browser.ask(COUNT) == "2 of 2 runs"
    assert browser.ask("typeof window.pwned") == "undefined"
    assert browser.ask("document.scripts.length") == 1
    assert browser.complaints() == []
    assert browser.requests() == []
    index.write_text(index.read_text().replace("</main>", "</main><script>window.pwned = 1</script>"))
    browser.open(index)
    assert browser.ask("typeof window.pwned") == "undefined", "the policy names one script"
    assert browser.ask(COUNT) == "2 of 2 runs"


def test_what_a_notebook_brings_covers_nothing_of_the_page(browser, notebook, tmp_path):
    cover = '<a href="https://x.example" style="padding:99px;background:#fff">x</a>' * 3
    moved = (
        '<math><mpadded voffset="5em" width="0" height="0"><mtext style="background:#fff">done</mtext></mpadded></math>'
    )
    cells = [new_markdown_cell(f"# T\n\n{cover}{moved}")]
    cells += [new_code_cell("x", outputs=[new_output("display_data", data={"text/html": cover + moved})])]
    browser.open(publish_notebook(notebook(*cells), tmp_path / "page.html"))
    for selector in ("h1", "dd", ".switch"):
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        on_top = f"(b => document.elementFromPoint(b.x + 5, b.y + b.height / 2))({box})"
        assert browser.ask(f"document.querySelector({selector!r}).contains({on_top})"), selector
    assert browser.ask(OVERFLOW) <= 0
