"""A reference baseline of a tiny model: what it holds, that it is the same bytes, that it goes on, what is refused."""

import json
import shutil
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support import warm
from support.models import save_tiny_model, save_tokenizer
from support.processes import PATH, environment, run_on_two_ranks

from trl_parity.cli import main
from trl_parity.errors import ConfigError, DataError
from trl_parity.preflight.baseline.baseline import model_sha256, open_baseline, tokenizer_sha256
from trl_parity.preflight.baseline.generate import make_baseline
from trl_parity.preflight.baseline.settings import Generation
from trl_parity.preflight.baseline.sources import DrawnPrompts
from trl_parity.preflight.prompts.cases import Vocabulary

pytestmark = pytest.mark.slow_unit

NEW = 12
ARGS = ("--num-prompts", "20", "--shard-size", "8", "--max-prompt-tokens", "60", "--max-new-tokens", str(NEW))
ARGS += ("--batch-size", "8", "--top-k", "5", "--seeds", "0", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def make(model_dir, directory, *more):
    return main(["baseline", "--model", str(model_dir), "--output", str(directory), *ARGS, *map(str, more)])


@pytest.fixture(scope="module")
def made(model_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("baselines") / "made"
    assert make(model_dir, directory) == 0
    return directory


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def files(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def model(model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64).eval()


def test_rows_hold_what_the_model_says_token_by_token(made, model, model_dir):
    baseline = open_baseline(made, model=model_dir, tokenizer=model_dir)
    rows = list(baseline.rows())
    assert [(row["index"], row["greedy"], row["seed"]) for row in rows] == [
        (index, seed is None, seed) for index in range(20) for seed in (None, 0, 3)
    ]
    assert len(baseline) == 60
    lengths = set()
    for row in rows:
        prompt, answer = row["prompt_ids"], row["token_ids"]
        lengths.add(len(answer))
        with torch.no_grad():  # no cache, no padding, fp64: another way to the same numbers
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        law = logits.log_softmax(-1)
        taken = law[range(len(answer)), answer]
        assert torch.allclose(torch.tensor(row["logprobs"]).double(), taken, atol=1e-4)
        assert torch.allclose(torch.tensor(row["entropy"]).double(), -(law.exp() * law).sum(-1), atol=1e-4)
        top = law.topk(5, dim=-1)
        assert torch.allclose(torch.tensor(row["topk_logprobs"]).double(), top.values, atol=1e-4)
        assert row["topk_ids"] == top.indices.tolist()
        if row["greedy"]:
            assert answer == logits.argmax(-1).tolist()
        else:  # the token in whose share of the unit interval the number drawn for (seed, prompt, place) falls
            draws = np.random.Generator(np.random.PCG64([row["seed"], row["index"]])).random(NEW)
            edges = np.cumsum(law.exp().numpy(), axis=-1)
            assert answer == [int(np.searchsorted(edges[t], draws[t])) for t in range(len(answer))]
        ended = model.generation_config.eos_token_id
        assert ended not in answer[:-1]
        assert answer[-1] == ended or len(answer) == NEW
    assert min(lengths) < NEW  # an answer that ended by itself, beside others that did not
    sampled = {tuple(row["token_ids"]) for row in rows if not row["greedy"]}
    assert len(sampled) > 35


def test_the_manifest_says_who_made_it_with_what(made, model_dir):
    import transformers

    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["complete"] is True
    assert manifest["settings"]["model_sha256"] == model_sha256(model_dir)
    assert manifest["settings"]["tokenizer_sha256"] == tokenizer_sha256(model_dir)
    assert manifest["settings"]["dtype"] == "float32"
    assert manifest["settings"]["generation"]["seeds"] == [0, 3]
    assert manifest["settings"]["generation"]["batch_size"] == 8
    assert manifest["settings"]["prompts"]["source"] == "strategies"
    assert manifest["versions"]["transformers"] == transformers.__version__
    assert [shard["rows"] for shard in manifest["shards"]] == [24, 24, 12]


def test_the_same_command_gives_the_same_bytes(made, model_dir, tmp_path, capsys):
    assert make(model_dir, tmp_path / "again") == 0
    assert files(tmp_path / "again") == files(made)
    before = {path: path.stat().st_mtime_ns for path in made.glob("shard-*")}
    assert make(model_dir, made) == 0  # nothing left to do: nothing is written anew
    assert {path: path.stat().st_mtime_ns for path in made.glob("shard-*")} == before
    assert "60 rows of 20 prompts in 3 shards" in capsys.readouterr().out


def test_two_processes_write_the_bytes_of_one(made, model_dir, tmp_path):
    code = "import sys\nfrom accelerate import PartialState\nfrom trl_parity.cli import main\n"
    code += "code = main(sys.argv[1:])\nassert PartialState().num_processes == 2\nsys.exit(code)"
    arguments = ("baseline", "--model", model_dir, "--output", tmp_path / "both", *ARGS)
    run_on_two_ranks(code, tmp_path, *arguments)
    assert files(tmp_path / "both") == files(made)


def test_a_killed_run_goes_on_where_it_was(model_dir, tmp_path):
    many = ("--num-prompts", "72")
    command = ["-m", "trl_parity", "baseline", "--model", model_dir, "--output", tmp_path / "killed", *ARGS, *many]
    log = tmp_path / "log"
    run = warm.Child(command, env=environment(OMP_NUM_THREADS="1", PYTHONPATH=PATH), stdout=log, stderr=log)
    try:
        for _ in range(1200):
            if len(shards := list((tmp_path / "killed").glob("shard-*"))) >= 2:
                break
            time.sleep(0.05)
    finally:
        run.kill()
        run.wait()
    assert 2 <= len(shards) < 9
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("shard-*")}
    for path in finished:
        assert pq.read_table(path).num_rows == 24  # whole: an unfinished one has another name
    with pytest.raises(ConfigError, match="is unfinished"):
        open_baseline(tmp_path / "killed")
    (tmp_path / "killed" / ".shard-00008.parquet.1.tmp").write_bytes(b"half")
    victim = sorted(finished)[0]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:400] + bytes([whole[400] ^ 1]) + whole[401:])  # a disk's error
    assert make(model_dir, tmp_path / "killed", *many) == 0
    kept = [path for path in finished if path != victim]
    assert {path: path.stat().st_mtime_ns for path in kept} == {path: finished[path] for path in kept}
    assert victim.read_bytes() == whole
    assert make(model_dir, tmp_path / "through", *many) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "through")


