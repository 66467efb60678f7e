"""Compile every Triton kernel of the loss for GPUs that need not be there, and print what each variant takes.

A program of its own, because Triton's interpreter, which the tests run, replaces the compiler in a whole process.
It prints a line of JSON for each: kernel, variant, architecture, registers a thread, bytes a program.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from disc_kernels.linear_kl.rows import triton_backend, triton_softmax
from disc_kernels.linear_kl.rows.triton_math import DIVERGENCE_CODES

ARCHITECTURES = (80, 90, 100)
ROW_STATISTICS = ("divergence_ptr", "student_entropy_ptr", "teacher_entropy_ptr", "agreement_ptr")
ROW_OPTIONS = {"num_warps": triton_softmax.NUM_WARPS, "maxnreg": triton_softmax.MAX_REGISTERS}
SHARD_POINTERS = ("shard_normalisers_ptr", "normalisers_ptr", "mean_score_ptr")


class Variant(NamedTuple):
    """Hold a kernel as one launch specialises it; `types` and `constants` are by argument."""

    kernel: JITFunction
    name: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]


def compare_rows(
    name: str,
    divergence: str,
    gradient: str | None,
    everything: bool = False,
    one_head: bool = False,
    absent: tuple[str, ...] = SHARD_POINTERS,
) -> Variant:
    constants: dict[str, Any] = {
        "DIVERGENCE": DIVERGENCE_CODES[divergence],
        "STATISTICS": everything,
        "ONE_HEAD": one_head,
        "BLOCK_V": triton_softmax.MAX_BLOCK_V,
    }
    if gradient is None:
        absent = (*absent, "gradient_ptr")
    if not everything:
        absent = (*absent, "student_bias_ptr", "teacher_bias_ptr", "row_scale_ptr", "inverse_index_ptr")
        absent = (*absent, "student_softcap", "teacher_softcap")
    types = {"gradient_ptr": f"*{gradient}", "inverse_index_ptr": "*i64"}
    types |= {"student_bias_ptr": "*bf16", "teacher_bias_ptr": "*bf16"}
    kernel = triton_backend._compare_rows_kernel
    return Variant(kernel, name, types, constants | dict.fromkeys(absent), ROW_OPTIONS)


def shard_pass(number: int, divergence: str, gradient: str | None, everything: bool = True) -> Variant:
    """Specialise the kernel for one pass of a rank with a shard of the vocabulary."""
    absent = {
        1: (*ROW_STATISTICS, "normalisers_ptr", "mean_score_ptr"),
        2: ("agreement_ptr", "shard_normalisers_ptr", *(() if gradient is None else ("mean_score_ptr",))),
        3: (*ROW_STATISTICS, "shard_normalisers_ptr"),
    }[number]
    what = ", everything" if everything else ""
    name = f"shard, pass {number}, {divergence}{what}"
    return compare_rows(name, divergence, gradient, everything, absent=absent)


def normalise_rows(name: str, weights: str | None, remainder: bool, everything: bool) -> Variant:
    constants: dict[str, Any] = {"NARROW": weights not in (None, "fp32"), "BLOCK_V": triton_softmax.MAX_BLOCK_V}
    if weights is None:
        constants["weights_ptr"] = None
    if not remainder:
        constants["remainder_ptr"] = None
    if not everything:
        constants |= dict.fromkeys(("bias_ptr", "other_bias_ptr", "entropy_ptr", "expected_bias_ptr", "softcap"))
    types = {
        "weights_ptr": f"*{weights}",
        "remainder_ptr": f"*{weights}",
        "bias_ptr": "*bf16",
        "other_bias_ptr": "*bf16",
    }
    return Variant(triton_softmax._normalise_rows_kernel, name, types, constants, ROW_OPTIONS)


def multiply(dtype: str) -> Variant:
    types = {"x_ptr": "*fp32", "factor_ptr": "*fp32", "out_ptr": f"*{dtype}", "size": "i64"}
    options = {"num_warps": triton_softmax.NUM_WARPS}
    constants = {"BLOCK": triton_softmax.MAX_BLOCK_V}
    return Variant(triton_backend._multiply_kernel, dtype, types, constants, options)


VARIANTS = (
    compare_rows("forward_kl", "forward_kl", "fp32"),
    compare_rows("forward_kl, everything", "forward_kl", "bf16", everything=True),
    compare_rows("reverse_kl, everything", "reverse_kl", "fp16", everything=True),
    compare_rows("jsd, everything", "jsd", "bf16", everything=True),
    compare_rows("jsd, value only", "jsd", None),
    compare_rows("forward_kl, one head", "forward_kl", "fp32", everything=True, one_head=True),
    compare_rows("jsd, one head", "jsd", "fp32", everything=True, one_head=True),
    shard_pass(1, "forward_kl", None),
    shard_pass(2, "forward_kl", "bf16"),
    shard_pass(2, "jsd", None),
    shard_pass(3, "reverse_kl", "fp32", everything=False),
    shard_pass(3, "jsd", "bf16"),
    normalise_rows("value only", None, remainder=False, everything=False),
    normalise_rows("bf16", "bf16", remainder=False, everything=False),
    normalise_rows("fp32, everything", "fp32", remainder=False, everything=True),
    normalise_rows("bf16 in two parts, everything", "bf16", remainder=True, everything=True),
    multiply("bf16"),
)


# What takes most of each kernel, for every generation; the rest for the one in the middle.
HEAVIEST = (
    "jsd, everything",
    "jsd, one head",
    "shard, pass 2, jsd, everything",
    "shard, pass 3, jsd, everything",
    "bf16 in two parts, everything",
    "bf16",
)


def source(variant: Variant, divisible: bool = False) -> ASTSource:
    """Return what is compiled; for a vocabulary and strides that 16 divides, if `divisible`, which vectors load."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(variant.kernel.arg_names):
        if name in variant.constants:
            constants[i,] = variant.constants[name]
            signature[name] = "constexpr"
            continue
        integer = name.startswith("stride") or name == "V"
        signature[name] = variant.types.get(name, "*fp32" if name.endswith("_ptr") else "i32" if integer else "fp32")
        # As addresses of real tensors are.
        pointer = name.endswith("_ptr") and name not in (*triton_backend.ROW_POINTERS, *triton_softmax.ROW_POINTERS)
        if pointer or (integer and divisible):
            aligned[i,] = [["tt.divisibility", 16]]
    return ASTSource(variant.kernel, signature, constexprs=constants, attrs=aligned)


def usage(compiled: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", said)}
    # What a launch asks for is not in the binary.
    return found | {"shared": max(found["shared"], compiled.metadata.shared)}


def kernels() -> Iterator[JITFunction]:
    for name, value in {**vars(triton_backend), **vars(triton_softmax)}.items():
        if isinstance(value, JITFunction) and name.endswith("_kernel"):
            yield value


def main() -> None:
    assert set(kernels()) == {variant.kernel for variant in VARIANTS}
    for kernel in kernels():
        # No shape among them: another batch or vocabulary must not compile again.
        constants = sorted(parameter.name for parameter in kernel.params if parameter.is_constexpr)
        print(json.dumps([kernel.__name__, constants]), flush=True)
    assert set(HEAVIEST) <= {variant.name for variant in VARIANTS}
    for variant in VARIANTS:
        for architecture in ARCHITECTURES if variant.name in HEAVIEST else ARCHITECTURES[1:2]:
            target = GPUTarget("cuda", architecture, 32)
            compiled = triton.compile(source(variant), target=target, options=variant.options)
            print(json.dumps([variant.kernel.__name__, variant.name, architecture, usage(compiled)]), flush=True)


if __name__ == "__main__":
    main()
