"""One notebook, one page: what a reader sees, and what the file does not hold."""

import re
from html import unescape
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

import saftnb
from tests.publish.conftest import publish_notebook

ROOT = Path(saftnb.__file__).resolve().parents[1]
LOADING = re.compile(r'<(?!a\b)[^>]*\s(?:src|href|data|poster|srcset|action)="(?!data:)|url\(|@import')


def main_of(html: str) -> str:
    return html.partition("<main>")[2].partition("</main>")[0]


def test_a_page_is_self_contained_and_runs_nothing(page, cells, png):
    html = page(*cells)
    assert f'src="data:image/png;base64,{png}"' in html
    assert not LOADING.search(html)
    assert "<script" not in html
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert "script-src" not in policy[1]


def test_the_code_waits_behind_one_switch_and_can_be_left_out(page, cells):
    html = page(*cells)
    outside = re.sub(r"<div class=\"code\".*?</pre>", "", html, flags=re.DOTALL)
    assert "secret_call" in html
    assert "secret_call" not in outside
    assert html.count('type="checkbox"') == 1
    without = page(*cells, code=False)
    assert "secret_call" not in without
    assert "secret_parameter" not in without
    assert 'type="checkbox"' not in without


def test_the_first_heading_is_the_title_and_stands_once(page, cells):
    html = page(*cells)
    assert "<title>Flat minima merge better for ρ&gt;0</title>" in html
    assert html.count("<h1") == 1
    assert "Flat minima" not in main_of(html)


def test_formulas_become_mathml(page, cells):
    html = main_of(page(*cells))
    assert re.search(r'<math [^>]*display="block"', html)
    assert "$" not in re.sub(r'alttext="[^"]*"', "", html)


def test_a_dollar_sign_in_code_is_no_formula(page):
    html = main_of(page(new_markdown_cell("Run `echo $HOME $PATH` first.")))
    assert "<code>echo $HOME $PATH</code>" in html


def test_a_broken_formula_is_shown_as_source(page):
    assert r"\frac{a}{" in main_of(page(new_markdown_cell(r"Here: $\frac{a}{$.")))


def test_figures_are_described_by_the_text_around_them(page, cells):
    (alt,) = re.findall(r'<img [^>]*alt="([^"]*)"', page(*cells))
    assert alt == "Figure 1: The worst loss nearby. SAFT stays above."


def test_a_cell_may_describe_its_figures_itself(page, figure):
    html = page(
        new_code_cell("x", outputs=[figure], metadata={"alt": 'Two "lines" <rise>'}),
        new_code_cell("x", outputs=[figure, figure], metadata={"alt": "Left, right"}),
    )
    assert re.findall(r'<img [^>]*alt="([^"]*)"', html) == [
        "Figure 1: Two &#34;lines&#34; &lt;rise&gt;",
        "Figure 2: Left, right",
        "Figure 3: Left, right",
    ]


def test_an_svg_is_a_picture_and_not_markup(shown):
    svg = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    html = shown("display_data", data={"image/svg+xml": svg, "text/plain": "x"})
    assert "data:image/svg+xml;base64," in html
    assert "<svg" not in html


def test_picture_data_cannot_leave_its_attribute(shown):
    html = shown("display_data", data={"image/png": 'AAAA" onerror="alert(1)'})
    assert re.fullmatch(r'<img src="[^"]*" alt="[^"]*">', re.search(r"<img.*?>", html)[0])


def test_an_attachment_is_embedded_and_a_remote_picture_is_not(page, png):
    source = "![inside](attachment:a.png) ![remote](https://x.example/b.png) ![lost](attachment:c.png)"
    html = main_of(page(new_markdown_cell(source, attachments={"a.png": {"image/png": png}})))
    assert f'src="data:image/png;base64,{png}"' in html
    assert "x.example" not in html
    assert html.count("<img") == 1
    assert "outside the notebook: remote" in html
    assert "outside the notebook: lost" in html


