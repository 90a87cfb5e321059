"""A folder of runs, one report: the headline first, failures in sight, nothing replaced by a part."""

import base64
import hashlib
import json
import os
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

import saftnb.publish.index as index_module
from saftnb import disk
from saftnb.publish import publish_runs
from saftnb.publish.tables import FILTERS, number

ROOT = Path(index_module.__file__).resolve().parents[2]


@pytest.fixture
def report(runs, tmp_path):
    """Publish the runs and return the index as text."""

    def publish(**options) -> str:
        return publish_runs(runs, tmp_path / "report", **options).read_text(encoding="utf-8")

    return publish


def rows_of(html: str) -> list[str]:
    return re.findall(r"<tr.*?</tr>", html.partition('id="runs"')[2], re.DOTALL)


def words(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_the_headline_table_and_figure_come_before_the_runs(add_run, report, headline, png):
    add_run("01_saft-aaaa", results={"headline": headline, "gain": 0.0538})
    html = report()
    top, _, below = html.partition('id="runs"')
    assert words(re.search(r"<article.*?</article>", top, re.DOTALL)[0]).startswith("Flat minima")
    assert re.search(r'<th scope="row">SAFT \(saft\)</th><td data-number>0\.755</td>', top)
    assert re.search(r"<td data-number>0\.701</td>", top)
    assert f"base64,{png}" in top
    assert 'alt="Figure 1: The worst loss nearby. SAFT stays above."' in top
    assert "The flatter, the better" in top
    assert "gain <b>0.054</b>" in below
    assert 'href="01_saft-aaaa.html"' in below


def test_the_tagged_figure_is_the_headline_else_the_last(add_run, report, headline, cells, figure):
    other = new_output("display_data", data={"image/png": "QUJD"})
    last, both = new_code_cell("x", outputs=[other]), new_code_cell("x", outputs=[figure, other])
    add_run("01_tagged-a", results={"headline": headline}, own_cells=[*cells, last])
    add_run("02_plain-a", results={"headline": headline}, own_cells=[both])
    first, second = re.findall(r"<article.*?</article>", report(), re.DOTALL)
    assert "base64,QUJD" not in first
    assert "base64,QUJD" in second


def test_only_done_runs_have_a_headline(add_run, report, headline):
    add_run("01_a-a", results={"headline": headline, "gain": 1.0}, status="failed", reason="boom")
    add_run("02_b-a", results={"gain": 0.5})
    html = report()
    assert "<article" not in html
    assert "gain <b>1" not in html
    assert "gain <b>0.5" in html


@pytest.mark.parametrize(
    "table", [{"columns": ["a"]}, {"columns": [], "data": []}, {"columns": ["a"], "data": [1]}, [1], 3]
)
def test_a_headline_that_is_no_table_does_not_stop_the_report(add_run, report, table):
    add_run("01_a-a", results={"headline": table})
    assert "<article" not in report()


def test_failed_runs_are_seen_with_their_reason(add_run, report, tmp_path):
    add_run("01_a-a")
    add_run("02_b-b", status="failed", reason="ValueError: unknown method <tiez>\nsecond line")
    add_run("03_c-c", status="killed", reason="out of memory")
    html = report()
    assert "3 runs of 3 notebooks, 1 done, 2 not done" in words(html).replace(" ,", ",")
    assert 'href="#02_b-b"' in html
    assert 'id="02_b-b"' in html
    assert "ValueError: unknown method &lt;tiez&gt; second line" in html
    assert "out of memory" in html
    assert "<details" not in html
    page = (tmp_path / "report" / "02_b-b.html").read_text()
    assert "unknown method &lt;tiez&gt;" in page
    assert 'class="status bad">failed' in page


def test_a_run_is_done_only_when_its_manifest_says_so(add_run, report, runs, headline):
    (add_run("01_cut-a", results={"headline": headline}) / "manifest.json").unlink()
    (add_run("02_torn-a", results={"headline": headline}) / "manifest.json").write_text('{"status": "do')
    add_run("03_odd-a", results={"headline": headline}, status="finished?")
    (add_run("04_lost-a") / "run.ipynb").unlink()
    (add_run("05_broken-a") / "run.ipynb").write_text("{")
    html = report()
    assert "<article" not in html
    for reason in (
        "manifest.json is missing",
        "manifest.json cannot be read",
        "run.ipynb is missing",
        "run.ipynb cannot be read",
    ):
        assert reason in html
    assert html.count('class="status bad">not done') == 3
    assert html.count('<td class="time">–</td>') == 2, "what is not known is sorted last"
    assert "04_lost-a.html" not in html


def test_a_run_that_was_taken_from_a_list_counts_as_done_and_has_no_page(add_run, report, tmp_path):
    folder = add_run("01_a-a", results={"gain": 0.5})
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"taken": "runs.json"}))
    html = report()
    assert "Taken from runs.json and not executed here, so there is no page." in html
    assert 'class="status good">done' in html
    assert "gain <b>0.5" in html
    assert not (tmp_path / "report" / "01_a-a.html").exists()


