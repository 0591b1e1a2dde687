"""Random numbers for decoding, each a function of (seed, row, position, step) and its own number.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a counter of
four 32-bit words and a key of two into four random words. There is no state, so what a row of a
batch draws depends neither on its neighbors nor on the order of work, and the draws are made on
the device where the logits are.

Not covered: the noise of training, which NumPy draws on the CPU (diffusion.py: stream).
"""
import torch

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF  # the low 32 bits


def philox(counter, key):
    """Four words for a counter of four words, by ten rounds under a key of two.

    counter: four int64 tensors of values below 2^32, of shapes that broadcast. key: two ints below
    2^32. Returns four int64 tensors of values below 2^32.
    """
    a, b, c, d = counter
    key_0, key_1 = key
    for _ in range(10):
        product_0 = a * MULTIPLIERS[0]  # 64 bits: the sign bit is one of them
        product_1 = c * MULTIPLIERS[1]
        a = (product_1 >> 32) & WORD ^ b ^ key_0
        b = product_1 & WORD
        c = (product_0 >> 32) & WORD ^ d ^ key_1
        d = product_0 & WORD
        key_0 = (key_0 + KEY_STEPS[0]) & WORD
        key_1 = (key_1 + KEY_STEPS[1]) & WORD
    return a, b, c, d


def uniform(seed, rows, positions, steps, count, first=0):
    """`count` draws in (0, 1) for each (row, position, step).

    seed: int below 2^64. rows, positions, steps: int64 tensors below 2^32, of shapes that broadcast
    to (...). first: number of the first draw, a multiple of 4: draws of other numbers are others.
    Returns (..., count) float32, multiples of 2^-23 plus 2^-24, exact on every device.
    """
    groups = torch.arange(first // 4, first // 4 + -(-count // 4), device=positions.device)
    counter = groups, positions[..., None], steps[..., None], rows[..., None]
    words = philox(counter, (seed & WORD, seed >> 32))  # four of (..., groups)
    words = torch.stack(torch.broadcast_tensors(*words), -1).flatten(-2)[..., :count]
    return ((words >> 9).float() + 0.5) * 2**-23


def gumbel(seed, rows, positions, steps, count, first=0):
    """Draws of the standard Gumbel distribution, (..., count) float32; see `uniform`.

    The argmax of logits + these is a sample of softmax(logits).
    """
    return -torch.log(-torch.log(uniform(seed, rows, positions, steps, count, first)))
