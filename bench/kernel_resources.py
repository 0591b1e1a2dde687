"""What the attention kernel's choices of tiles need on a chip, from the compiler, without the chip.

    python -m bench.kernel_resources    # prints a table, writes bench/results/kernel_resources.md

Triton compiles for a GPU that is not there. Its own cuobjdump then tells registers, stack (what
spilled) and shared memory of every kernel and choice. A choice with much stack, or with more shared
memory than the chip has, will not win.

Not covered: speed, which needs the chip: bench/attention.py.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

try:
    import triton  # before attention_kernel, which leaves it out on a machine without a GPU
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError:
    triton = None

import attention_kernel
from configurator import Int, Mistake, Name, configure
from files import check_out, write_text

KERNELS = {"forward": "forward_kernel", "dQ": "dq_kernel", "dK, dV": "dkdv_kernel"}
NUMBERS = ("H", "GROUP", "T", "BUCKET", "scale")  # arguments in capitals are tensors, but for these
DTYPES = {"LSE": "*fp32", "DELTA": "*fp32", "bounds": "*i32", "scale": "fp32"}  # whatever q's is


@dataclass
class Config:
    capability: Int(80, 129) = 90  # of the GPU: 90 is Hopper, 80 Ampere
    head_dim: Int(1, 256) = 128  # channels per head
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of q, k and v, in Triton's words
    noisy_queries: bool = False  # compile for [xt ; x0] with the noisy half's queries alone
    out: Name = "bench/results/kernel_resources.md"  # where the table goes


def compiled(kernel, choice, dtype, head_dim, capability, noisy=True, clean_queries=True):
    """`kernel` compiled ahead of time for an NVIDIA GPU of this capability.

    choice: (M, N, warps, stages). Strides and T are taken as multiples of 16.
    """
    M, N, warps, stages = choice
    padded = max(16, triton.next_power_of_2(head_dim))
    constants = {"NOISY": noisy, "CLEAN_QUERIES": clean_queries,
                 "M": M, "N": N, "D": head_dim, "DP": padded}
    signature, aligned, constant_at = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        is_tensor = name == "bounds" or name.isupper() and name not in NUMBERS
        is_stride = re.fullmatch(r"[a-z]+_[bhs]", name)
        if name in constants:
            signature[name] = "constexpr"
            constant_at[(i,)] = constants[name]
            continue
        default = "*" + dtype if is_tensor else "i32"
        signature[name] = DTYPES.get(name, default)
        if is_tensor or is_stride or name == "T":
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, attrs=aligned, constexprs=constant_at)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": warps, "num_stages": stages})


def resources(binary):
    """(registers, bytes of stack) per thread, from the cuobjdump that Triton's package carries."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary.asm["cubin"])
        f.flush()
        command = [tool, "-res-usage", f.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(r"REG:(\d+) STACK:(\d+)", printed).groups()


def matrix_unit(binary):
    """The instruction that multiplies matrices: Hopper's own, Ampere's, or none."""
    for unit in ("wgmma", "mma.sync"):
        if unit in binary.asm["ptx"]:
            return unit
    return "none"


def main(argv=None):
    cfg, _ = configure(Config, argv)
    check_out(cfg.out)
    if triton is None:
        raise Mistake("triton is not installed here: pip install triton, on Linux")
    words = sys.argv[1:] if argv is None else argv
    command = " ".join(["python -m bench.kernel_resources", *words])
    queries = "queries of xt alone" if cfg.noisy_queries else "all queries"
    lines = [
        f"# Resources of the attention kernel, {date.today()}",
        "",
        f"    {command}",
        "",
        f"Compiled for compute capability {cfg.capability / 10}, head_dim {cfg.head_dim}, "
        f"{cfg.dtype}, keys [xt ; x0], {queries}; no GPU was used. Python "
        f"{platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}.",
        "",
        "| kernel | M | N | warps | stages | matrix unit | registers | stack bytes | shared KiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    work = [(name, choice) for name in KERNELS for choice in attention_kernel.CHOICES]
    for name, choice in tqdm(work):
        kernel = getattr(attention_kernel, KERNELS[name])
        binary = compiled(kernel, choice, cfg.dtype, cfg.head_dim, cfg.capability,
                          clean_queries=not cfg.noisy_queries)
        shared = f"{binary.metadata.shared / 1024:.0f}"
        cells = [name, *choice, matrix_unit(binary), *resources(binary), shared]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    text = "\n".join(lines) + "\n"
    print(text)
    write_text(cfg.out, text)


if __name__ == "__main__":
    main()
