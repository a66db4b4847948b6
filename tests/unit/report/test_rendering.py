"""Templates escape by default, figures read alike everywhere, and what three renderers show is worked out once."""

import math
import re
from types import SimpleNamespace

import pytest
from support.incidents import HOSTILE, hostile_rows, make, rendered, window

from trl_parity.preflight.check.report import markdown
from trl_parity.preflight.check.rows import CheckOutcome, Row, RowVerdict
from trl_parity.report import rendering
from trl_parity.report.figures import INCIDENT_PICTURES, REPORT_PICTURES
from trl_parity.report.format import cut, number, percent
from trl_parity.report.html import render_page
from trl_parity.report.rendering import Markup, render_html, render_markdown
from trl_parity.report.sequences import LESS, MORE, color_scale, shade, worst_sequences
from trl_parity.report.summary import statistics, summary_of
from trl_parity.results.incident import windows_in_short
from trl_parity.verdict import Status


def compared(text):
    words = {"answer": f"A {text}", "note": text, "method": text}
    return render_markdown("compare.md.j2", picture=False, heads=["a", "b"], rows=[[text, "1"]], **words)


def structure(report):
    """What of it is no text."""
    return [(t.type, t.tag) for t in rendered(report) if t.type.endswith("_open") or t.type in ("fence", "image")]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_is_filled_into_markdown_is_only_text(text):
    assert structure(compared(text)) == structure(compared("plain"))
    assert not [t for t in rendered(compared(text)) if t.type in ("html_block", "html_inline")]


def test_what_is_filled_into_html_is_only_text_unless_it_is_markup():
    page = render_html("page.html.j2", title="<t>\u202e", parts=["<b>x</b>", Markup("<p>kept</p>")])
    assert "<title>&lt;t&gt;\\u202e</title>" in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert "<p>kept</p>" in page


def test_a_name_that_a_template_is_not_given_is_an_error():
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError, match="answer"):
        render_markdown("compare.md.j2")


def test_every_template_is_a_file_that_a_wheel_holds():
    import tomllib

    from support import ROOT

    with open(f"{ROOT}/pyproject.toml", "rb") as f:
        held = tomllib.load(f)["tool"]["setuptools"]["package-data"]["trl_parity"]
    assert "report/templates/*.j2" in held
    for environment, kind in zip(rendering._environments(), ("md", "html"), strict=True):
        names = environment.list_templates(filter_func=lambda name, kind=kind: name.endswith(f".{kind}.j2"))
        assert len(names) >= 2
        for name in names:
            environment.get_template(name)


def test_a_check_in_markdown_keeps_its_table_whatever_its_rows_say():
    def told(text):
        row = Row(id="kl_mean", group="limits", title=text, verdict=RowVerdict.FAIL, value=0.002, limit=1e-3,
                  interval=(1e-3, 3e-3), evidence=text, fix=text, reproduce=text)  # fmt: skip
        facts = {"parameters": 1234567, "vocabulary": 32000, "versions": {"torch": text}, "engine": {text: text},
                 "speed": {"tokens_per_second": 1.0, "share": 0.5, "engine_alone": 2.0}}  # fmt: skip
        settings = SimpleNamespace(model=text, trainer_dtype="float32", temperature=1.0)
        return markdown(
            SimpleNamespace(rows=(row,), outcome=CheckOutcome.UNFIT, settings=settings, facts=facts, trials=[])
        )

    plain = told("plain")
    assert "| `kl_mean` plain | **fail** | 0.002 [0.001, 0.003] | ≤ 0.001 | - | 0 | 0 | plain |" in plain
    assert "Model `plain`, 1,234,567 parameters" in plain
    for text in HOSTILE.values():
        assert structure(told(text)) == structure(plain)


def test_figures_for_people():
    assert [number(x) for x in (None, 0.000123456, math.inf, "nan")] == ["-", "0.0001235", "inf", "nan"]
    assert [percent(x) for x in (None, 0.5, 0.9999, 1.0, "inf")] == ["-", "50%", "99.9%", "100%", "inf"]
    assert [cut("abcd", most) for most in (4, 3)] == ["abcd", "ab…"]


def test_worst_sequences_are_told_once_for_all():
    rows = hostile_rows("a") + [{**row, "sequence": 1} for row in hostile_rows("b")]
    rows[0] |= {"log_ratio": math.inf}
    rows[1] |= {"compared": False}
    first, second = worst_sequences(rows)
    assert (first.number, first.prompt, first.completion) == (3, "a", "aaa")
    assert first.total == "sum |Δ| 0.5 over 1 compared tokens, 1 more are not finite"
    assert second.total == "sum |Δ| 1.5 over 3 compared tokens"


def test_a_token_is_shaded_by_its_sign_and_size():
    def seen(delta, **more):
        return shade({"compared": True, "log_ratio": delta} | more, 0.5)

    assert seen(0.1, compared=False) is None
    assert seen(None) is None
    assert (seen(-0.5).color, seen(0.1).color) == (LESS, MORE)
    assert (seen(0.1).share, seen(0.1).marked, seen(0.25).marked, seen(-7.0).share) == (0.2, False, True, 1.0)
    assert not seen(math.nan).finite
    assert color_scale([]) == 1.0


def test_a_statistic_not_measured_is_left_out_and_the_worst_of_one_that_falls_is_its_least():
    series = {"ess": [0.9, None, 0.4, math.nan], "kl_k3": [1e-5, 3e-5, 2e-5], "honesty_gap": [None]}
    ess, kl = statistics(("ess", "honesty_gap", "kl_k3"), series, {"kl_k3": 2e-5, "floor/kl_k3": 1e-5}, None)
    assert (ess.worst, ess.values, ess.last) == (0.4, [0.9, None, 0.4, None], None)
    assert (kl.worst, kl.median, kl.last, kl.floor) == (3e-5, 2e-5, 2e-5, 1e-5)


def test_an_incidents_pictures_are_those_of_the_report():
    assert INCIDENT_PICTURES["windows.png"] is REPORT_PICTURES["timeline.png"]
    assert INCIDENT_PICTURES["log_ratio.png"] is REPORT_PICTURES["histogram.png"]
    assert INCIDENT_PICTURES["evidence.png"] is REPORT_PICTURES["evidence.png"]


def test_an_incident_alone_is_summed_up_with_the_windows_it_holds():
    rows = hostile_rows("a")
    rows[0] |= {"log_ratio": math.nan, "position": "not a number"}
    windows = windows_in_short([window(6), window(7, Status.HALT, 3, k3=0.01)])
    summary = summary_of(make(windows=windows), rows)
    assert (summary.columns.count, summary.columns.first_halt) == (2, 7)
    assert (len(summary.after), summary.not_finite) == (2, 1)
    assert summary.rule.stat == "kl_k3"
    assert summary_of(make(config={"unknown": 1}), rows).rule is None  # then the recorded limit is what is drawn


def test_words_in_tables_of_a_page_are_not_broken_to_make_room():
    page = render_page("t", ["| a | b |\n| --- | --- |\n| `logp_abs_diff/mean` | x |\n"], {})
    css = page[page.index("<style>") : page.index("</style>")]
    rules = dict(re.findall(r"([^{}\n]+?) *\{([^}]*)\}", css))
    assert "overflow-x: auto" in rules["table"]  # what is too wide is scrolled to
    for cells in ("th, td", "td code"):
        [rule] = [body for name, body in rules.items() if name.strip().endswith(cells)]
        assert "overflow-wrap: break-word" in rule
