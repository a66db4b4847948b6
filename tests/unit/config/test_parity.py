"""Settings: defaults, YAML, the TRL parser, and mistakes."""

import pytest
from support import ROOT

from trl_parity import ParityConfig, Rule
from trl_parity.errors import ConfigError


def test_defaults_are_valid_and_halt_needs_three_windows():
    config = ParityConfig()
    assert config.action == "stop"
    over_windows = ("evidence/", "replica/")  # what they read is of several windows
    for rule in config.resolved_rules():
        assert rule.consecutive == 3 or (rule.stat.startswith(over_windows) and rule.consecutive == 1)


def test_rules_are_laid_over_the_defaults(tmp_path):
    path = tmp_path / "default.yaml"
    path.write_text(
        "consecutive: 2\nrules:\n  kl_k3: {limit: 0.5, immediate: true}\n  ess: {limit: 0.9, below: true}\n"
        "  honesty_gap: null\n  seq/bias_gap: false\n  logp_abs_diff/p99: 3\n"
    )
    rules = {rule.stat: rule for rule in ParityConfig.from_yaml(path).resolved_rules()}
    assert rules["kl_k3"] == Rule(
        stat="kl_k3", limit=0.5, k=5.0, ceiling=0.1, absolute=0.01, immediate=True, consecutive=2
    )
    assert rules["ess"] == Rule(stat="ess", limit=0.9, below=True, consecutive=2)
    assert rules["logp_abs_diff/p99"].limit == 3
    assert rules["logp_abs_diff/p99"].k is None  # a bare number is an absolute limit
    assert "honesty_gap" not in rules
    assert "seq/bias_gap" not in rules
    assert "nonfinite_rate" in rules


def test_rule_objects_are_accepted_and_survive_a_round_trip():
    config = ParityConfig(rules=[Rule(stat="ess", limit=0.5, below=True, consecutive=7)])
    again = ParityConfig.from_mapping(config.to_dict())
    assert again.resolved_rules() == config.resolved_rules()
    assert Rule(stat="ess", limit=0.5, below=True, consecutive=7) in config.resolved_rules()


def test_temperature_phases_are_in_order_of_their_steps():
    config = ParityConfig(temperatures='{"train@200": 1.0, "eval": 0, "train": 0.7}')
    assert config.temperature_phases() == {"train": [(0, 0.7), (200, 1.0)], "eval": [(0, 0.0)]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every_n_step": 5}, "did you mean 'every_n_steps'"),
        ({"action": "halt"}, "Expected one of: log, skip_update, stop, raise"),
        ({"every_n_steps": 0}, ">= 1"),
        ({"every_n_steps": True}, ">= 1"),
        ({"every_n_steps": "ten"}, ">= 1"),
        ({"rules": {"kl_k4": 1.0}}, "did you mean 'kl_k3'"),
        ({"rules": {"kl_k3": {"limits": 1.0}}}, "did you mean 'limit'"),
        ({"rules": {"chi2": {"below": True}}}, "no limit"),
        ({"rules": {"chi2": None}}, "no default rule"),
        ({"rules": {"chi2": {"limit": 1, "k": 3}}}, "no noise floor"),
        ({"rules": {"kl_k3": {"k": 0.5}}}, ">= 1"),
        ({"rules": {"ess": {"limit": 0.5, "k": 3, "below": True}}}, "both k and below"),
        ({"rules": {"chi2": {"limit": 1, "ceiling": 3}}}, "sets ceiling but no k"),
        ({"rules": {"kl_k3": {"ceiling": -0.1}}}, "ceiling is -0.1. Expected a number >= 0"),
        ({"rules": {"kl_k3": {"absolute": True}}}, "absolute is True. Expected a number >= 0"),
        ({"rules": {"kl_k3": {"warn": 2}}}, "0 to 1"),
        ({"rules": {"kl_k3": {"warn": -0.1}}}, "warn is -0.1. Expected a number >= 0"),
        ({"temperatures": {"training": 1.0}}, "Expected 'train', 'eval' or 'train@<step>'"),
        ({"temperatures": {"train": "hot"}}, "Expected a number"),
        ({"floor_cost_share": 2}, "0 to 1"),
        ({"server_timeout": 0}, "more than 0"),
        ({"reward_window": 5}, ">= 20"),
        ({"on_state_mismatch": "ignore"}, "Expected one of: restart, error"),
        ({"rules": {"kl_k3": "high"}}, "Expected a number"),
        ({"rules": {"kl_k3": float("nan")}}, "Expected a number"),
        ({"rules": {"kl_k3": {"consecutive": 0}}}, ">= 1"),
        ({"rules": 3}, "Expected a mapping"),
        ({"rules": "{kl_k3: 1"}, "not valid JSON"),
    ],
)
def test_a_mistake_is_named_with_what_to_do(values, message):
    with pytest.raises(ConfigError, match=message):
        ParityConfig.from_mapping(values)


@pytest.mark.parametrize("warn", [0.0, 1.0])
def test_the_ends_of_what_a_rule_may_say_are_allowed(warn):
    Rule(stat="kl_k3", limit=-1.0, k=1.0, ceiling=0.0, absolute=0.0, warn=warn, consecutive=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("every_n_steps: [", "not valid YAML"),
        ("- 1\n", "Expected a mapping"),
        ("acton: log\n", "did you mean 'action'"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        ParityConfig.from_yaml(path)
    with pytest.raises(ConfigError, match="cannot read"):
        ParityConfig.from_yaml(tmp_path / "missing.yaml")


@pytest.mark.slow_unit
def test_the_trl_parser_takes_it_beside_grpo_and_model_arguments(tmp_path):
    from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\naction: log\nrules:\n  kl_k3: {{limit: 0.25}}\n")
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig, ParityConfig))
    *_, parity = parser.parse_args_and_config(["--config", str(path), "--every_n_steps", "7", "--dataset_name", "x"])
    assert (parity.action, parity.every_n_steps) == ("log", 7)
    assert next(r.limit for r in parity.resolved_rules() if r.stat == "kl_k3") == 0.25
    *_, parity = parser.parse_args_and_config(
        ["--output_dir", str(tmp_path), "--use_cpu", "--dataset_name", "x", "--rules", '{"ess": {"limit": 0.5}}']
    )
    assert next(r.limit for r in parity.resolved_rules() if r.stat == "ess") == 0.5


def test_the_commented_yaml_holds_every_setting_at_its_default():
    from dataclasses import fields

    import yaml

    path = ROOT / "configs" / "default.yaml"
    assert set(yaml.safe_load(path.read_text())) == {f.name for f in fields(ParityConfig)}
    written, default = ParityConfig.from_yaml(path), ParityConfig()
    assert written.resolved_rules() == default.resolved_rules()
    assert written.to_dict() | {"rules": None} == default.to_dict()
