"""How big, how fast: FLOPs of a step, MFU, parameters, memory, hours.

Not covered: the network's speed.
"""
import sys

import torch

# dense bfloat16 peak of a device, in TFLOP/s, by a part of its name (the makers' data sheets, without sparsity)
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362}


def positions(cfg):
    """Tokens that a step runs through the blocks: block diffusion reads [xt ; x0], 2T a row."""
    return cfg.batch_tokens * (2 if cfg.objective == "block" else 1)


def step_flops(model_cfg, positions, scored, pairs):
    """FLOPs of a step, forward and backward, as MFU counts them: recomputed activations are not work done.

    A product of (m, k) and (k, n) takes 2mkn; the backward pass takes two of them for each one forward. So, a step,

        6 · positions · weights of the blocks' matrices      every token passes every block
        6 · scored · d_model · vocab_size                    the head sees the scored tokens alone
        12 · pairs · n_layer · n_head · head_dim             QKᵀ and PV, for the pairs that the mask lets through

    positions, scored, pairs: of the global batch. pairs: a head and layer, see Spans.pairs.
    """
    c = model_cfg
    block = c.d_model * c.head_dim * (2 * c.n_head + 2 * c.n_kv_head) + 3 * c.d_model * c.d_ff
    return (6 * positions * c.n_layer * block + 6 * scored * c.d_model * c.vocab_size
            + 12 * pairs * c.n_layer * c.n_head * c.head_dim)


def peak_flops(device):
    """The device's peak in FLOP/s, or None where it is not known. device: a torch.device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory(device):
    """Most memory that this process has held at a time, in bytes: the GPU's tensors, or on a CPU the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
