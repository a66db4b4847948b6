"""Incidents as a run leaves them, and text that would do harm where it is not escaped."""

import torch
from markdown_it import MarkdownIt

from trl_parity.config.parity import ParityConfig
from trl_parity.records import Diagnosis, Evidence, NamedCause, RolloutBatch, SamplingSettings, ScoredBatch
from trl_parity.results.incident import Incident, windows_in_short
from trl_parity.verdict import MismatchStats, Status, Verdict

HOSTILE = {
    "ticks": "a`b``c` <b>",
    "combining": "\u0301\u20e3x",
    "fence": "```\n# out\n````` ~~~",
    "html": "<script>alert(1)</script><!-- </details> <img src=x onerror=y>",
    "ansi": "\x1b[2J\x1b]0;title\x07\x9b31m\r\b",
    "table": "| a | b |\n| --- | --- |\n|",
    "lines": "a\nb\r\nc\u2028d\x85e\x0bf\x0cg",
    "zero-width": "a\u200bb\ufeffc\u2060d\u00ade\U000e0041\u3164",
    "rtl": "\u202eevil\u2066\u061c שלום مرحبا",
    "markdown": "# h\n- l\n[x](http://evil) ![i](x.png) **b** _i_ &lt; $x$ ~~s~~\n---\n[r]: http://evil",
    "surrogate": '\ud800 \\n "quoted" \x00',
}


def window(step, status=Status.OK, streak=0, k3=1e-4, **values):
    scalars = {"trimmed/kl_k3": k3, "floor/kl_k3": 3e-5, "limit/kl_k3": 1.2e-4, "kl_k3": k3, "reward/mean": 0.5,
               "nonfinite_rate": 0.0, "temperature/trainer": 1.0, "seq/ess": 0.9}  # fmt: skip
    return Verdict(
        step=step, status=status, streak=streak, reason="excess/kl_k3 0.01 > 0.00012", stats=MismatchStats(
            512, 8, 1, 0, scalars | values), breaches=("kl_k3",) if status in (Status.BREACH, Status.HALT) else (),
    )  # fmt: skip


def diagnosis(**overrides):
    def evidence(name, explained=None, **kwargs):
        after = None if explained is None else 0.01 * (1 - explained)
        return Evidence(
            name=name, cause="stale_weights", hypothesis="the engine | holds older weights", prediction="p",
            cost="forward", before=0.01, after=after, explained=explained, **kwargs,
        )  # fmt: skip

    parts = {
        "step": 7,
        "cause": "stale_weights",
        "explained": 0.97,
        "confidence": 0.995,
        "summary": "The engine holds older weights.",
        "fix": "repair the weight sync.",
        "causes": (NamedCause(cause="stale_weights", explained=0.97, confidence=0.995, finding="f", fix="x"),),
        "evidence": (
            evidence("tried", 0.11),
            evidence("older", 0.97, finding="gone", details={"tensors": ["a"], "deep": [{"ids": [4242], "n": 1}]}),
            evidence("looked", finding="all settings agree"),
            evidence("server", error="the engine is behind a server"),
        ),
        "details": {"residual": 0.01, "tokens": 512},
    }
    return Diagnosis(**(parts | overrides)).to_dict()


def make(**overrides):
    verdicts = [window(step) for step in range(1, 7)] + [window(7, Status.HALT, 3, k3=0.01)]
    parts = {
        "step": 7,
        "verdict": verdicts[-1].to_dict(),
        "diagnosis": diagnosis(),
        "engine": {"logprobs_mode": "processed_logprobs", "quantization": None},
        "versions": {"python": "3.11.7"},
        "config": ParityConfig(consecutive=2).to_dict(),
        "windows": windows_in_short(verdicts),
        "text": "trl-parity: HALT at step 7.\n\n  Seen     something",
        "redacted": False,
    }
    return Incident(**(parts | overrides))


def batch(vocabulary=None, rows=3, columns=4, **overrides):
    """Ids count up from 100; sequence b is off by b/10 a token."""
    ids = 100 + torch.arange(rows * columns).reshape(rows, columns)
    ones = torch.ones(rows, columns, dtype=torch.long)
    logprobs = -torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) - 0.5
    trainer = logprobs + torch.arange(rows)[:, None] / 10
    prompt_ids = torch.tensor([[0, 7]] * rows)
    rollout = RolloutBatch(
        prompt_ids=prompt_ids, prompt_mask=torch.tensor([[0, 1]] * rows), completion_ids=ids, completion_mask=ones,
        engine_mask=ones.bool(), rollout_logprobs=logprobs, own_logprobs=None, sampling=SamplingSettings(),
        trainer_temperature=1.0, step=7, sync_step=7, training=True, last_in_step=True,
    )  # fmt: skip
    scored = {"mask": ones.bool(), "rollout_logprobs": logprobs, "trainer_logprobs": trainer,
              "own_logprobs": trainer, "entropy": torch.ones(rows, columns)}  # fmt: skip
    return rollout, ScoredBatch(**(scored | overrides))


def decode(ids):
    return "".join(f"<{i}>" for i in ids)


def hostile_rows(text):
    return [
        {"sequence": 3, "position": i, "token_id": i, "token": text, "prompt": None if i else text,
         "rollout_logprob": -1.0, "trainer_logprob": -1.5, "log_ratio": -0.5, "entropy": None, "compared": True}
        for i in range(3)
    ]  # fmt: skip


def rendered(report):
    """All Markdown tokens of a report, flat."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(report)
    return [inner for token in tokens for inner in [token, *(token.children or [])]]
