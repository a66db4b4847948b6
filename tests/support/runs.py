"""A run's folder as the monitor leaves it, and what a page of its report may hold."""

import html.parser
import re

from support.incidents import hostile_rows, make
from support.windows import window
from trl_parity import ParityMonitor
from trl_parity.report.bundle import write_incident
from trl_parity.results.incident import windows_in_short


def run(folder, values, *, tokens=True, text="a"):
    """A run's folder: windows of these k3, judged by the monitor; a halt leaves its incident."""
    monitor = ParityMonitor(output_dir=folder, floor={"kl_k3": 1e-5}, consecutive=3)
    for step, value in enumerate(values, start=1):
        stats = window(kl_k3=value, trimmed__kl_k3=value, logp_abs_diff__mean=value**0.5, entropy__trainer=0.5,
                       ess=1 - value)  # fmt: skip
        verdict = monitor.judge(step, monitor.scalars(stats))
        if tokens:
            sample = [{"position": i, "rollout_logprob": -1.0 - i / 50, "trainer_logprob": -1.0 - i / 50 - value * i,
                       "entropy": i / 40} for i in range(60)]  # fmt: skip
            monitor._tokens.write_tokens(verdict, sample)
        if verdict.halted and verdict.alert:
            incident = make(step=step, verdict=verdict.to_dict(), windows=windows_in_short(list(monitor.verdicts)))
            write_incident(folder / "parity", incident, hostile_rows(text))
    monitor.write_run({"versions": {"python": "3.11", "torch": "2.13"}, "engine": {"dtype": "bfloat16"}})
    monitor.close()
    return folder


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "code", "pre", "strong", "table",
        "thead", "tbody", "tr", "th", "td", "img", "ul", "ol", "li", "div", "span", "br", "em"}  # fmt: skip


def safe(page):
    """Nothing in it runs, loads or hides."""
    found = Page(page)
    assert found.tags <= TAGS, found.tags - TAGS
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    sources = [value for name, value in found.attributes if name in ("src", "href")]
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    assert "default-src 'none'" in page
    shown = "".join(found.text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\ufeff]", shown)
    return shown
