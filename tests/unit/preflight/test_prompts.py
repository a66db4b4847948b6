"""Prompts drawn over real tokenizers: the recipe's characters, and a byte-level BPE with a chat template."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.models import save_tokenizer
from support.processes import environment

from trl_parity.errors import ConfigError, DataError
from trl_parity.preflight.baseline.sources import FilePrompts
from trl_parity.preflight.prompts.cases import Case, Prompt, Vocabulary, read_jsonl
from trl_parity.preflight.prompts.prompts import batches, draw, prompts, shrink, stream

MAX_LEN, BOUNDARIES = 200, (16, 64)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_bpe(directory):
    """A byte-level BPE trained on this repository's own words: every byte a token, as in the large ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=core)
    fast.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    fast.pad_token = fast.eos_token
    fast.chat_template = CHATML
    fast.save_pretrained(directory)
    return fast


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("characters"))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return save_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module", params=["characters", "bpe"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_a_vocabulary_has_every_token_once_as_what_it_is(characters, bpe):
    few, many = Vocabulary.of(characters), Vocabulary.of(bpe)
    for vocabulary, tokenizer in ((few, characters), (many, bpe)):
        assert sorted(vocabulary.ordinary + vocabulary.special) == list(range(len(tokenizer)))
        assert set(vocabulary.special) == set(tokenizer.all_special_ids)
        assert set(vocabulary.unicode) <= set(vocabulary.ordinary)
    assert few.unicode == ()
    assert few.chats == ()
    # a byte that is no character by itself, and none of the printable ones
    assert bpe.convert_tokens_to_ids("Ã") in many.unicode
    assert bpe.convert_tokens_to_ids("a") not in many.unicode
    before, after = many.chats[0]
    assert bpe.decode(before + after) == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    assert any("世界" in bpe.decode(text) for text in many.text)


def test_ids_the_model_has_no_embedding_for_are_left_out(bpe):
    vocabulary = Vocabulary.of(bpe, size=300)
    assert max(vocabulary.ordinary) < 300
    assert vocabulary.special == ()
    assert all(i < 300 for p in draw(prompts(vocabulary, 100), 100, seed=0) for i in p.ids)


def test_a_tokenizer_without_ordinary_tokens_is_refused(bpe):
    with pytest.raises(ConfigError, match="no ordinary one"):
        Vocabulary.of(bpe, size=0)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
@pytest.mark.slow_unit
def test_every_prompt_and_batch_keeps_to_its_bounds(tokenizer, data):
    vocabulary = Vocabulary.of(tokenizer)
    max_len = data.draw(st.integers(1, 3000))
    boundaries = data.draw(st.lists(st.integers(1, 4000), max_size=3))
    max_batch = data.draw(st.integers(1, 5))
    batch = data.draw(batches(vocabulary, max_len, boundaries, max_batch).hypothesis())
    assert 1 <= len(batch) <= max_batch
    known = {*vocabulary.ordinary, *vocabulary.special}
    for prompt in batch:
        assert 1 <= len(prompt.ids) <= max_len
        assert known.issuperset(prompt.ids)
    assert Case.from_text(Case(batch).to_text()) == Case(batch)


def test_lengths_reach_every_boundary_from_both_sides_and_the_limit(bpe):
    drawn = draw(prompts(Vocabulary.of(bpe), MAX_LEN, BOUNDARIES), 800, seed=0)
    lengths = [len(p.ids) for p in drawn]
    for n in (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 192, 193, MAX_LEN - 1, MAX_LEN):
        assert n in lengths, n
    near = sum(n % 16 in (15, 0, 1) for n in lengths) / len(lengths)
    assert near > 0.5  # 3 in 16 if lengths were uniform
    assert {p.kind for p in drawn} == {"repeat", "random", "code", "special", "unicode", "chat"}
    assert len({i for p in drawn for i in p.ids}) > 0.95 * len(bpe)  # the whole vocabulary, not its beginning


def test_kinds_are_what_they_say(bpe):
    vocabulary = Vocabulary.of(bpe)
    drawn = draw(prompts(vocabulary, 64), 300, seed=1)
    special, ordinary = set(vocabulary.special), set(vocabulary.ordinary)
    for prompt in drawn:
        if prompt.kind in ("repeat", "random", "code", "unicode"):
            assert ordinary.issuperset(prompt.ids)
        if prompt.kind == "special":
            assert special & set(prompt.ids)
        if prompt.kind == "chat":
            assert bpe.decode(prompt.ids).endswith("assistant\n"[-len(prompt.ids) :])
        if prompt.kind == "repeat":
            assert len(set(prompt.ids)) <= 4
    assert any("def mean" in bpe.decode(p.ids) for p in drawn if p.kind == "code")