def test_results_that_were_altered_after_the_run_are_not_believed(add_run, report, runs, headline):
    folder = add_run("01_a-a", results={"headline": headline})
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, key in (("results.json", "results_sha256"), ("run.ipynb", "run_sha256")):
        manifest[key] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "<article" in report()
    (folder / "results.json").write_text((folder / "results.json").read_text().replace("0.755", "0.955"))
    html = report()
    assert "<article" not in html
    assert "results.json was altered after the run" in html
    assert 'class="status bad">not done' in html


def test_a_sweep_is_grouped_and_named_by_what_was_changed(add_run, report, headline):
    for name, rho in (("c", 0.2), ("a", 0.05), ("b", 0.1)):
        add_run(f"03_rho-{name}", overrides={"rho": rho}, results={"headline": headline})
    add_run("04_other-a", overrides={"keep_share": 0.3})
    html = report()
    _, alone, heads, *sweep = rows_of(html)
    assert words(heads) == "rho Time (budget) Status"
    assert [words(row) for row in sweep] == [f"{rho} 1 min 15 s (10 min) done" for rho in (0.05, 0.1, 0.2)]
    assert "keep share 0.3" in words(alone)
    assert html.count("<article") == 1
    assert "The claim and the numbers, and those of 2 other runs" in html
    assert html.count("base64,") == 1, "folded tables stand without their figures"


def test_each_run_has_its_page_with_the_facts(add_run, report, tmp_path):
    add_run("01_saft-aaaa", overrides={"rho": 0.2}, parameters={"suite": "pocket", "rho": 0.2, "lr": 1e-3})
    report()
    html = (tmp_path / "report" / "01_saft-aaaa.html").read_text()
    facts = words(re.search(r'<dl class="facts">.*?</dl>', html, re.DOTALL)[0])
    assert facts.startswith("notebook 01_saft status done time (budget) 1 min 15 s (10 min)")
    assert facts.endswith("parameters rho 0.2 suite pocket lr 0.001")
    assert re.search(r'class="changed"[^>]*>rho', html)
    assert not re.search(r'class="changed"[^>]*>suite', html)
    assert 'href="index.html"' in html
    assert "secret_call" in html


def test_the_code_can_be_left_out_of_a_report(add_run, report, tmp_path):
    add_run("01_saft-aaaa")
    report(code=False)
    assert "secret_call" not in (tmp_path / "report" / "01_saft-aaaa.html").read_text()


def test_a_run_over_its_budget_is_marked_by_a_word(add_run, report):
    add_run("01_slow-a", seconds=75.2, budget=60)
    add_run("02_quick-a", seconds=75.2, budget=80)
    add_run("03_free-a", seconds=75.2, budget=None)
    texts = [words(row) for row in rows_of(report())[1:]]
    assert texts[0].endswith("1 min 15 s (1 min) over done")
    assert texts[1].endswith("1 min 15 s (1 min 20 s) done")
    assert texts[2].endswith("1 min 15 s done")