def test_another_batch_size_is_another_baseline(made, model_dir, tmp_path, capsys):
    assert make(model_dir, tmp_path / "alone", "--batch-size", 1) == 0
    ours, theirs = list(open_baseline(tmp_path / "alone").rows()), list(open_baseline(made).rows())
    for a, b in zip(ours, theirs, strict=True):
        assert a["token_ids"] == b["token_ids"]  # what is sampled hangs on seed and prompt, not on the batch
        assert np.allclose(a["logprobs"], b["logprobs"], atol=1e-5)
    assert make(model_dir, made, "--batch-size", 1) == 2
    assert "holds a baseline of other settings: generation.batch_size was 8, is 1." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "seen"),
    [
        (("--dtype", "bfloat16"), "dtype was 'float32', is 'bfloat16'"),
        (("--seeds", 1), "generation.seeds was [0, 3], is [1]"),
        (("--num-prompts", 21), "prompts.count was 20, is 21"),
    ],
)
def test_a_directory_with_other_settings_is_refused_by_name(copy, model_dir, capsys, more, seen):
    before = files(copy)
    assert make(model_dir, copy, *more) == 2
    assert seen in capsys.readouterr().err
    assert files(copy) == before
    (copy / "manifest.json").unlink()
    assert make(model_dir, copy) == 2
    assert "holds shards without a manifest.json" in capsys.readouterr().err


def test_bfloat16_is_what_it_says(made, model_dir, tmp_path):
    assert make(model_dir, tmp_path / "bf16", "--dtype", "bfloat16", "--num-prompts", 4) == 0
    rows = zip(open_baseline(tmp_path / "bf16").rows(), open_baseline(made).rows(), strict=False)
    gaps = [abs(a["logprobs"][0] - b["logprobs"][0]) for a, b in rows if a["token_ids"][0] == b["token_ids"][0]]
    assert 1e-4 < max(gaps) < 0.5


def test_what_is_corrupt_is_refused_by_name(copy):
    shard, manifest = copy / "shard-00001.parquet", copy / "manifest.json"
    whole, said = shard.read_bytes(), manifest.read_text()

    def refused(kind, match):
        with pytest.raises(kind, match=match):
            open_baseline(copy)
        shard.write_bytes(whole)
        manifest.write_text(said)
        open_baseline(copy)

    shard.write_bytes(whole[:-100])
    refused(DataError, r"shard-00001\.parquet is corrupt: .* bytes, expected")
    shard.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    refused(DataError, r"shard-00001\.parquet is corrupt")
    shard.unlink()
    refused(DataError, r"shard-00001\.parquet is missing")
    manifest.write_text(said[:-20])
    refused(DataError, r"manifest\.json is not valid JSON")
    manifest.write_text("[]")
    refused(DataError, "holds a list")
    manifest.write_text(json.dumps({"schema_version": 1, "complete": True}))
    refused(DataError, "has no settings")
    manifest.write_text(json.dumps(json.loads(said) | {"shards": [{"file": "x"}]}))
    refused(DataError, "has a shard without")
    for wrong, seen in (
        ({"bytes": "many"}, r"has shards\[0\]\.bytes as str"),
        ({"file": 5}, r"has shards\[0\]\.file as int"),
        ({"file": "../elsewhere.parquet"}, r"'\.\./elsewhere\.parquet', which is no name in its folder"),
    ):
        one = json.loads(said)
        one["shards"][0] |= wrong
        manifest.write_text(json.dumps(one))
        refused(DataError, seen)
    (copy.parent / "elsewhere.parquet").write_bytes(whole)
    shard.unlink()
    shard.symlink_to(copy.parent / "elsewhere.parquet")
    with pytest.raises(DataError, match="can't be read: it is a link out of its folder"):
        open_baseline(copy)


