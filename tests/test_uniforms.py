"""Random numbers by address: the published vectors, one address one number, the same bits everywhere."""
import numpy as np
import pytest
import torch

from engines import uniforms as module
from engines.uniforms import EVALUATION, TRAINING, in_unit_interval, philox, uniforms

# Known answers of the authors' library (Random123, kat_vectors, philox4x32 10): counter, key, result
KNOWN = [
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0),
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_the_words_are_those_of_the_published_vectors(counter, key, words, kind):
    arrays = [np.array([[x], [y]], dtype=np.int64) for x, y in (counter[0::2], counter[1::2])]
    if kind == "torch":
        arrays = [torch.from_numpy(x) for x in arrays]
    even, odd = philox(*arrays, key)
    assert [int(x) for x in (even[0, 0], odd[0, 0], even[1, 0], odd[1, 0])] == words


def by_torch(seed, stream, uids, positions, n):
    """The path of a GPU, on the CPU: torch's integers instead of NumPy's."""
    blocks = (n + 1) // 2
    counter = [[(j, p, u & 0xFFFFFFFF, u >> 32) for j in range(blocks)] for u, p in zip(uids, positions)]
    parts = torch.tensor(counter, dtype=torch.int64).movedim(-1, 0)              # [4, R, blocks]
    return in_unit_interval(*philox(parts[0::2], parts[1::2], (seed, stream))).reshape(len(uids), -1)[:, :n]


UIDS = [0, 1, 7, 2 ** 32 - 1, 2 ** 32, 2 ** 40 + 3]
POSITIONS = [0, 5, 119, 2 ** 14, 1, 0]


@pytest.mark.parametrize("n", [1, 2, 3, 64])
def test_numpy_and_torch_give_the_same_bits(n):
    ours = uniforms(3, EVALUATION, UIDS, POSITIONS, n)
    assert ours.dtype == torch.float64 and ours.shape == (len(UIDS), n)
    assert torch.equal(ours, by_torch(3, EVALUATION, UIDS, POSITIONS, n))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_bits():
    on_gpu = uniforms(3, EVALUATION, UIDS, POSITIONS, 5, "cuda")
    assert torch.equal(on_gpu.cpu(), uniforms(3, EVALUATION, UIDS, POSITIONS, 5))


def test_a_number_depends_on_its_address_alone():
    """Not on the other rows, nor on how many numbers are asked for."""
    together = uniforms(0, TRAINING, UIDS, POSITIONS, 8)
    for i, (uid, position) in enumerate(zip(UIDS, POSITIONS)):
        assert torch.equal(uniforms(0, TRAINING, [uid], [position], 3)[0], together[i, :3])


def test_no_two_addresses_share_a_number():
    seen = set()
    count = 0
    for seed in (0, 1):
        for stream in range(5):
            for uid in (0, 1, 2 ** 32):
                u = uniforms(seed, stream, [uid] * 40, list(range(40)), 5)
                seen |= set(u.flatten().tolist())
                count += u.numel()
    assert len(seen) == count == 2 * 5 * 3 * 40 * 5


def test_the_numbers_are_uniform_and_independent():
    """Chi-square over 100 cells; neighbours in every direction of the address are uncorrelated."""
    R, n = 1000, 16
    u = uniforms(5, TRAINING, list(range(R)), [0] * R, n)
    count = torch.bincount((u.flatten() * 100).long(), minlength=100).double()
    expected = R * n / 100
    chi = ((count - expected) ** 2 / expected).sum().item()
    assert abs(chi - 99) < 5 * (2 * 99) ** 0.5
    assert 0 <= u.min() and u.max() < 1
    along_uid = u[:, 0] - 0.5
    along_position = uniforms(5, TRAINING, [3] * R, list(range(R)), 2)[:, 0] - 0.5
    for x in (along_uid, along_position):
        assert abs((x[:-1] * x[1:]).mean().item() * 12) < 5 / R ** 0.5
    assert abs(((u[:, 0] - 0.5) * (u[:, 1] - 0.5)).mean().item() * 12) < 5 / R ** 0.5


def test_all_53_bits_are_used():
    u = uniforms(0, TRAINING, range(500), [0] * 500, 2)
    scaled = (u * 2.0 ** 53).long()
    for bit in range(53):
        share = (scaled >> bit & 1).double().mean().item()
        assert 0.4 < share < 0.6, f"bit {bit} is set in {share:.0%}"


@pytest.mark.parametrize("mutant", ["MULTIPLIERS", "KEY_STEPS", "ROUNDS"])
def test_the_vectors_notice_a_wrong_constant(monkeypatch, mutant):
    wrong = {"MULTIPLIERS": (0xD2511F55, 0xCD9E8D57), "KEY_STEPS": (0x9E3779B9, 0xBB67AE87), "ROUNDS": 9}[mutant]
    monkeypatch.setattr(module, mutant, wrong)
    monkeypatch.setattr(module, "constants", module.constants.__wrapped__)       # not those that are remembered
    with pytest.raises(AssertionError):
        test_the_words_are_those_of_the_published_vectors(*KNOWN[2], "numpy")