def test_batches_share_prefixes_and_mix_lengths(bpe):
    drawn = draw(batches(Vocabulary.of(bpe), MAX_LEN, BOUNDARIES, max_batch=6), 100, seed=0)
    shared = [b for b in drawn if len(b) > 1 and all(p.kind.startswith("shared+") for p in b)]
    columns = [list(zip(*(p.ids for p in batch), strict=False)) for batch in shared]
    common = [next((n for n, ids in enumerate(c) if len(set(ids)) > 1), len(c)) for c in columns]
    assert min(common) >= 1
    assert sum(n >= 16 for n in common) > len(common) / 2  # a whole block to share
    assert any(len(set(batch)) == len(batch) for batch in shared)
    assert any(len({len(p.ids) for p in b}) > 2 for b in shared)
    assert any(len(b) > 1 and len(set(b)) == 1 for b in drawn)  # one prompt, several times: a group of GRPO
    assert any(len({len(p.ids) for p in b}) > 2 for b in drawn if not b[0].kind.startswith("shared"))


DRAW = """
import sys, hashlib, mine
from transformers import PreTrainedTokenizerFast
from trl_parity.preflight.prompts.prompts import Vocabulary, batches, draw
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
drawn = draw(batches(Vocabulary.of(tokenizer), 200, (16, 64)), 80, seed=3)
print(hashlib.sha256(repr(drawn).encode()).hexdigest())
"""


@pytest.mark.slow_unit
def test_one_seed_gives_the_same_draws_in_every_process(bpe, tmp_path):
    save_bpe(tmp_path)
    # hypothesis draws numbers it finds in loaded modules
    (tmp_path / "mine.py").write_text("NUMBERS = [17, 33, 47, 55, 61, 77, 99, 101, 131]\n")
    env = environment(PYTHONHASHSEED="7", PYTHONPATH=f"{tmp_path}:{':'.join(sys.path)}")
    command = [sys.executable, "-c", DRAW, str(tmp_path)]
    there = subprocess.run(command, capture_output=True, text=True, env=env, check=True, cwd=tmp_path).stdout
    here = draw(batches(Vocabulary.of(bpe), MAX_LEN, BOUNDARIES), 80, seed=3)
    assert there.strip() == hashlib.sha256(repr(here).encode()).hexdigest()
    strategy = batches(Vocabulary.of(bpe), MAX_LEN, BOUNDARIES)
    many = draw(strategy, 100, seed=3)
    assert draw(strategy, 10, seed=3) == many[:10]
    assert draw(strategy, 10, seed=4) != many[:10]
    stepwise = stream(strategy, 3)
    assert [next(stepwise) for _ in range(100)] == many


@pytest.mark.parametrize(
    ("fails", "tokens"),
    [
        (lambda batch: any(len(p.ids) >= 33 for p in batch), 33),
        (lambda batch: len(batch) >= 2 and any(len(p.ids) >= 17 for p in batch), 18),
        (lambda batch: any(len(set(p.ids)) >= 5 for p in batch), 5),
    ],
)
def test_a_failing_case_shrinks_to_a_small_one(bpe, fails, tokens):
    strategy = batches(Vocabulary.of(bpe), MAX_LEN, BOUNDARIES)
    start = next(batch for batch in draw(strategy, 64, seed=0) if fails(batch) and sum(len(p.ids) for p in batch) > 99)
    asked = []

    def watched(batch):
        asked.append(batch)
        return fails(batch)

    small = shrink(strategy, watched, 0, 60, start=start)
    assert fails(small)
    # of 700 tokens: the smallest there is, or a least one near it (a prompt's first 16 tokens shrink one by one)
    assert sum(len(p.ids) for p in small) <= max(2 * tokens, 20)
    assert len(asked) == len(set(asked)) < 400  # an engine answers each
    assert fails(shrink(strategy, fails, 0, 60))  # without a known one


def test_shrinking_keeps_to_its_time_and_never_loses_the_failure(bpe):
    strategy = batches(Vocabulary.of(bpe), MAX_LEN, BOUNDARIES)
    start = draw(strategy, 20, seed=0)[-1]
    asked = []
    assert shrink(strategy, lambda batch: asked.append(batch) or True, 0, 0.0, start=start) == start
    assert asked == []
    with pytest.raises(ConfigError, match="no draw of seed 0 failed"):
        shrink(strategy, lambda batch: False, 0, 0.0)
    answers = iter([True, False] * 5000)  # a case that fails now and then
    assert isinstance(shrink(strategy, lambda batch: next(answers), 0, 3, start=start), tuple)


def test_an_error_of_the_trial_itself_is_not_shrunk(bpe):
    asked = []

    def broken(batch):
        asked.append(batch)
        raise RuntimeError("the engine is gone")

    with pytest.raises(RuntimeError, match="the engine is gone"):
        shrink(batches(Vocabulary.of(bpe), MAX_LEN), broken, 0, 60)
    assert len(asked) == 1


