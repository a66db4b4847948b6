"""What one module holds and another does not; vLLM's own modules are in tests/engine."""

import contextlib

import pytest
import torch

from trl_parity.engine.built_anew import as_built_anew, parted


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 3))
        self.register_buffer("table", torch.arange(4.0))
        self.scale, self.cap, self.neox, self.kv_cache = 0.5, None, True, torch.zeros(3)
        self.window, self.nan = (31, 0), float("nan")
        self.plain = torch.zeros(2)


class Kept:
    """What a module keeps beside its tensors, of vLLM's."""

    def __init__(self, scale):
        self.scale = scale


def kept(module, kind=Kept, scale=1.0):
    return type("Kept", (kind,), {"__module__": module})(scale)


class Cache(dict):
    """As vLLM's LRUCache counts."""

    def __init__(self, hits):
        super().__init__()
        self.hits, self.last = hits, (hits, hits)


def pair():
    return tuple(torch.nn.Sequential(Layer(), Layer()) for _ in range(2))


def test_modules_alike_have_no_parts():
    live, anew = pair()
    live[0].kv_cache = torch.ones(3)  # contents of a cache are no state of the module
    live.eval()
    assert parted(live, anew) == []


def test_what_is_kept_is_compared_and_counters_of_caches_and_configs_are_not():
    live, anew = pair()
    for module, hits in (live[0], 5), (anew[0], 0):
        module.impl = kept("vllm.v1.attention.cpu", scale=1.0 + hits)
        module.rope_by_size = kept("vllm.utils.cache", Cache, hits)
        module.vllm_config = kept("vllm.config.vllm", scale=hits)  # which has an id of its own
    assert [part.name for part in parted(live, anew)] == ["0.impl.scale"]


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("scale", 2.0),
        ("cap", 30.0),
        ("neox", False),
        ("window", (32, 0)),
        ("plain", torch.ones(2)),
        ("table", torch.zeros(4)),
    ],
)
def test_each_kind_of_part_is_found_put_in_and_put_back(attribute, value):
    live, anew = pair()
    before = getattr(anew[1], attribute)
    setattr(live[1], attribute, value.clone() if isinstance(value, torch.Tensor) else value)
    held = getattr(live[1], attribute)
    [part] = parted(live, anew)
    assert (part.name, part.fits) == (f"1.{attribute}", True)
    with contextlib.suppress(ConnectionError), as_built_anew([part]):
        assert parted(live, anew) == []
        now = getattr(live[1], attribute)
        assert torch.equal(now, before) if isinstance(value, torch.Tensor) else now == before
        raise ConnectionError  # whatever happens meanwhile
    assert getattr(live[1], attribute) is held  # its own storage
    assert torch.equal(held, value) if isinstance(value, torch.Tensor) else held == value


def test_what_is_shared_is_one_part_and_what_no_weight_reached_is_none():
    live, anew = pair()
    live[1].weight = live[0].weight
    with torch.no_grad():
        live[0].weight.add_(1.0)
    assert [part.name for part in parted(live, anew)] == ["0.weight"]
    assert parted(live, anew, frozenset({"0.weight", "1.weight"})) == []


def test_another_shape_is_told_and_not_put_in():
    live, anew = pair()
    live[0].plain = torch.zeros(5)
    [part] = parted(live, anew)
    assert not part.fits
    with as_built_anew([part]):
        assert live[0].plain.shape == (5,)