def test_the_runs_stand_in_the_order_of_the_grids_file(add_run, report, runs, headline):
    for name in ("01_b-x", "02_a-y", "03_c-z", "02_a-w"):
        add_run(name, results={"headline": headline}, overrides={"seed": name[-1]})
    (runs / ".current.json").write_text('["03_c-z", "02_a-y", "03_c-z", "01_b-x", "02_a-w"]')
    html = report()
    assert re.findall(r'<tr id="([^"]*)"', html) == ["03_c-z", "01_b-x", "02_a-y", "02_a-w"]
    articles = re.findall(r"<article.*?</article>", html, re.DOTALL)
    assert [re.search(r'href="(\w+)-', article)[1] for article in articles] == ["03_c", "02_a", "01_b"]


def test_a_sweep_has_a_column_for_each_changed_parameter_and_number(add_run, report):
    for seed, keep in ((0, 0.1), (1, 0.1), (0, 0.25)):
        add_run(
            f"02_merge-{seed}{keep}", overrides={"suite": "pocket", "seed": seed, "keep": keep},
            results={"accuracy": 0.5 + keep + seed, "verdict": "x"},
        )  # fmt: skip
    add_run("02_merge-f", overrides={"suite": "pocket", "seed": 5, "keep": 0.1}, status="killed", reason="no memory")
    html = report()
    heads, *rows = rows_of(html)
    assert words(heads) == "seed keep accuracy Time (budget) Status"
    assert [words(row).split()[:3] for row in rows if "why" not in row] == [
        ["0", "0.1", "0.600"], ["0", "0.25", "0.750"], ["1", "0.1", "1.600"], ["5", "0.1", "1"],
    ]  # fmt: skip
    assert "suite pocket" in words(html.partition("<h3>")[2].partition("</h3>")[0])
    assert 'data-value="0.75"' in html
    assert re.search(r'<td colspan="5"><p class="reason">no memory', html)


def test_the_foot_says_commit_date_and_versions(add_run, report):
    add_run("01_a-a")
    add_run("02_b-a", finished="2026-02-03T10:00:00+02:00", versions={"torch": "2.15.0"})
    foot = words(report().partition("<footer>")[2])
    assert "0123456789ab with uncommitted changes" in foot
    assert "2026-02-01 10:01 UTC to 2026-02-03 08:00 UTC" in foot
    assert "torch 2.14.1 and 2.15.0" in foot


def test_the_index_is_self_contained_and_carries_no_path(add_run, report, headline, runs):
    add_run(
        "01_a-a",
        results={"headline": headline, "store": f"{ROOT}/runs/store"},
        overrides={"path": f"{runs}/x"},
    )
    add_run("02_b-a", status="failed", reason=f"no file {ROOT}/data or {Path.home()}/data")
    html = report()
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert html.count("<script") == 1
    assert f"form-action 'none'; script-src 'sha256-{digest}'\"" in html
    assert not re.search(r"<(?!a\b)[^>]*\s(?:src|href)\s*=\s*[\"'](?!data:)", html)
    assert str(ROOT) not in html
    assert str(Path.home()) not in html


def test_the_same_runs_give_the_same_report(add_run, runs, tmp_path, headline):
    add_run("01_a-a", results={"headline": headline})
    first, second = (publish_runs(runs, tmp_path / name) for name in ("one", "two"))
    for file in first.parent.iterdir():
        assert file.read_bytes() == (second.parent / file.name).read_bytes()


def test_runs_that_are_not_there_are_one_clear_line(runs, add_run, tmp_path):
    out = tmp_path / "report"
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        publish_runs(tmp_path / "nowhere", out)
    with pytest.raises(ValueError, match="holds no runs"):
        publish_runs(runs, out)
    run = add_run("01_a-a")
    with pytest.raises(ValueError, match=r"did you mean .*runs/pocket\?"):
        publish_runs(runs.parent, out)
    with pytest.raises(ValueError, match=r"did you mean .*runs/pocket\?"):
        publish_runs(run, out)
    assert not out.exists()