def test_a_drawing_beside_the_notebook_is_a_picture_and_nothing_else_is_read(page, tmp_path):
    (tmp_path / "drawings").mkdir()
    (tmp_path / "drawings" / "basin.svg").write_text("<svg/>")
    (tmp_path / "secret.svg").write_text("<svg>no</svg>")
    source = "![a basin](drawings/basin.svg) ![x](secret.svg) ![y](drawings/../secret.svg) ![z](drawings/none.svg)"
    html = main_of(page(new_markdown_cell(source)))
    assert '<img src="data:image/svg+xml;base64,PHN2Zy8+" alt="a basin">' in html
    assert html.count("<img") == 1
    assert html.count("outside the notebook") == 3


def test_cells_tagged_no_report_are_skipped(page, figure):
    html = page(
        new_markdown_cell("hidden words", metadata={"tags": ["no-report"]}),
        new_code_cell("x", outputs=[figure], metadata={"tags": ["no-report"]}),
        new_markdown_cell("seen words"),
    )
    assert "hidden words" not in html
    assert "<img" not in html
    assert "seen words" in html


def test_printed_text_is_escaped_and_without_colours(shown):
    html = shown("stream", name="stdout", text="\x1b[31m<b>red</b>\x1b[0m & 10%\r100%\n")
    assert ">100%</pre>" in html
    assert "\x1b" not in html
    assert "&lt;b&gt;" in shown("stream", name="stdout", text="<b>")


def test_progress_bars_are_hidden_and_warnings_folded(shown):
    bar = "\r 10%|█   | 1/10 [00:01<00:09, 1.00it/s]\r100%|████| 10/10 [00:10<00:00, 1.00it/s]\n"
    assert "<pre" not in shown("stream", name="stderr", text=bar)
    html = shown("stream", name="stderr", text=f"{bar}UserWarning: mind this\n")
    assert "it/s" not in html
    assert re.search(r'<details class="messages">.*mind this.*</details>', html, re.DOTALL)


def test_an_error_is_seen(shown):
    trace = ["\x1b[31mTraceback\x1b[0m", "line 3"]
    html = shown("error", ename="ValueError", evalue="no <method>", traceback=trace)
    assert "<strong>ValueError: no &lt;method&gt;</strong>" in html
    assert "Traceback\nline 3" in html
    assert "<details" not in html


@pytest.mark.parametrize(
    "text",
    ["<Figure size 640x480 with 1 Axes>", "Text(0.5, 1.0, 'x')", "[<matplotlib.lines.Line2D at 0x7f>]"],
)
def test_what_drawing_calls_return_is_not_shown(shown, text):
    assert "<pre" not in shown("execute_result", execution_count=1, data={"text/plain": text})


def test_a_value_is_shown_and_a_line_stands_in_for_a_widget(shown):
    assert ">0.75</pre>" in shown("execute_result", execution_count=1, data={"text/plain": "0.75"})
    widget = {
        "application/vnd.jupyter.widget-view+json": {"model_id": "a"},
        "text/plain": "HBox(children=())",
    }
    html = shown("display_data", data=widget)
    assert "An interactive widget: here it cannot run. It is in the notebook" in html
    assert ">HBox(children=())</pre>" in html
    bar = widget | {"text/plain": "  0%|          | 0/10 [00:00<?, ?it/s]"}
    assert "<section" not in shown("display_data", data=bar)


def test_an_output_of_only_a_script_falls_back_to_its_text(shown):
    html = shown("display_data", data={"text/html": "<script>draw()</script>", "text/plain": "a chart"})
    assert "a chart" in html
    assert "draw()" not in html


def test_very_long_outputs_keep_both_ends(shown):
    html = shown("stream", name="stdout", text="\n".join(f"line {i}." for i in range(5000)))
    assert "line 0." in html
    assert "line 4999." in html
    assert "line 2500." not in html
    assert "4,760 lines left out" in html