def test_what_is_foreign_is_refused_by_name(copy, model_dir, tmp_path):
    other = save_tiny_model(tmp_path / "other", logit_std=2.1)
    with pytest.raises(ConfigError, match=r"is of another model: .*SHA-256.*other"):
        open_baseline(copy, model=other)
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    open_baseline(copy, tokenizer=tokenizer)
    tokenizer.padding_side = "left"  # says nothing about ids
    open_baseline(copy, tokenizer=tokenizer)
    tokenizer.add_tokens(["£"])
    with pytest.raises(ConfigError, match="is of another tokenizer"):
        open_baseline(copy, tokenizer=tokenizer)
    path = copy / "manifest.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"schema_version": 2}))
    with pytest.raises(ConfigError, match=r"schema_version 2\. Expected 1: .*, or update this one"):
        open_baseline(copy)
    path.write_text(json.dumps(said | {"versions": said["versions"] | {"transformers": "4.57.1"}}))
    with pytest.raises(ConfigError, match=r"made with transformers 4\.57\.1, here is"):
        open_baseline(copy)
    path.write_text(json.dumps(said | {"versions": {"torch": "2.9"}}))
    with pytest.raises(DataError, match=r"corrupt: no version of trl_parity"):
        open_baseline(copy)
    with pytest.raises(ConfigError, match=r"holds no manifest\.json"):
        open_baseline(tmp_path)
    with pytest.raises(ConfigError, match="is no folder here"):
        open_baseline(made_of(copy, said), model=tmp_path / "gone")


def made_of(directory, manifest):
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_a_models_hash_is_of_its_weights_and_config(model_dir, tmp_path):
    same = shutil.copytree(model_dir, tmp_path / "same")
    config = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps(config | {"transformers_version": "5.99"}))
    assert model_sha256(same) == model_sha256(model_dir)
    (same / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert model_sha256(same) != model_sha256(model_dir)


def test_prompts_of_a_file(model_dir, tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(11)))
    assert make(model_dir, tmp_path / "mine", "--prompts", path, "--num-prompts", 10, "--seeds") == 0
    rows = list(open_baseline(tmp_path / "mine").rows())
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    assert [tokenizer.decode(row["prompt_ids"]) for row in rows] == [f"{i}+{i}=" for i in range(10)]
    assert {row["kind"] for row in rows} == {"text"}
    path.write_text(path.read_text() + "{}\n")
    assert make(model_dir, tmp_path / "mine", "--prompts", path, "--num-prompts", 10, "--seeds") == 2
    assert "prompts.sha256 was" in capsys.readouterr().err
    assert make(model_dir, tmp_path / "bad", "--prompts", path, "--num-prompts", 12) == 2
    assert "mine.jsonl, line 12: an empty object" in capsys.readouterr().err


def test_prompts_are_taken_in_one_shard_at_a_time(model_dir, tmp_path):
    """However many there are: the next shard is asked for when the one before is on disk."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tmp_path / "streamed"

    class Watched(DrawnPrompts):
        def shards(self, size, wanted):
            for number, prompts in super().shards(size, wanted):
                assert len(list(directory.glob("shard-*"))) == number
                yield number, prompts

    source = Watched(Vocabulary.of(AutoTokenizer.from_pretrained(model_dir)), 9, 0, 20)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    make_baseline(directory, model, source, Generation(max_new_tokens=2, shard_size=2), {})
    assert len(open_baseline(directory)) == 18


def test_a_model_that_computes_nan_is_no_reference(model_dir, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    broken = AutoModelForCausalLM.from_pretrained(model_dir)
    broken.get_input_embeddings().weight.data[5] = float("nan")
    directory = shutil.copytree(model_dir, tmp_path / "broken")
    broken.save_pretrained(directory)
    assert make(directory, tmp_path / "none") == 2
    assert "are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "seen"),
    [
        (("--max-prompt-tokens", 510), "prompts of 510 tokens and 12 new ones; the model's context is 512"),
        (("--no-greedy", "--seeds"), "neither greedy nor a seed"),
        (("--temperature", 0), "temperature is 0.0"),
        (("--batch-size", 0), "batch_size is 0"),
        (("--prompts", "/nowhere.jsonl"), "cannot read /nowhere.jsonl"),
        (("--model", "/nowhere"), "is no folder here"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(model_dir, tmp_path, capsys, more, seen):
    assert make(model_dir, tmp_path / "none", *more) == 2
    assert seen in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