def test_a_folder_with_foreign_files_is_refused_and_untouched(add_run, runs, tmp_path):
    add_run("01_a-a")
    out = tmp_path / "report"
    out.mkdir()
    (out / "thesis.html").write_text("<html>mine</html>")
    with pytest.raises(ValueError, match=r"holds thesis\.html, which no report wrote"):
        publish_runs(runs, out)
    assert [path.name for path in out.iterdir()] == ["thesis.html"]
    (out / "thesis.html").unlink()
    publish_runs(runs, out)
    (out / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.md"):
        publish_runs(runs, out)
    assert (out / "notes.md").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="not a folder"):
        publish_runs(runs, tmp_path / "file")


def test_a_new_report_replaces_the_old_one_whole(add_run, runs, tmp_path):
    run = add_run("01_a-a")
    out = tmp_path / "report"
    publish_runs(runs, out)
    run.rename(runs / "02_b-b")
    publish_runs(runs, out)
    assert sorted(path.name for path in out.iterdir()) == ["02_b-b.html", "index.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "runs"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", ["_run_page", "_index_page"])
def test_an_interrupted_report_leaves_the_old_one_whole(add_run, runs, tmp_path, monkeypatch, stop, at):
    add_run("01_a-a")
    out = tmp_path / "report"
    publish_runs(runs, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    add_run("02_b-b")
    original, calls = getattr(index_module, at), []

    def interrupted(*arguments, **values):
        calls.append(at)
        if at == "_index_page" or len(calls) == 2:
            raise stop
        return original(*arguments, **values)

    monkeypatch.setattr(index_module, at, interrupted)
    with pytest.raises(stop):
        publish_runs(runs, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "runs"]


def test_a_swap_that_fails_half_way_puts_the_old_report_back(add_run, runs, tmp_path, monkeypatch):
    add_run("01_a-a")
    out = tmp_path / "report"
    publish_runs(runs, out)
    rename = Path.rename

    def fails(self, target):
        if self.name.endswith(".part"):
            raise OSError("disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    monkeypatch.setattr(disk, "_exchanged", lambda *_: False)  # a file system that cannot exchange two names
    with pytest.raises(OSError, match="disk"):
        publish_runs(runs, out)
    assert (out / "index.html").exists()


def test_a_crash_between_the_two_renames_is_put_right_next_time(add_run, runs, tmp_path, monkeypatch):
    add_run("01_a-a")
    out = tmp_path / "report"
    publish_runs(runs, out)
    out.rename(tmp_path / ".report.previous")
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "_index_page", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish_runs(runs, out)
    assert (out / "index.html").exists(), "even where the next report is interrupted too"
    publish_runs(runs, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "runs"]


@pytest.mark.parametrize(
    ("value", "largest", "text"),
    [
        (0.7654321, None, "0.765"), (76.54321, None, "76.5"), (7654.321, None, "7,654"), (3, None, "3"),
        (-0.5, None, "−0.500"), (-0.0001, 0.9, "0.000"), (0.00012, None, "1.2e−04"),
        (5.0, 80.0, "5.0"),
        (12000, None, "12,000"), (0.0, None, "0.000"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_in_a_table(value, largest, text):
    assert number(value, largest) == text


@pytest.mark.parametrize(("seconds", "text"), [(75.2, "1 min 15 s"), (None, "–"), ("x", "–"), (float("inf"), "–")])
def test_a_duration_that_is_none_is_a_dash(seconds, text):
    assert FILTERS["duration"](seconds) == text


def test_question_answer_and_figure_stand_open_and_the_rest_is_folded(add_run, report, headline, tmp_path):
    add_run("01_saft-aaaa", results={"headline": headline, "verdict": "worse by <2 points"})
    article = re.search(r"<article.*?</article>", report(), re.DOTALL)[0]
    before, _, folded = article.partition("<details>")
    assert words(before).startswith("Flat minima merge better")
    assert "In this run: worse by &lt;2 points" in words(before)
    assert "<img" in before
    assert "The flatter, the better" in folded
    assert "<table" in folded
    page = (tmp_path / "report" / "01_saft-aaaa.html").read_text()
    assert "In this run: worse by &lt;2 points" in words(page)


def test_words_on_the_committed_results_are_left_out_where_parameters_are_others(add_run, report, tmp_path, cells):
    told = new_markdown_cell("Six experts of 89 %.", metadata={"tags": ["committed-results"]})
    again = new_markdown_cell("And 50 %.", metadata={"tags": ["committed-results"]})
    add_run("01_saft-a", own_cells=[*cells, told, again])
    add_run("01_saft-b", own_cells=[*cells, told, again], overrides={"steps": 3})
    report()
    own, changed = (words((tmp_path / "report" / f"01_saft-{name}.html").read_text()) for name in "ab")
    assert "Six experts of 89 %. And 50 %." in own
    assert "default parameters" not in own
    assert "89 %" not in changed
    assert changed.count("words on results are for its default parameters") == 1


def test_runs_that_the_grid_no_longer_names_are_left_out(add_run, report, runs):
    add_run("01_saft-aaaa", results={"gain": 0.251})
    add_run("01_saft-bbbb", results={"gain": 0.752})
    assert ">0.251</td>" in report()
    (runs / ".current.json").write_text('["01_saft-bbbb"]')
    html = report()
    assert "0.251" not in html
    assert "gain <b>0.752</b>" in html
    assert "1 run<" in html


@pytest.mark.parametrize(
    "said",
    [
        {"results": {"x": 10**400, "headline": {"columns": ["a"], "data": [[10**400]]}}},
        {"seconds": 10**400, "peak_memory": 10**400}, {"overrides": {"a": 10**400}}, {"git": ["x"], "versions": "x"},
        {"parameters": {"a": json.loads("[" * 90 + "]" * 90)}}, {"finished": True}, {"finished": 1769940000},
        {"status": ["done"]}, {"status": "failed", "reason": "a\ud800b"}, {"results": {"verdict": "a\udfffb"}},
    ],
)  # fmt: skip
def test_what_one_run_says_stops_no_report(add_run, runs, tmp_path, said):
    add_run("02_odd-a", **said)
    add_run("02_odd-b", **said)
    add_run("03_good-a")
    assert "03_good-a.html" in publish_runs(runs, tmp_path / "report").read_text()


@pytest.mark.parametrize("name", ["02_odd-a/manifest.json", "02_odd-a/results.json", ".current.json"])
def test_a_file_nested_too_deeply_stops_no_report(add_run, runs, tmp_path, name):
    add_run("02_odd-a")
    add_run("03_good-a")
    for text in ("[" * 100_000, "x", "5", f'{{"status": "done", "notebook": "a", "a": {"[" * 600 + "]" * 600}}}'):
        (runs / name).write_text(text)
        assert "03_good-a.html" in publish_runs(runs, tmp_path / "report").read_text()


def test_what_a_table_is_sorted_by_names_no_place(add_run, runs, tmp_path):
    for seed in (1, 2):
        add_run(f"02_x-{seed}", overrides={"a": f"/home/alice/{seed}", "b": f"/home/alice/{seed}"},
                results={"where": f"/home/alice/{seed}"})  # fmt: skip
    assert "alice" not in publish_runs(runs, tmp_path / "report").read_text()


def test_a_claim_opens_nothing_that_it_does_not_close(add_run, runs, headline, tmp_path):
    claim = new_markdown_cell("# T\n\n<p><math><mtext><p>q</p></mtext></math></p>")
    add_run("02_x-a", own_cells=[claim], results={"headline": headline})
    html = publish_runs(runs, tmp_path / "report").read_text()
    assert html.count("<mtext>") == html.count("</mtext>") == html.count("</math>") == 1


def test_a_run_folder_may_have_any_name(runs, add_run, tmp_path):
    add_run("index").rename(runs / "index")
    add_run("a-1").rename(runs / os.fsdecode(b"a\xff-2"))
    html = publish_runs(runs, tmp_path / "out").read_text()
    assert 'href="index-run.html"' in html
    assert 'href="a%FF-2.html"' in html
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "index.html", "index-run.html", os.fsdecode(b"a\xff-2.html"),
    }  # fmt: skip
