"""Every Triton kernel compiles for the GPUs we care about, on a machine without one, and keeps to its budget.

Triton ships ptxas and cuobjdump; a target is enough to compile for. The interpreter replaces the compiler in a whole
process, so this happens in a new one.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Divergence, dtype of the gradient or None, whether with softcaps, biases, row weights and statistics.
VARIANTS = {
    "forward_kl": ("forward_kl", "fp32", False),
    "forward_kl, everything": ("forward_kl", "bf16", True),
    "reverse_kl, everything": ("reverse_kl", "fp16", True),
    "jsd, everything": ("jsd", "bf16", True),
    "jsd, value only": ("jsd", None, False),
}
CASES = [(variant, architecture) for variant in VARIANTS for architecture in (80, 90, 100)]

# Registers a thread, and bytes. With at most 128 registers two programs of 256 threads fit a multiprocessor; 1 KiB is
# for sums over warps; stack or local memory would be spilled registers.
BUDGET = {"reg": 128, "stack": 0, "local": 0, "shared": 1024}

COMPILE = """
import json, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction
from disc_kernels.linear_kl import rows_triton

functions = [name for name, value in vars(rows_triton).items() if isinstance(value, JITFunction)]
assert [name for name in functions if name.endswith("_kernel")] == ["_compare_rows_kernel"], functions
kernel = rows_triton._compare_rows_kernel
# No shape among them: another batch or vocabulary must not compile again.
constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
assert constants == {"KIND", "STATISTICS", "NARROW", "BLOCK_V"}, constants


def compiled(divergence, gradient, everything, architecture):
    constants = {
        "KIND": rows_triton._KINDS[divergence], "STATISTICS": everything, "NARROW": gradient not in (None, "fp32"),
        "BLOCK_V": rows_triton.MAX_BLOCK_V,
    }
    if gradient is None:
        constants["gradient_ptr"] = None
    if not everything:
        optional = ("student_bias_ptr", "teacher_bias_ptr", "row_scale_ptr", "student_softcap", "teacher_softcap")
        constants |= dict.fromkeys(optional)
    types = {"gradient_ptr": f"*{gradient}", "student_bias_ptr": "*bf16", "teacher_bias_ptr": "*bf16", "V": "i32"}

    def type_of(name):
        if name in constants:
            return "constexpr"
        return types.get(name, "*fp32" if name.endswith("_ptr") else "i32" if name.startswith("stride") else "fp32")

    source = ASTSource(kernel, {name: type_of(name) for name in kernel.arg_names}, constexprs=constants)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": rows_triton.NUM_WARPS})


def resources(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\\d+)", said)}


variants, cases = json.loads(sys.argv[1])
for variant, architecture in cases:
    print(json.dumps([variant, architecture, resources(compiled(*variants[variant], architecture).asm["cubin"])]))
"""


def test_kernels_compile_within_their_budget(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, json.dumps([VARIANTS, CASES])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [tuple(case) for *case, _ in rows] == CASES
    for variant, architecture, used in rows:
        assert set(used) == set(BUDGET)
        over = {name: value for name, value in used.items() if value > BUDGET[name]}
        assert not over, f"{variant}, sm_{architecture}: {over} over {BUDGET}"
