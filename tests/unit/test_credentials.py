"""Keys, tokens and passwords: found by name and by form, and nothing else with them."""

import json
import time

import pytest

from trl_parity import ParityConfig
from trl_parity.credentials import HIDDEN, masked, without_credentials

SECRET = "Zq81xVbn27Lk"

HUB = "hf_" + "AbCdEfGh12345678"


@pytest.mark.parametrize(
    "text",
    [
        f"no answer from http://me:{SECRET}@host:8000/server_info within 5 s", f"https://me:p@{SECRET}@host/v1",
        f"postgres://{SECRET}@host", f"https://h/x?sig={SECRET}&y=1", f"https://h/x?y=1&X-Amz-Signature={SECRET}",
        f"Authorization: Bearer {SECRET}", f"Proxy-Authorization: Basic {SECRET}==", f"X-Api-Key: {SECRET}",
        f"hf_token={SECRET}", f"--hf_token {SECRET} --n 4", f"--api-key={SECRET}", f"HF_TOKEN={SECRET} python x.py",
        f"bash -c 'python x.py --hub_token {SECRET}'", f"{{'hf_token': '{SECRET}', 'n': 1}}",
        json.dumps({"hf_token": f'a"{SECRET}'}), json.dumps(json.dumps({"wandb_api_key": SECRET})),
        f"password: {SECRET}", f'clientSecret="{SECRET}"', f"AWS_SECRET_ACCESS_KEY={SECRET}",
    ],
)  # fmt: skip
def test_what_a_name_or_a_form_gives_away_is_hidden(text):
    assert HIDDEN in masked(text)
    assert SECRET not in masked(text)
    assert masked(masked(text)) == masked(text)


@pytest.mark.parametrize(
    "token",
    [HUB, "sk-" + "a1" * 12, "ghp_" + "a1" * 12, "github_pat_" + "a1" * 12, "glpat-" + "a1" * 12, "AKIA" + "A1" * 8,
     "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghij", "xoxb-" + "1a" * 8],
)  # fmt: skip
def test_tokens_are_known_by_their_form_anywhere(token):
    assert masked(f"it said {token}, and left") == f"it said {HIDDEN}, and left"


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=5, floor_tokens: 2048, token_budget=8192", "eos_token='</s>' pad_token: <pad>",
        "the last token: 0.5 nats, a token: 3", "http://127.0.0.1:8000/v1/completions", "see me@host.org",
        "use_auth_token=None, hf_token=True", "key: 3, monkey=4, stop_token_ids=[1]", "a basic idea; bearer of news",
        "kl_k3 0.5 over 3 x floor (0.1), 3 windows in a row",
    ],
)  # fmt: skip
def test_what_is_none_stays(text):
    assert masked(text) == text


def test_settings_and_commands():
    def command(secret):
        return ["launch", "--hf_token", secret, "--api-key", secret, "--lr", "1e-5", f"-e=A_TOKEN={secret}"]

    assert without_credentials(command(SECRET)) == command(HIDDEN)
    settings = {
        "hf_token": SECRET, "api_key": [SECRET], "eos_token": "</s>", "max_tokens": 5, "token": True, "password": None,
        "deep": [{"db_password": 1234, "url": f"s3://a:{SECRET}@b/c", "dtype": "bfloat16"}],
    }  # fmt: skip
    assert without_credentials(settings) == {
        "hf_token": HIDDEN, "api_key": HIDDEN, "eos_token": "</s>", "max_tokens": 5, "token": True, "password": None,
        "deep": [{"db_password": HIDDEN, "url": f"s3://{HIDDEN}@b/c", "dtype": "bfloat16"}],
    }  # fmt: skip


@pytest.mark.parametrize("args", [{"hf_token": SECRET, "dtype": "bfloat16"}, json.dumps({"hf_token": SECRET})])
def test_a_config_is_kept_without_them_and_everything_else_as_it_was(args):
    config = ParityConfig(engine_args=args)
    assert config.engine_source()["hf_token"] == SECRET  # what the engine gets
    kept = json.dumps(config.to_dict())
    assert SECRET not in kept
    assert "hf_token" in kept
    assert ParityConfig().to_dict() == without_credentials(ParityConfig().to_dict())


def test_no_text_takes_long():
    pieces = ("a-", '"', 'token="', "eyJ-", "eyJaaaaaaaaaa.", "://", "a@", "-----BEGIN PRIVATE KEY-----", "key", "hf_")
    for piece in (*pieces, '\\"', "--token ", "?sig", "bearer "):
        start = time.process_time()
        masked(piece * (10_000 // len(piece)))
        assert time.process_time() - start < 1, piece
