"""Count the instructions of the compiled row kernel, and say how long it can take at least.

    python -m benchmarks.row_kernel    # a JSON line a pass over the vocabulary; needs no GPU, only Triton's compiler

A program of its own, because Triton's interpreter, which the rehearsal runs, replaces the compiler in a whole process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WARP = 32  # threads
VECTOR = 16  # bytes of a load or store: 16 divides the vocabularies of the cases
# Cycles that a warp's instruction keeps a unit of one scheduler busy, on sm_90: a scheduler starts an instruction a
# cycle, has 4 lanes for special functions (CUDA C++ programming guide, throughput of instructions) and, of its
# multiprocessor's way to the cache, 32 bytes a cycle.
SCHEDULERS = 4
CYCLES = {"special functions": 8, "loads and stores": VECTOR * WARP // 32}
KINDS = {"MUFU": "special functions", "LDG": "loads and stores", "STG": "loads and stores"}


@dataclass(frozen=True)
class Card:
    multiprocessors: int
    hertz: float  # the highest
    bytes_a_second: float


H200 = Card(132, 1.98e9, 4.8e12)  # H200 datasheet and `nvidia-smi -q -d CLOCK`


@dataclass(frozen=True)
class Pass:
    """Hold what one loop over the vocabulary takes for an entry of both models' logits."""

    instructions: float
    cycles: dict[str, float]  # that a scheduler's unit is busy, by kind of instruction
    bytes: float

    def seconds(self, entries: int, card: Card) -> dict[str, float]:
        """Return the time that each unit needs alone; the pass takes at least the longest."""
        warps = entries / WARP / (card.multiprocessors * SCHEDULERS * card.hertz)
        busy = {kind: cycles * warps for kind, cycles in self.cycles.items()}
        return {"issue": self.instructions * warps, **busy, "memory": self.bytes * entries / card.bytes_a_second}


def passes() -> list[Pass]:
    """Compile the kernel of forward KL with a bfloat16 gradient for sm_90 and return what its passes take."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.row_kernel"]
    root = Path(__file__).parents[1]
    said = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True).stdout
    return [Pass(**json.loads(line)) for line in said.splitlines()]


def loops(sass: str) -> Iterator[Counter[str]]:
    """Yield the instructions of every innermost loop, by their name without modifiers."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_]+)\S*\s*([^;]*);", sass, re.MULTILINE)
    instructions = [(int(address, 16), name, operands) for address, name, operands in found]
    for address, name, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name == "BRA" and target and int(target[1], 16) < address:
            yield Counter(name for at, name, _ in instructions if int(target[1], 16) <= at <= address)


def main() -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from tests.linear_kl.compile_kernels import compare_rows, source

    variant = compare_rows("forward_kl, bf16", "forward_kl", "bf16")
    compiled = triton.compile(
        source(variant, divisible=True), target=GPUTarget("cuda", 90, WARP), options=variant.options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    entries = variant.constants["BLOCK_V"] // (variant.options["num_warps"] * WARP)  # that a thread takes
    for loop in loops(sass):
        busy = {kind: sum(loop[name] for name in KINDS if KINDS[name] == kind) * CYCLES[kind] for kind in CYCLES}
        print(
            json.dumps(
                {
                    "instructions": loop.total() / entries,
                    "cycles": {kind: cycles / entries for kind, cycles in busy.items()},
                    # A vector each of float32 logits and of the bfloat16 gradient.
                    "bytes": VECTOR * (loop["LDG"] + loop["STG"]) / entries,
                }
            )
        )


if __name__ == "__main__":
    main()
