"""The recipe's own parts: the task and its rewards, the tiny model, the summary's inputs."""

import contextlib
import importlib.util
import itertools
import os
import random
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import ROOT

pytestmark = pytest.mark.slow_unit

RECIPE = ROOT / "recipes" / "grpo"


def load(name):
    """Import a file of the recipe as the recipe's script does: by its bare name, from its own folder."""
    sys.path.insert(0, str(RECIPE))
    try:
        spec = importlib.util.spec_from_file_location(name, RECIPE / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(RECIPE))


task = load("task")
tiny_model = load("tiny_model")
train = load("train")

SHORT = tiny_model.TinySpec(steps=3, batch_size=4)


@pytest.fixture(scope="module")
def short_model(tmp_path_factory):
    return tiny_model.build(tmp_path_factory.mktemp("cache"), spec=SHORT)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("completion", "exact", "close"),
    [
        ("fox mint = 02358", 1.0, 1.0),
        ("= 02358", 1.0, 1.0),
        ("a = b = 02358", 1.0, 1.0),  # the last marker counts
        ("fox = 0 2 3 5 8.", 1.0, 1.0),  # spaces and signs don't
        ("fox = 02385", 0.0, 0.6),
        ("fox = 85320", 0.0, 0.2),  # downwards: only the middle is right
        ("fox = 023", 0.0, 0.6),
        ("fox = 0235802358", 0.0, 0.5),  # longer than asked for: measured against its own length
        ("fox =", 0.0, 0.0),
        ("fox 02358", 0.0, 0.0),  # no marker
        ("", 0.0, 0.0),
    ],
)
def test_rewards_grade_only_what_follows_the_last_marker(completion, exact, close):
    assert task.exact(completions=[completion], answer=["02358"], prompts=["sort 83052:"]) == [exact]
    assert task.closeness(completions=[completion], answer=["02358"], trainer_state=None) == [pytest.approx(close)]


def test_rewards_read_conversations_and_keep_order():
    completions = [[{"role": "assistant", "content": text}] for text in ("= abc", "= ACB", "none")]
    assert task.exact(completions, ["abc"] * 3) == [1.0, 0.0, 0.0]
    assert task.closeness(completions, ["abc"] * 3) == [1.0, pytest.approx(1 / 3), 0.0]


def test_dataset_is_deterministic_and_answers_are_sorted():
    first, again, other = (task.make_dataset(50, seed, "train") for seed in (0, 0, 1))
    assert first.to_list() == again.to_list()
    assert first.to_list() != other.to_list()
    for row in first:
        item = row["prompt"].removeprefix("sort ").removesuffix(":")
        assert row["answer"] == "".join(sorted(item))
        assert len(set(item)) == 5


def test_train_and_eval_are_disjoint_whatever_the_seed():
    train_items = set(itertools.islice(task.items(0, "train"), 3000))
    eval_items = set(itertools.islice(task.items(7, "eval"), 1000))
    assert not train_items & eval_items
    assert len(eval_items) > 500


def test_chat_prompts_are_conversations_with_the_same_answer():
    text = task.make_dataset(5, 3, "eval", length=8, alphabet=task.LETTERS)
    chat = task.make_dataset(5, 3, "eval", length=8, alphabet=task.LETTERS, chat=True)
    assert text["answer"][:] == chat["answer"][:]
    for row, plain in zip(chat, text, strict=True):
        (turn,) = row["prompt"]
        assert turn["role"] == "user"
        assert " ".join(plain["prompt"].removeprefix("sort ").removesuffix(":")) in turn["content"]
        assert row["answer"] not in turn["content"]


@pytest.mark.parametrize("wrong", [{"split": "test"}, {"length": 11}, {"length": 0}])
def test_wrong_task_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        task.make_dataset(1, 0, wrong.pop("split", "train"), **wrong)


