"""Weights that are not the trainer's: older ones, quantized ones, and neither."""

import peft
import pytest
import torch

from trl_parity.diagnosis.quantized import quantized_as
from trl_parity.diagnosis.weight_versions import WeightVersions
from trl_parity.engine.weight_readback import policy_tensors


def quantized(x, last, size):
    groups = x.reshape(-1, size or x.shape[1])
    scale = groups.abs().amax(1, keepdim=True)
    if isinstance(last, torch.dtype):
        most = torch.finfo(last).max
        return ((groups / scale * most).to(last).float() * scale / most).reshape(x.shape)
    return ((groups / scale * last).round() * scale / last).reshape(x.shape)


@pytest.fixture
def matrix():
    return 0.02 * torch.randn(128, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("last", "size", "words"),
    [
        (127, None, "8-bit numbers with a scale by row"),
        (7, 32, "4-bit numbers with a scale by 32 elements"),
        (7, 128, "4-bit numbers with a scale by row"),
        (torch.float8_e4m3fn, None, "fp8 e4m3 with a scale by row"),
        (torch.float8_e5m2, 64, "fp8 e5m2 with a scale by 64 elements"),
    ],
)
def test_a_quantizer_is_seen_in_the_values_it_leaves(matrix, dtype, last, size, words):
    held = quantized(matrix, last, size).to(dtype).float()
    assert quantized_as(held, matrix, dtype) == words
    assert quantized_as(held, held, dtype) == ""  # the trainer's are quantized themselves


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_noise_a_scale_an_update_and_a_hole_are_no_quantizer(matrix, dtype):
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(matrix.shape, generator=g)
    hole = matrix.clone()
    hole[:32] = 0.0
    for other in (matrix * (1 + 0.05 * noise), 1.04 * matrix, matrix + 1e-4 * noise.sign(), hole, matrix.T, noise):
        assert quantized_as(other.to(dtype).float(), matrix, dtype) == ""
    assert quantized_as(matrix[0], matrix[0], dtype) == ""


class Policy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(2)
        self.a, self.b = (torch.nn.Parameter(0.02 * torch.randn(16, 16, generator=g)) for _ in range(2))
        self.frozen = torch.nn.Parameter(torch.zeros(100), requires_grad=False)

    def step(self):
        with torch.no_grad():
            for p in (self.a, self.b):
                p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(int(1e6 * p[0, 0].abs())))

    def now(self):
        return {"a": self.a.detach().bfloat16().float(), "b": self.b.detach().bfloat16().float()}


def test_an_older_version_is_told_from_one_there_never_was():
    policy, versions, seen = Policy(), WeightVersions(), []
    for step in range(5):
        versions.keep(policy, step)
        versions.keep(policy, step)  # another batch of the step
        seen.append(policy.now())
        policy.step()
    versions.keep(policy, 5)
    assert versions.whole
    for older in seen:
        assert versions.holds_older(older, torch.bfloat16) == 1.0
    assert versions.holds_older({"a": seen[2]["a"], "b": 1.04 * policy.now()["b"]}, torch.bfloat16) == 0.5
    averaged = {n: 0.5 * (seen[0][n] + seen[1][n]) for n in "ab"}
    assert versions.holds_older(averaged, torch.bfloat16) == 0.0
    assert versions.holds_older({"c": seen[0]["a"]}, torch.bfloat16) is None
    one = policy.now()["a"]
    one[0, 1] += 1.0  # not among the elements that are looked at
    assert versions.holds_older({"a": one}, torch.bfloat16) is None


def test_what_adapters_made_is_remembered_and_what_has_moved_since():
    """Two layers with adapters that move by very different amounts; the second is alike in bfloat16 for one step."""
    layers = torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16), "b": torch.nn.Linear(16, 16)})
    policy = peft.get_peft_model(layers, peft.LoraConfig(r=2, target_modules=["a", "b"], lora_alpha=2))
    versions, seen = WeightVersions(), []
    for step, tiny in enumerate((1.0, 0.0, 1.0)):
        versions.keep(policy, step)
        seen.append({t.name: t.tensor.detach().bfloat16().float() for t in policy_tensors(policy) if t.adapted})
        with torch.no_grad():
            for name, size in (("a", 0.1), ("b", 0.1 * tiny)):
                policy.base_model.model[name].lora_B["default"].weight += size * torch.randn(16, 2)
    versions.keep(policy, 3)
    assert versions.whole
    assert [versions.holds_older(older, torch.bfloat16) for older in seen] == [1.0, 1.0, 1.0]
    assert versions.moved_since(seen[2], torch.bfloat16) == {"a.weight", "b.weight"}
    now = {t.name: t.tensor.detach().bfloat16().float() for t in policy_tensors(policy) if t.adapted}
    other = {name: 1.1 * tensor for name, tensor in now.items()}
    assert versions.holds_older(other, torch.bfloat16) == 0.0
    assert versions.moved_since(other, torch.bfloat16) is None
    policy.merge_adapter()
    versions.keep(policy, 4)
    assert not versions.whole


def test_a_tensor_that_has_not_moved_since_is_told_from_one_that_arrived():
    policy, versions = Policy(), WeightVersions()
    for step, moves in enumerate(("ab", "a")):
        versions.keep(policy, step)
        before = policy.now()
        for name in moves:
            with torch.no_grad():
                getattr(policy, name).add_(0.01 * torch.randn(16, 16))
    versions.keep(policy, 2)
    assert versions.moved_since({"a": before["a"]}, torch.bfloat16) == {"a"}


def test_a_resumed_run_and_a_policy_with_adapters_have_no_whole_history():
    versions = WeightVersions()
    versions.keep(Policy(), 7)
    assert not versions.whole
    adapted, versions = Policy(), WeightVersions()
    adapted.peft_config = {}
    versions.keep(adapted, 0)
    assert not versions.whole
    assert versions.holds_older(adapted.now(), torch.bfloat16) is None


def test_a_parameter_that_is_replaced_or_frozen_is_looked_for_anew():
    policy = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    versions = WeightVersions()
    versions.keep(policy, 0)
    held = {"0.weight": policy[0].weight.detach().clone()}
    policy[0].weight = torch.nn.Parameter(policy[0].weight.detach() + 1.0)  # another object under the same name
    versions.keep(policy, 1)
    assert versions.holds_older(held, torch.float32) == 1.0
    assert versions.holds_older({"0.weight": policy[0].weight.detach()}, torch.float32) is None
    policy[0].weight.data = policy[0].weight.data + 1.0  # the same object on other memory
    versions.keep(policy, 2)
    assert versions.holds_older({"0.weight": policy[0].weight.detach()}, torch.float32) is None
    policy[0].weight.requires_grad_(False)
    versions.keep(policy, 3)
    assert versions.holds_older(held, torch.float32) is None  # no longer looked at
