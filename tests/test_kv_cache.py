"""Keys and values stay with their response, whoever joins and leaves."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from engines.kv_cache import KVCache


def small(attention):
    """Two heads share their keys and values, as in most published models."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, attn_implementation=attention)
    return LlamaForCausalLM(config).eval()


class Rows:
    """Sequences that grow in a cache; each pass must give what a pass over the whole sequence gives."""

    def __init__(self, model, cache):
        self.model = model
        self.cache = cache
        self.rows: list[list[int]] = []

    def check(self, rows, logits):
        for row, found in zip(rows, logits, strict=True):
            alone = self.model(input_ids=torch.tensor([row])).logits[0, -1]
            assert torch.allclose(found, alone, atol=1e-5), (found - alone).abs().max()

    @torch.no_grad()
    def join(self, rows):
        T = max(map(len, rows))
        self.cache.read(len(rows), T)
        ids = torch.tensor([row + [0] * (T - len(row)) for row in rows])
        logits = self.model(input_ids=ids, position_ids=torch.arange(T)[None], past_key_values=self.cache).logits
        self.rows += [list(row) for row in rows]
        self.check(rows, logits[range(len(rows)), [len(row) - 1 for row in rows]])

    @torch.no_grad()
    def go_on(self, tokens):
        self.cache.extend([len(row) for row in self.rows])
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)
        logits = self.model(input_ids=torch.tensor(tokens)[:, None], position_ids=torch.tensor(self.cache.at)[:, None],
                            attention_mask=self.cache.mask("cpu"), past_key_values=self.cache).logits
        self.check(self.rows, logits[:, 0])

    def leave(self, gone):
        self.rows = [self.rows[i] for i in self.cache.remove(gone)]


TOKENS = st.integers(1, 39)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_row_has_the_logits_that_it_would_have_alone(attention, data):
    rows = Rows(small(attention), KVCache(6, 20))
    for _ in range(6):
        joining = data.draw(st.lists(st.lists(TOKENS, min_size=1, max_size=7), max_size=3))
        if joining:
            rows.join(joining)
        if rows.rows:
            rows.go_on(data.draw(st.lists(TOKENS, min_size=len(rows.rows), max_size=len(rows.rows))))
            rows.leave(sorted(data.draw(st.sets(st.sampled_from(range(len(rows.rows)))))))


def test_what_memory_happened_to_hold_is_never_read():
    """Where torch is told to be deterministic, it fills new memory with nan."""
    torch.use_deterministic_algorithms(True)
    try:
        rows = Rows(small("sdpa"), KVCache(8, 20))
        rows.join([[1, 2, 3, 4, 5], [6]])
        rows.go_on([7, 8])
        rows.go_on([9, 10])
    finally:
        torch.use_deterministic_algorithms(False)


@given(n=st.integers(1, 12), data=st.data())
def test_only_rows_that_fill_a_hole_move(n, data):
    gone = data.draw(st.sets(st.integers(0, n - 1)))
    cache = KVCache(n, 4)
    cache.read(n, 1)
    cache.update(torch.arange(n, dtype=torch.float32)[:, None, None, None], torch.zeros(n, 1, 1, 1), 0)
    order = cache.remove(sorted(gone))
    assert sorted(order) == sorted(set(range(n)) - gone)
    assert cache.keys[0][:cache.rows, 0, 0, 0].tolist() == order
    assert all(old == new or old >= len(order) for new, old in enumerate(order))


def test_the_store_is_no_larger_than_the_largest_batch():
    cache = KVCache(5, 9)

    def read(n, T):
        cache.read(n, T)
        cache.update(torch.ones(n, 2, T, 3), torch.ones(n, 2, T, 4), 0)
        return tuple(cache.keys[0].shape), tuple(cache.values[0].shape)

    assert read(3, 5) == ((3, 2, 5, 3), (3, 2, 5, 4))
    assert read(1, 6) == ((5, 2, 9, 3), (5, 2, 9, 4))        # not 6 and 10
    assert read(4, 12)[0] == (8, 2, 12, 3)                   # an evaluation may be larger
