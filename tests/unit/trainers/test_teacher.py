"""What is seen of a teacher's answers without its weights; its client goes on as it was."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch

from trl_parity.metrics.statistics import compute
from trl_parity.metrics.sums import MismatchSums
from trl_parity.trainers.teacher import TeacherAnswers

VOCABULARY = 40


class Client:
    """Log-probs of one law at every place, in the form of TRL's client."""

    def __init__(self, *, knows_temperature=True, logits=False, nothing_for=(), vocabulary=VOCABULARY):
        self.law = torch.linspace(0.0, 4.0, vocabulary)
        self.knows_temperature, self.logits, self.nothing_for = knows_temperature, logits, nothing_for
        self.asked = []

    def get_sequence_logprobs(self, sequences, prompt_lengths, top_logprobs=3, temperature=1.0):
        self.asked.append((sequences, temperature))
        numbers = (
            self.law if self.logits else (self.law / (temperature if self.knows_temperature else 1.0)).log_softmax(-1)
        )
        most = numbers.topk(top_logprobs)
        answer = {"logprobs": [], "logprob_token_ids": [], "actual_logprobs": []}
        for ids, start in zip(sequences, prompt_lengths, strict=True):
            answered = ids[start:]
            answer["logprobs"].append([[*most.values.tolist(), -math.inf]] * len(answered))
            answer["logprob_token_ids"].append([[*most.indices.tolist(), 0]] * len(answered))
            answer["actual_logprobs"].append(
                [[-math.inf if i in self.nothing_for else float(numbers[i % VOCABULARY])] for i in answered]
            )
        return answer


def told(client, *, temperature=0.5, sequences=([1, 2, 3, 4, 5], [1, 6, 7])):
    """What a window says after the trainer asked once."""
    answers = TeacherAnswers(client, VOCABULARY)
    plain = Client.get_sequence_logprobs(client, sequences, [2, 1], temperature=temperature)
    assert client.get_sequence_logprobs(sequences, [2, 1], temperature=temperature) == plain
    counts, maxima = answers.taken()
    assert answers.taken() == ({}, {})
    sums = MismatchSums.zeros()
    sums.bump(**counts)
    sums.raise_to(**maxima)
    return {name.removeprefix("teacher/"): x for name, x in compute(sums).items() if name.startswith("teacher/")}


def test_a_teacher_that_answers_what_it_was_asked_for():
    client = Client()
    found = told(client)
    law = (client.law / 0.5).log_softmax(-1)
    assert found == {
        "logprob": pytest.approx(float(law[[3, 4, 5, 6, 7]].mean())),
        "temperature_gap": 0.0,
        "mass": pytest.approx(float(law.exp().topk(3).values.sum())),
        "mass_max": pytest.approx(float(law.exp().topk(3).values.sum())),
        "missing": 0.0,
        "foreign": 0.0,
    }


def test_a_server_that_leaves_the_temperature_aside_is_found_out_once():
    client = Client(knows_temperature=False)
    answers = TeacherAnswers(client, VOCABULARY)
    for _ in range(3):
        client.get_sequence_logprobs([[1], [1, 2, *range(3, 40)]], [1, 2], temperature=0.7)
    assert answers.taken()[1]["teacher_temperature_gap"] == pytest.approx(0.3)
    extra = [(sequences, temperature) for sequences, temperature in client.asked if len(sequences) == 1]
    assert extra == [([[1, 2, *range(3, 19)]], 0.7), ([[1, 2, *range(3, 19)]], 1.0)]
    client.get_sequence_logprobs([[1, 2, 3]], [2], temperature=1.0)
    assert answers.taken()[1]["teacher_temperature_gap"] == 0.0


@pytest.mark.parametrize(
    ("client", "name", "at_least"),
    [
        (Client(logits=True), "mass_max", 100.0),
        (Client(nothing_for=(3, 6)), "missing", 0.4),
        (Client(vocabulary=60), "foreign", 0.9),
    ],
)
def test_what_is_no_answer_to_the_loss(client, name, at_least):
    found = told(client)
    assert found[name] >= at_least
    healthy = told(Client())
    assert healthy[name] < at_least / 2


def test_a_failure_of_ours_is_a_warning_and_the_trainer_has_its_answer(caplog):
    client = Client()
    client.law = client.law[:2]  # asked for more than there is: the trainer's own error
    answers = TeacherAnswers(client, VOCABULARY)
    with pytest.raises(RuntimeError):
        client.get_sequence_logprobs([[1, 2]], [1])
    answers.stop()

    class Short(Client):
        def get_sequence_logprobs(self, *args, **kwargs):
            return {"no": "numbers"}

    client = Short()
    answers = TeacherAnswers(client, VOCABULARY)
    with caplog.at_level(logging.WARNING, logger="trl_parity"):
        assert client.get_sequence_logprobs([[1, 2]], [1]) == {"no": "numbers"}
        assert client.get_sequence_logprobs([[1, 2]], [1]) == {"no": "numbers"}
    assert len(caplog.records) == 1
    assert answers.taken() == ({}, {})


def test_the_client_is_left_as_it_was():
    client = Client()
    answers = TeacherAnswers(client, VOCABULARY)
    assert "get_sequence_logprobs" in vars(client)
    answers.stop()
    assert "get_sequence_logprobs" not in vars(client)
    answers.stop()


def test_a_trainer_without_a_teachers_server_has_none():
    class Trainer:
        teacher_client = None

    assert TeacherAnswers.of(SimpleNamespace(trainer=Trainer())) is None
    assert TeacherAnswers.of(SimpleNamespace(trainer=object())) is None