def test_a_case_as_text_is_short_readable_and_needs_no_quotes():
    case = Case((Prompt((7,) * 33, "repeat"), Prompt((5, 5, 1), "shared+code")))
    assert case.to_text() == "repeat:7x33/shared+code:5x2,1"
    long = Case((Prompt(tuple(range(4000)), "random"),))
    assert len(long.to_text()) < 15_000
    assert Case.from_text(long.to_text()) == long
    assert shlex.quote(case.to_text()).strip("'") == case.to_text()
    for text in ("", "repeat", "repeat:", "repeat:1x", "repeat:-1", "z:abc", "code:1,,2", "repeat:5x0", "a:1//b:2"):
        with pytest.raises(ConfigError, match="is no case"):
            Case.from_text(text)


def test_a_users_own_file_is_read_line_by_line(bpe, characters, tmp_path):
    path = tmp_path / "mine.jsonl"
    turns = [{"role": "user", "content": "1+1"}]
    rows = [{"prompt": "def mean", "answer": 1}, {"prompt": turns}, {"prompt_ids": [5, 6, 7]}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    text, chat, ids = read_jsonl(path, bpe, max_len=100)
    assert (text.kind, chat.kind, ids.kind) == ("text", "chat", "ids")
    assert bpe.decode(text.ids) == "def mean"
    assert bpe.decode(chat.ids) == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    assert ids.ids == (5, 6, 7)
    path.write_text('{"prompt": "ok"}\n' + "not json\n")
    reading = read_jsonl(path, bpe, 100)
    assert next(reading).kind == "text"  # before the bad line is seen: nothing is read ahead
    with pytest.raises(DataError, match=r"mine\.jsonl, line 2: "):
        next(reading)


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("[1, 2]", "list"),
        ("{}", "an empty object"),
        ('{"text": "x"}', "text"),
        ('{"prompt": "x", "prompt_ids": [1]}', "prompt, prompt_ids"),
        ('{"prompt": ""}', "0 tokens; expected 1 to 10"),
        ('{"prompt_ids": []}', "0 tokens"),
        ('{"prompt": "a b c d e f g h i j k l m"}', "expected 1 to 10"),
        ('{"prompt_ids": [1, "2"]}', "list of whole numbers"),
        ('{"prompt_ids": [1, true]}', "list of whole numbers"),
        ('{"prompt_ids": [99999]}', "token id 99999"),
        ('{"prompt_ids": [-1]}', "token id -1"),
        ('{"prompt_ids": null}', "list of whole numbers"),
        ('{"prompt": 5}', "a text or a list of messages"),
        ('{"prompt": [{"content": "x"}]}', "a text or a list of messages"),
        ('{"prompt": "x"', "delimiter"),
        (b'{"prompt": "\xff"}', "decode"),
        ('{"prompt_ids": ' + "[" * 5000 + "]" * 5000 + "}", "nested more than 64 deep"),
        ('{"prompt_ids": [' + "9" * 400 + "]}", "a number of about 400 digits"),
        ('{"prompt": "' + "a" * 300 + '"}', "more than 300 bytes"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(bpe, tmp_path, line, seen, monkeypatch):
    if "bytes" in seen:
        monkeypatch.setattr("trl_parity.preflight.prompts.cases.LONGEST_LINE", 300)
    path = tmp_path / "mine.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"prompt_ids": [1]}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"line 2: ") as error:
        list(read_jsonl(path, bpe, 10))
    assert seen in str(error.value)


def test_what_is_no_file_is_neither_waited_for_nor_read_for_ever(bpe, tmp_path):
    path = tmp_path / "pipe.jsonl"
    os.mkfifo(path)
    for place in (path, Path("/dev/zero")):
        with pytest.raises(DataError, match="it is no regular file"):
            list(read_jsonl(place, bpe, 10))
        with pytest.raises(ConfigError, match="it is no regular file"):
            FilePrompts(place, bpe, 10)


def test_a_conversation_needs_a_chat_template(characters, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": [{"role": "user", "content": "1"}]}\n')
    with pytest.raises(DataError, match="no chat template"):
        list(read_jsonl(path, characters, 10))
    with pytest.raises(DataError, match="cannot read"):
        list(read_jsonl(tmp_path / "none.jsonl", characters, 10))


def test_without_hypothesis_the_error_names_feature_package_and_command(tmp_path):
    (tmp_path / "hypothesis.py").write_text("raise ImportError('not here')\n")
    code = (
        "from trl_parity.preflight.prompts.cases import Vocabulary\n"
        "from trl_parity.preflight.prompts.prompts import draw, prompts\n"
        "drawing = prompts(Vocabulary(ordinary=(1, 2)), 3)\ndraw(drawing, 3, 0)\ndrawing.hypothesis()"
    )
    env = environment(PYTHONPATH=f"{tmp_path}:{':'.join(sys.path)}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert "drawing prompts as a strategy needs hypothesis" in done.stderr
    assert "pip install 'trl-parity[preflight]'" in done.stderr
