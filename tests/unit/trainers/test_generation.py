"""From what ``VLLMGeneration.generate`` was asked and answered to a rollout batch. No trainer, no engine."""

from types import SimpleNamespace

import pytest
import torch

from trl_parity.errors import DataError, InterceptionError
from trl_parity.trainers.generation import GenerationCapture
from trl_parity.trainers.instrumentation import require_measured


class Generation:
    """Answers from a list, with two log-probs a token: the sampled one's stands second."""

    mode, logprobs, generation_kwargs, structured_outputs_regex = "server", 1, {}, None
    temperature, top_k, top_p, min_p, repetition_penalty = 0.7, 0, 1.0, None, 1.0
    vllm_client = None

    def generate(self, prompts, images=None, num_generations=1):
        answers = [[9, 8, 7][: 1 + i % 3] for i in range(len(prompts))]
        logprobs = [[[-0.1, None if token == 7 else -float(token)] for token in ids] for ids in answers]
        return prompts, answers, logprobs, [[[1, token] for token in ids] for ids in answers]


class Some(GenerationCapture):
    """Learns from what the test says."""

    given = ()

    def learned(self):
        return [torch.tensor(ids) for ids in self.given]


@pytest.fixture
def capture():
    trainer = SimpleNamespace(
        args=SimpleNamespace(gradient_accumulation_steps=2), _step=5, _last_loaded_step=3, temperature=0.7,
        state=SimpleNamespace(global_step=3), vllm_generation=Generation(), current_gradient_accumulation_steps=2,
        processing_class=SimpleNamespace(pad_token_id=0), use_vllm=True,
        accelerator=SimpleNamespace(sync_gradients=False, device=torch.device("cpu")),
    )  # fmt: skip
    return Some(trainer, SimpleNamespace(accumulated=0), training=True)


def asked(capture, *calls, images=None):
    with capture.recording():
        for prompts in calls:
            capture.generation.generate(prompts=prompts, images=images, num_generations=1)


def test_a_row_is_what_the_engine_was_asked_and_answered(capture):
    asked(capture, [[1, 2, 3], [4]], [[1, 2, 3, 9, 5]])  # the second call: a tool has spoken
    capture.given = [[9, 5, 9, 0], [9, 8, 0, 0]]
    rollout = capture.rollout()
    assert rollout.prompt_ids.tolist() == [[0, 0, 1, 2, 3], [0, 0, 0, 0, 4], [1, 2, 3, 9, 5]]
    assert rollout.prompt_mask.sum(1).tolist() == [3, 1, 5]
    assert rollout.completion_ids.tolist() == [[9, 0], [9, 8], [9, 0]]
    assert rollout.engine_mask.sum(1).tolist() == [1, 2, 1]
    assert rollout.rollout_logprobs.tolist() == [[-9.0, 0.0], [-9.0, -8.0], [-9.0, 0.0]]
    assert (capture.micro_batches, capture.last_in_step) == (1, False)
    assert rollout.lags is None


def test_a_token_without_a_number_is_no_number(capture):
    asked(capture, [[1], [1], [1]])
    capture.given = [[9], [9, 8], [9, 8, 7]]
    assert capture.rollout().rollout_logprobs[2].isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("given", [[[9], [9, 8]], [[9], [9, 6], [9, 8, 7]]])
def test_tokens_changed_on_the_way_to_the_trainer_are_no_measurement(capture, given):
    asked(capture, [[1], [1], [1]])
    capture.given = given
    with pytest.raises(DataError, match=f"with {len(given)} completions that are not the 3 the engine returned"):
        capture.rollout()


def test_where_nothing_was_sampled_nothing_is_compared(capture):
    asked(capture)
    rollout = capture.rollout()
    assert rollout.completion_ids.shape == (1, 1)
    assert not rollout.engine_mask.any()


def test_older_weights_lag(capture):
    capture.trainer._last_loaded_step = 1
    asked(capture, [[1], [2]])
    capture.given = [[9], [9, 8]]
    assert capture.rollout().lags.tolist() == [2, 2]


def test_images_are_refused(capture):
    asked(capture, [[1], [2]], images=[None, ["picture"]])
    with pytest.raises(InterceptionError, match="the prompts hold images"):
        capture.rollout()


# ---- which trainers -----------------------------------------------------------------------------------------------


def config(name, base=object, module="trl.experimental.some"):
    return type(name, (base,), {"__module__": module})


def test_trainers_are_known_by_their_arguments():
    mine = config("MineConfig", config("GMPOConfig", config("GRPOConfig")), "my.code")
    for known in (mine, config("GOLDConfig", config("SFTConfig")), config("TrainingArguments", module="transformers")):
        require_measured(known())
    with pytest.raises(InterceptionError, match=r"with OnlineDPOConfig .*GRPOTrainer, .*IWOPDTrainer, .*subclass"):
        require_measured(config("OnlineDPOConfig")())
