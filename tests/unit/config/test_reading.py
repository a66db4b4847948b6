"""Settings as people write them: numbers, errors, and that every door reads them alike."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from trl_parity import ParityConfig
from trl_parity.cli import main
from trl_parity.config.reading import assignments, from_json, from_yaml, read_mapping, settings
from trl_parity.engine.config import read_engine_config
from trl_parity.errors import ConfigError
from trl_parity.results.rejudge import changed_config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("7e-1", 0.7),
        ("1E5", 1e5),
        ("+1e3", 1000.0),
        ("-2.5e-3", -0.0025),
        (".5", 0.5),
        ("-.5e1", -5.0),
        ("1.", 1.0),
        ("1.e5", 1e5),
        ("1.5e+3", 1500.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("0.5", 0.5),
        ("1_000.5", 1000.5),
    ],
)
def test_a_float_of_yaml_1_2_is_a_number(text, value):
    found = from_yaml(text, "here")
    assert isinstance(found, float)
    assert found == value
    assert from_yaml(f"x: [{text}]", "here") == {"x": [value]}


@pytest.mark.parametrize("text", ["2024-01-01", "2024-02-31", "2024-01-01T10:00:00Z"])
def test_a_date_is_text_whatever_else_is_loaded(text, monkeypatch):
    assert from_yaml(f"name: {text}", "here") == {"name": text}
    # as lm-format-enforcer does for the whole process
    monkeypatch.setitem(yaml.SafeLoader.yaml_constructors, "tag:yaml.org,2002:timestamp", lambda *_: "changed")
    assert from_yaml(f"name: {text}", "here") == {"name": text}


def test_nan_is_a_number():
    assert math.isnan(from_yaml(".nan", "here"))
    assert math.isnan(from_yaml(".NaN", "here"))


@pytest.mark.parametrize(
    "text",
    [
        "1", "-7", "0x1e5", "010", "1_000", "e5", "1e", "1e-", ".", ".e3", "1e3x", "1.2.3", "v1e3", "inf", "nan",
        "'1e3'", "on", "off", "yes", "no", "true", "null", "~", "{a: 1, b: [2]}", "", "bfloat16",
        "12:30",
    ],
)  # fmt: skip
def test_everything_else_is_what_pyyaml_makes_of_it(text):
    found, theirs = from_yaml(text, "here"), yaml.safe_load(text)
    assert found == theirs
    assert type(found) is type(theirs)


def test_the_base_loader_is_left_alone():
    from_yaml("1e-3", "here")
    assert yaml.safe_load("1e-3") == "1e-3"


def test_every_door_reads_a_float_alike(tmp_path, capsys):
    path = tmp_path / "x.yaml"
    path.write_text("floor_cost_share: 1e-3\nrules: {kl_k3: {limit: 5e-4}}\n")
    config = ParityConfig.from_yaml(path)
    assert config.floor_cost_share == 0.001
    assert {r.stat: r.limit for r in config.resolved_rules()}["kl_k3"] == 5e-4
    assert changed_config(config, ["rules.kl_k3.limit=1e-5"]).rules["kl_k3"]["limit"] == 1e-5
    path.write_text("gpu_memory_utilization: 5e-1\n")
    assert read_engine_config(path).engine == {"gpu_memory_utilization": 0.5}
    path.write_text("temperature: 7e-1\nuse_vllm: true\n")
    assert main(["lint", str(path), "--set", "temperature=7e-1", "--json"]) == 0
    assert all(finding["cause"] != "temperature" for finding in json.loads(capsys.readouterr().out))


def test_set_takes_names_and_values_in_order():
    assert assignments(["a.b=1", "c = [1e-2, x]", "a.b="], "x=1") == [("a.b", 1), ("c", [0.01, "x"]), ("a.b", None)]
    assert settings(["a=1", "a=2=3"], "x=1") == {"a": "2=3"}
    for wrong in ("a", "=1", " =1"):
        with pytest.raises(ConfigError, match=r"--set .* has no '='\. Expected NAME=VALUE, e\.g\. --set top_p=0\.9\."):
            settings([wrong], "top_p=0.9")
    with pytest.raises(ConfigError, match=r"--set 'a=\[1' is not valid YAML"):
        settings(["a=[1"], "x=1")


def test_a_file_that_is_none_says_what_was_seen_and_expected(tmp_path):
    path = tmp_path / "x.yaml"
    with pytest.raises(ConfigError, match=r"cannot read .*x\.yaml: .*Expected a YAML file of settings\."):
        read_mapping(path, "a: 1")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"x\.yaml is not valid YAML"):
        read_mapping(path, "a: 1")
    path.write_text("a: 0x_\n")  # a number that is none
    with pytest.raises(ConfigError, match=r"x\.yaml is not valid YAML: invalid literal"):
        read_mapping(path, "a: 1")
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"x\.yaml holds a list\. Expected a mapping such as 'a: 1'\."):
        read_mapping(path, "a: 1")
    path.write_text("# nothing\n")
    assert read_mapping(path, "a: 1") == {}


def test_json_that_is_none_is_named():
    assert from_json('{"a": 1e-3}', "rules") == {"a": 0.001}
    with pytest.raises(ConfigError, match=r"rules is not valid JSON .*: '\{a'"):
        from_json("{a", "rules")
    with pytest.raises(ConfigError, match="rules is not valid JSON"):
        ParityConfig(rules="[" * 100_000)
