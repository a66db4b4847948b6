"""What a teacher's server answers a trainer that learns from it: is it what the loss takes it for? TRL 1.16.

Trainers with a ``teacher_client`` (ServerDistillation, IW-OPD, SDFT and SDPO with one) ask it for log-probs of the
completions at the student's temperature, and subtract them from the student's. vLLM makes prompt log-probs of the
model's own logits and leaves a temperature aside (0.31; vllm-project/vllm#37082 would add one): at any other than 1
student and teacher are of different laws. Nothing here needs the teacher's weights: that a temperature does nothing is
seen by asking for one sequence twice; log-probs of distinct tokens add up to 1 at most; and ids are the student's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .capture import Capture

__all__ = ["TeacherAnswers"]

logger = logging.getLogger(__name__)

_ASKED = 16  # tokens of the completion that is asked for twice

_SAME = 1e-6  # nats: answers to one request, given twice


class TeacherAnswers:
    """Counts of this rank's answers, from ``watching`` to ``stop``. Nothing of an answer is changed.

    ``vocabulary``: of the student; ids from it on are none of its.
    """

    def __init__(self, client: Any, vocabulary: int):
        self._client, self._vocabulary = client, vocabulary
        self._ask = client.get_sequence_logprobs
        self._ignored: dict[float, bool] = {}  # by temperature that was asked for: whether it does nothing
        self._failed = False
        self._forget()
        client.get_sequence_logprobs = self._asked

    @classmethod
    def of(cls, capture: Capture) -> TeacherAnswers | None:
        """Of a trainer's client of a teacher's server; None where there is none."""
        client = getattr(capture.trainer, "teacher_client", None)
        if getattr(client, "get_sequence_logprobs", None) is None:
            return None
        return cls(client, capture.policy.get_input_embeddings().num_embeddings)

    def stop(self) -> None:
        """Leave the client as it was."""
        if vars(self._client).get("get_sequence_logprobs") == self._asked:
            del self._client.get_sequence_logprobs

    def taken(self) -> tuple[dict[str, float], dict[str, float]]:
        """Since the last call: numbers by names of ``BUMPED``, and maxima by names of ``MAXIMA``. Empty: no answer."""
        found = self._sums, self._maxima
        self._forget()
        return found

    def _forget(self) -> None:
        self._sums: dict[str, float] = {}
        self._maxima: dict[str, float] = {}

    def _asked(self, sequences: Any, prompt_lengths: Any, *args: Any, **kwargs: Any) -> Any:
        answer = self._ask(sequences, prompt_lengths, *args, **kwargs)
        try:
            temperature = float(kwargs.get("temperature", 1.0))
            gap = abs(temperature - 1.0) if self._ignores(temperature, sequences, prompt_lengths) else 0.0
            self._add(answer, gap)
        except Exception as e:  # ours: the trainer has its answer
            log = logger.debug if self._failed else logger.warning
            log("what the teacher's server answers cannot be looked at (%s: %s)", type(e).__name__, e)
            self._failed = True
        return answer

    def _ignores(self, temperature: float, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> bool:
        """Whether the server answers the same at 1. Asked once for each temperature."""
        if temperature == 1.0:
            return False
        if temperature not in self._ignored:
            ids, start = next((ids, start) for ids, start in zip(sequences, starts, strict=True) if len(ids) > start)
            short = [list(ids[: start + _ASKED])]
            here, plain = (
                _flat(self._ask(short, [start], top_logprobs=1, temperature=t)["actual_logprobs"])
                for t in (temperature, 1.0)
            )
            apart = max(abs(a - b) for a, b in zip(here, plain, strict=True) if a != b or math.isfinite(a))
            self._ignored[temperature] = apart <= _SAME
        return self._ignored[temperature]

    def _add(self, answer: Mapping[str, Any], gap: float) -> None:
        actual = _flat(answer["actual_logprobs"])
        known = [x for x in actual if math.isfinite(x)]
        masses = [sum(map(math.exp, place)) for row in answer["logprobs"] for place in row]
        # padded with -inf, whose ids mean nothing
        ids = [
            token
            for row, tokens in zip(answer["logprobs"], answer["logprob_token_ids"], strict=True)
            for place, at in zip(row, tokens, strict=True)
            for x, token in zip(place, at, strict=True)
            if x > -math.inf
        ]
        new = {
            "teacher_tokens": len(actual),
            "teacher_known": len(known),
            "teacher_missing": len(actual) - len(known),
            "teacher_logprob": sum(known),
            "teacher_places": len(masses),
            "teacher_mass": sum(masses),
            "teacher_ids": len(ids),
            "teacher_foreign": sum(not 0 <= token < self._vocabulary for token in ids),
        }
        self._sums = {name: self._sums.get(name, 0.0) + x for name, x in new.items()}
        maxima = {"teacher_mass": max(masses, default=-math.inf), "teacher_temperature_gap": gap}
        self._maxima = {name: max(self._maxima.get(name, -math.inf), x) for name, x in maxima.items()}


def _flat(numbers: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    return [x for row in numbers for place in row for x in place]
