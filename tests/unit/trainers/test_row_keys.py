"""Which rows of a batch are one prompt with one completion: whatever their padding, and by each of their tokens."""

from types import SimpleNamespace

import pytest
import torch

from trl_parity.trainers.row_keys import keys_of


def keys(prompt, completion, left=0, right=0):
    """Of one row, with padding."""
    ids, mask = [9] * left + prompt, [0] * left + [1] * len(prompt)
    after, kept = completion + [9] * right, [1] * len(completion) + [0] * right
    row = SimpleNamespace(
        prompt_ids=torch.tensor([ids]), prompt_mask=torch.tensor([mask]), completion_ids=torch.tensor([after]),
        completion_mask=torch.tensor([kept]), image_keys=None,
    )  # fmt: skip
    return tuple(int(key) for key in keys_of(row))


@pytest.mark.parametrize("length", range(1, 9))
def test_each_token_of_a_prompt_and_of_a_completion_counts(length):
    prompt, completion = list(range(length)), list(range(3, 3 + length))
    row, alone = keys(prompt, completion)
    for place in range(length):
        other = [*prompt[:place], 50, *prompt[place + 1 :]]
        assert keys(other, completion)[0] != row
        assert keys(other, completion)[1] != alone
        changed = [*completion[:place], 50, *completion[place + 1 :]]
        assert keys(prompt, changed)[0] != row
        assert keys(prompt, changed)[1] == alone


def test_padding_does_not_count_and_where_a_prompt_ends_does():
    assert keys([1, 2], [3, 4], left=5, right=2) == keys([1, 2], [3, 4])
    assert keys([1, 2, 3], [4])[0] != keys([1, 2], [3, 4])[0]
    assert keys([0, 1], [2])[1] != keys([1], [2])[1]  # an id of 0 is a token, too