def test_no_path_of_this_machine_is_left(page):
    places = [
        f"{ROOT}/runs/store",
        f"file://{ROOT}/a.py",
        str(ROOT),
        f"{Path.home()}/.cache",
        "/home/alice/x",
        r"C:\Users\alice\x",
    ]
    text = "\n".join(places)
    html = page(
        new_markdown_cell(f"See {places[0]}."),
        new_code_cell(
            f"# {places[0]}",
            outputs=[
                new_output("stream", name="stdout", text=text),
                new_output("stream", name="stderr", text=text),
                new_output("execute_result", execution_count=1, data={"text/plain": text}),
                new_output("display_data", data={"text/html": f"<p>{text}</p>"}),
                new_output("error", ename="E", evalue=places[0], traceback=[text]),
            ],
        ),
    )
    for place in (str(ROOT), str(Path.home()), "alice"):
        assert place not in html
    assert "runs/store" in html
    assert "~/.cache" in html


def test_the_store_and_the_host_are_not_named(shown, monkeypatch):
    monkeypatch.setenv("SAFTNB_STORE", "/scratch/alice/checkpoints")
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-17")
    html = shown("stream", name="stdout", text="/scratch/alice/checkpoints/ab12 on gpu-17, not on gpu-170")
    assert ">store/ab12 on host, not on gpu-170</pre>" in html


def test_secrets_and_paths_of_other_places_are_not_told(shown, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setenv("HARMLESS", "hf_0123456789x")
    monkeypatch.setattr("getpass.getuser", lambda: "alice.b")
    text = (
        "hf_0123456789 of alice.b: /scratch/lab 7/x/data.bin '/opt/conda/lib/python3/site-packages/a.py', line 3 "
        "/mnt/disks/d1 https://a.org/opt/b/c opt/b/c 3/usr/4"
    )
    html = shown("stream", name="stdout", text=text)
    assert (
        ">*** of user: …/lab 7/x/data.bin '…/a.py', line 3 …/d1 https://a.org/opt/b/c opt/b/c 3/usr/4</pre>"
        in unescape(html)
    )


def test_paths_that_only_look_alike_are_left(shown, monkeypatch):
    monkeypatch.setattr("saftnb.scrub.project_root", lambda: Path("/code/own"))
    html = shown(
        "stream", name="stdout", text="/code/own/a /code/owns/x /rooted https://a.example/home/x base/code/own"
    )
    assert ">a /code/owns/x /rooted https://a.example/home/x base/code/own</pre>" in html


def test_links_in_text_stay_links(page):
    html = main_of(page(new_markdown_cell("[paper](https://arxiv.org/abs/2010.01412)")))
    assert '<a href="https://arxiv.org/abs/2010.01412">paper</a>' in html


def test_a_title_opens_nothing_that_it_does_not_close(page):
    html = page(new_markdown_cell("<h1><div><b>a <h1>b</h1></b></div></h1>"))
    assert '<h1 dir="auto"><b>a b</b></h1>' in html
    assert html.count("<h1") == 1
    styled = page(
        new_markdown_cell('# a <b style="padding:90px;background:#fff">b</b> <math><mpadded voffset="9em"></math>')
    )
    assert "padding:90px" not in styled.partition("<header>")[2].partition("</header>")[0]
    assert "<mpadded" not in styled.partition("<header>")[2].partition("</header>")[0]


def test_half_a_character_is_replaced(notebook, tmp_path):
    html_output = new_output("display_data", data={"text/html": "<b>e#b</b>"})
    outputs = [new_output("stream", text="a#b"), html_output]
    path = notebook(new_markdown_cell("# c#b\n\nIt is *d#b*."), new_code_cell("x", outputs=outputs))
    path.write_text(path.read_text().replace("#b", "\\ud800b"))
    html = publish_notebook(path, tmp_path / "page.html").read_text()
    assert all(f"{letter}?b" in html for letter in "acde")


def test_a_secret_with_signs_of_markdown_is_not_told(page, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "w_x*y*z$q$r*s*")
    html = page(new_markdown_cell("# T\n\nIt is w_x*y*z$q$r*s* here."))
    assert "It is *** here" in html
