"""Two architectures on the real engine: one that both libraries compute alike, one whose windows differ by a key."""

import json

import pytest

from trl_parity.cli import main

pytestmark = pytest.mark.engine


def test_an_atlas_tells_agreement_from_a_window_wider_by_one_and_goes_on_where_it_was(tmp_path, capsys):
    command = ["atlas", "--models", "qwen3", "cohere2", "--output", str(tmp_path), "--json"]
    assert main(command) == 1
    rows = {row["model_type"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["qwen3"]["outcome"] == "agrees"
    assert max(rows["qwen3"][side]["max"] for side in ("prefill", "decode", "sync")) < 1e-4
    assert rows["cohere2"]["outcome"] == "deviates"
    assert rows["cohere2"]["prefill"]["first"] == 16  # the first query with 17 keys, of a window of 16
    page = (tmp_path / "atlas.md").read_text()
    assert page.index("cohere2") < page.index("qwen3")

    kept = tmp_path / "Qwen3ForCausalLM.json"
    kept.write_text(kept.read_text().replace('"agrees"', '"kept"'))
    assert main(["atlas", "--models", "qwen3", "--output", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "kept"
