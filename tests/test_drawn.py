"""What was drawn comes back, whatever the order of responses, however the tables grow."""
import random

import pytest
import torch

from draws import Chosen
from engines.drawn import DrawnTable

C = 3


def a_step(keys, offsets, columns=C) -> Chosen:
    """Numbers that tell which response, position and column they were written for."""
    base = torch.tensor([1000 * key + 10 * offset for key, offset in zip(keys, offsets)])
    ids = base[:, None] + torch.arange(columns)
    return Chosen(ids, -ids.float(), -base.float())


def check(drawn, key, length, columns=C):
    expected = a_step([key] * length, range(length), columns)
    assert torch.equal(drawn.tokens, expected.ids[:, 0])
    for ours, theirs in zip(drawn[1:], expected):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


@pytest.mark.parametrize("seed", range(5))
def test_responses_come_and_go_in_any_order(seed):
    rng = random.Random(seed)
    table = DrawnTable("cpu")
    running: dict[int, int] = {}
    begun = 0
    for _ in range(200):
        for _ in range(rng.randrange(3)):
            running[begun] = 0
            begun += 1
        chosen = [key for key in running if rng.random() < 0.8]
        rng.shuffle(chosen)
        if chosen:
            offsets = [running[key] for key in chosen]
            table.write(chosen, offsets, a_step(chosen, offsets))
            for key in chosen:
                running[key] += 1
        for key in [key for key in running if rng.random() < 0.1]:
            length = running.pop(key)
            drawn = table.take(key, length)
            assert len(drawn.tokens) == length
            if length:
                check(drawn, key, length)
    assert begun > 100 and len(table.tables.ids) < 100, "rows are used again"


def test_a_position_that_is_written_again_is_replaced():
    table = DrawnTable("cpu")
    for offset in (0, 1, 2, 1, 2):
        wrong = a_step([7], [offset + 40])
        table.write([7], [offset], wrong)
    for offset in (0, 1, 2):
        table.write([7], [offset], a_step([7], [offset]))
    check(table.take(7, 3), 7, 3)


def test_every_position_carries_the_version_that_wrote_it_last():
    table = DrawnTable("cpu")
    for version, keys, offsets in [(4, [7, 8], [0, 0]), (5, [7], [1]), (6, [8, 7], [1, 2]), (9, [8], [1])]:
        table.version = version
        table.write(keys, offsets, a_step(keys, offsets))
    assert table.take(7, 3).versions.tolist() == [4, 5, 6]
    assert table.take(8, 2).versions.tolist() == [4, 9]


def test_what_is_taken_is_a_copy():
    """Its row is given to another response."""
    table = DrawnTable("cpu")
    table.write([1], [0], a_step([1], [0]))
    drawn = table.take(1, 1)
    table.write([2], [0], a_step([2], [0]))
    check(drawn, 1, 1)


def test_the_number_of_words_changes_between_responses_only():
    table = DrawnTable("cpu")
    table.write([1], [0], a_step([1], [0]))
    with pytest.raises(AssertionError, match="another number of words"):
        table.write([2], [0], a_step([2], [0], columns=1))
    table.take(1, 1)
    table.write([2], [0], a_step([2], [0], columns=1))
    check(table.take(2, 1), 2, 1, columns=1)


def test_tokens_of_an_unknown_response_are_an_error():
    with pytest.raises(AssertionError, match="never written"):
        DrawnTable("cpu").take("x", 2)