def test_tokenizer_gives_back_every_completion(short_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(short_model)
    rng = random.Random(0)
    for item in itertools.islice(task.items(0, "train"), 50):
        text = task.text_prompt(item) + tiny_model.demonstration(item, rng, SHORT)
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer(tiny_model.EOS)["input_ids"] == [tokenizer.eos_token_id]
    assert tokenizer.chat_template is None


def test_model_is_the_same_bit_for_bit_when_built_twice(short_model, tmp_path):
    again = weights(tiny_model.build(tmp_path, spec=SHORT))
    assert again.keys() == weights(short_model).keys()
    assert all(torch.equal(again[name], value) for name, value in weights(short_model).items())
    other = weights(tiny_model.build(tmp_path, spec=replace(SHORT, seed=1)))
    assert not all(torch.equal(again[name], value) for name, value in other.items())


def test_model_loads_in_fp32_and_ends_at_the_tokenizers_end(short_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(short_model)
    tokenizer = AutoTokenizer.from_pretrained(short_model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.head_dim == 32


def test_second_build_takes_the_cache(short_model, monkeypatch):
    monkeypatch.setattr(tiny_model, "train", lambda *_: pytest.fail("trained again"))
    assert tiny_model.build(short_model.parent, spec=SHORT) == short_model


def test_the_loser_of_a_race_takes_the_winners_model(tmp_path, monkeypatch):
    real_train = tiny_model.train

    def train_while_another_finishes(spec, tokenizer):
        monkeypatch.setattr(tiny_model, "train", real_train)
        tiny_model.build(tmp_path, spec=spec)
        return real_train(spec, tokenizer)

    monkeypatch.setattr(tiny_model, "train", train_while_another_finishes)
    folder = tiny_model.build(tmp_path, spec=SHORT)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]  # no drafts are left
    assert (folder / "config.json").exists()


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_model, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_model.build(tmp_path, spec=SHORT)
    assert list(tmp_path.iterdir()) == []


def test_build_leaves_random_state_and_threads_alone(tmp_path):
    torch_state, python_state, threads = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    tiny_model.build(tmp_path, spec=SHORT)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert torch.get_num_threads() == threads


def test_wandb_login_is_found_in_key_or_netrc(tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert not train.wandb_login()
    netrc.write_text("machine api.wandb.ai login user password example\n")
    netrc.chmod(0o600)
    assert train.wandb_login()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not train.wandb_login()
    monkeypatch.setenv("WANDB_API_KEY", "example")
    assert train.wandb_login()


@pytest.mark.parametrize("name", ["grpo_tiny_cpu.yaml", "grpo_gpu.yaml"])
def test_configs_name_only_known_arguments(name, tmp_path, monkeypatch):
    """Parsing builds GRPOConfig too, which refuses bf16 without a GPU: the GPU file is parsed for a CPU."""
    monkeypatch.setattr(train.os, "environ", dict(train.os.environ))
    extra = ["--use_cpu", "true"] if name == "grpo_gpu.yaml" else []
    config = RECIPE.parent.parent / "configs" / name
    recipe, args, model_args, parity_args = train.parse(
        ["--config", str(config), "--output_dir", str(tmp_path), *extra]
    )
    assert args.use_vllm
    assert args.output_dir == str(tmp_path)
    assert (model_args.model_name_or_path == train.TINY) == (name == "grpo_tiny_cpu.yaml")
    assert recipe.train_size * args.num_generations >= args.per_device_train_batch_size
    assert parity_args.action == "stop"


def test_the_demo_ends_with_commands_that_can_be_typed_ours_first(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "finish_wandb", lambda: Path("runs/wandb/offline-run-1"))
    windows = [{"status": "OK", "step": 1, "breaches": [], "kl_k3": 1e-5, "logp_abs_diff/max": 0.1}]
    args = SimpleNamespace(output_dir="runs/mine", report_to=["wandb"])
    train.summarize(windows, tmp_path / "metrics.jsonl", [], args, halted=False)
    told = [line.split(":", 1)[1].split() for line in capsys.readouterr().out.splitlines() if line[:1].isalpha()]
    commands = [words for words in told if len(words) > 1 and "/bin/" in words[0]]
    assert [Path(words[0]).name for words in commands] == ["trl-parity", "trl-parity", "wandb", "wandb", "wandb"]
    assert all(shutil.which(words[0]) for words in commands)
    monkeypatch.setenv("VIRTUAL_ENV", str(Path(sys.executable).parent.parent))
    assert train.command("trl-parity") == "trl-parity"


def test_each_step_of_the_demo_shows_its_status():
    assert [train.status_name(code) for code in (0, 3.0, -2, None)] == ["OK", "HALT", "ERROR", "-"]


def test_two_demos_that_start_at_once_have_ports_of_their_own(monkeypatch):
    for name in ("MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HUB_OFFLINE", "VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL", "WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.setenv(name, os.environ.get(name, "offline"))
    taken = []
    with socket.socket() as first:
        with contextlib.suppress(OSError):  # somebody has it already
            first.bind(("127.0.0.1", 29500))
        for _ in range(2):
            os.environ.pop("MASTER_PORT", None)
            train.set_environment([])
            taken.append(socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))))
    for server in taken:
        server.close()
    monkeypatch.setenv("MASTER_PORT", "1234")  # the launcher's, or the user's
    train.set_environment([])
    assert os.environ["MASTER_PORT"] == "1234"
