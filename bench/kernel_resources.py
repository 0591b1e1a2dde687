"""What the attention kernel's choices of tiles cost on a chip, from the compiler, without the chip.

    python -m bench.kernel_resources        # prints a table and writes bench/results/kernel_resources.md

Triton compiles for a GPU that is not there; its own cuobjdump then tells registers, stack (what spilled) and shared
memory of every kernel and choice. A choice with much stack or more shared memory than the chip has will not win.

Not covered: speed, which needs the chip: bench/attention.py.
"""
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

import attention_kernel
from configurator import configure


@dataclass
class Config:
    capability: int = 90  # of the GPU: 90 is Hopper, 80 Ampere
    head_dim: int = 128  # channels a head
    dtype: str = "bf16"  # of q, k and v, in Triton's words: bf16, fp16, fp32
    out: str = "bench/results/kernel_resources.md"  # where the table goes


POINTERS = {"LSE": "*fp32", "DELTA": "*fp32", "bounds": "*i32"}


def compiled(kernel, choice, head_dim, dtype, noisy, capability):
    """`kernel` compiled ahead of time for an NVIDIA GPU of this capability, strides and T taken as multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    constants = {"NOISY": noisy, "M": choice["M"], "N": choice["N"], "D": head_dim, "DP": triton.next_power_of_2(head_dim)}
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        is_tensor = name.isupper() and name not in ("H", "GROUP", "T", "BUCKET") or name == "bounds"
        signature[name] = ("constexpr" if name in constants else POINTERS.get(name, "*" + dtype) if is_tensor else
                           "fp32" if name == "scale" else "i32")
        if is_tensor and name not in constants or re.fullmatch(r"\w_[bhs]|T", name):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, attrs=aligned,
                       constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": choice["num_warps"], "num_stages": choice["num_stages"]})


def resources(binary):
    """(registers, bytes of stack) a thread, from the cuobjdump that Triton's package carries."""
    import triton
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary.asm["cubin"])
        f.flush()
        printed = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    return re.search(r"REG:(\d+) STACK:(\d+)", printed).groups()


def main():
    cfg, _ = configure(Config)
    if attention_kernel.triton is None:
        raise ValueError("triton is not installed here: pip install triton, on Linux")
    kernels = {"forward": attention_kernel.forward_kernel, "dQ": attention_kernel.dq_kernel,
               "dK, dV": attention_kernel.dkdv_kernel}
    lines = [f"# Resources of the attention kernel, {date.today()}", "", f"    python -m bench.kernel_resources {' '.join(sys.argv[1:])}".rstrip(), "",
             f"Compiled for compute capability {cfg.capability / 10}, head_dim {cfg.head_dim}, {cfg.dtype}, [xt ; x0]; no GPU was used. "
             f"Python {platform.python_version()}, torch {torch.__version__}, triton {attention_kernel.triton.__version__}.", "",
             "| kernel | M | N | warps | stages | matrix unit | registers | stack bytes | shared KiB |", "|---|---|---|---|---|---|---|---|---|"]
    for name, choice in tqdm([(n, c) for n in kernels for c in attention_kernel.CHOICES]):
        binary = compiled(kernels[name], choice, cfg.head_dim, cfg.dtype, True, cfg.capability)
        registers, stack = resources(binary)
        unit = next((u for u in ("wgmma", "mma.sync") if u in binary.asm["ptx"]), "none")
        lines.append(f"| {name} | {choice['M']} | {choice['N']} | {choice['num_warps']} | {choice['num_stages']} | {unit} | "
                     f"{registers} | {stack} | {binary.metadata.shared / 1024:.0f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    Path(cfg.out).write_text(text)


if __name__ == "__main__":
    main()
