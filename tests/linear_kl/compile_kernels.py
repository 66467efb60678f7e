"""Compiles every Triton kernel of the loss for GPUs that need not be there, and prints what each variant takes.

A program of its own, because Triton's interpreter, which the tests run, replaces the compiler in a whole process.
A line of JSON each: kernel, variant, architecture, and registers a thread and bytes a program.
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

from disc_kernels.linear_kl.rows import shard_triton, triton_backend

ARCHITECTURES = (80, 90, 100)


class Variant(NamedTuple):
    """A kernel as one launch specialises it; `types` and `constants` by argument, or (argument, field of it)."""

    kernel: JITFunction
    name: str
    types: dict[Any, str]
    constants: dict[Any, Any]
    options: dict[str, int]


def compare_rows(
    name: str, divergence: str, gradient: str | None, everything: bool = False, one_head: bool = False
) -> Variant:
    constants: dict[str, Any] = {
        "KIND": triton_backend.KINDS[divergence],
        "STATISTICS": everything,
        "NARROW": gradient not in (None, "fp32"),
        "ONE_HEAD": one_head,
        "BLOCK_V": triton_backend.MAX_BLOCK_V,
    }
    if gradient is None:
        constants["gradient_ptr"] = None
    if not everything:
        optional = ("student_bias_ptr", "teacher_bias_ptr", "row_scale_ptr", "student_softcap", "teacher_softcap")
        constants |= dict.fromkeys((*optional, "teacher_slot_ptr"))
    types = {"gradient_ptr": f"*{gradient}", "teacher_slot_ptr": "*i64"}
    types |= {"student_bias_ptr": "*bf16", "teacher_bias_ptr": "*bf16"}
    kernel = triton_backend._compare_rows_kernel
    return Variant(kernel, name, types, constants, {"num_warps": triton_backend.NUM_WARPS})


def normalise_rows(name: str, weights: str | None, remainder: bool, everything: bool) -> Variant:
    constants: dict[str, Any] = {"NARROW": weights not in (None, "fp32"), "BLOCK_V": triton_backend.MAX_BLOCK_V}
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
    options = {"num_warps": triton_backend.NUM_WARPS, "maxnreg": triton_backend.MAX_REGISTERS}
    return Variant(triton_backend._normalise_rows_kernel, name, types, constants, options)


def shard(name: str, kernel: JITFunction, gradient: str | None, everything: bool, **constants: Any) -> Variant:
    options: dict[Any, Any] = {"BLOCK_V": triton_backend.MAX_BLOCK_V, "STATISTICS": everything, **constants}
    options["NARROW"] = gradient not in (None, "fp32")
    if gradient is None:
        options["gradient_ptr"] = None
    types: dict[Any, str] = {"gradient_ptr": f"*{gradient}", "teacher_slot_ptr": "*i64"}
    for side in ("student", "teacher"):
        for field in shard_triton.Logits._fields:
            types[side, field] = "i32" if field.startswith("stride") else "fp32"
        types |= {(side, "rows_ptr"): "*fp32", (side, "bias_ptr"): "*bf16"}
        if not everything:
            options |= {(side, "bias_ptr"): None, (side, "softcap"): None}
    if not everything:
        options |= {"teacher_slot_ptr": None, "row_scale_ptr": None}
    return Variant(kernel, name, types, options, {"num_warps": triton_backend.NUM_WARPS})


KINDS = triton_backend.KINDS

VARIANTS = (
    compare_rows("forward_kl", "forward_kl", "fp32"),
    compare_rows("forward_kl, everything", "forward_kl", "bf16", everything=True),
    compare_rows("reverse_kl, everything", "reverse_kl", "fp16", everything=True),
    compare_rows("jsd, everything", "jsd", "bf16", everything=True),
    compare_rows("jsd, value only", "jsd", None),
    compare_rows("forward_kl, one head", "forward_kl", "fp32", everything=True, one_head=True),
    compare_rows("jsd, one head", "jsd", "fp32", everything=True, one_head=True),
    normalise_rows("value only", None, remainder=False, everything=False),
    normalise_rows("bf16", "bf16", remainder=False, everything=False),
    normalise_rows("fp32, everything", "fp32", remainder=False, everything=True),
    normalise_rows("bf16 in two parts, everything", "bf16", remainder=True, everything=True),
    shard("everything", shard_triton._normalise_shard_kernel, None, everything=True),
    shard(
        "forward_kl, everything",
        shard_triton._compare_shard_kernel,
        "bf16",
        everything=True,
        KIND=KINDS["forward_kl"],
        mean_slope_ptr=None,
    ),
    shard("jsd, everything", shard_triton._compare_shard_kernel, None, everything=True, KIND=KINDS["jsd"]),
    shard("reverse_kl", shard_triton._shard_gradient_kernel, "fp32", everything=False, KIND=KINDS["reverse_kl"]),
    shard("jsd, everything", shard_triton._shard_gradient_kernel, "bf16", everything=True, KIND=KINDS["jsd"]),
)


def source(variant: Variant) -> ASTSource:
    names = variant.kernel.arg_names
    fields = {"student": shard_triton.Logits, "teacher": shard_triton.Logits}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}

    def leaf(key: Any, path: tuple[int, ...]) -> str:
        name = key if isinstance(key, str) else key[1]
        if key in variant.constants:
            constants[path] = variant.constants[key]
            return "constexpr"
        count = name.startswith("stride") or name in ("R", "V")
        kind = variant.types.get(key, "*fp32" if name.endswith("_ptr") else "i32" if count else "fp32")
        # As addresses of real tensors are; R and V are any number.
        if kind.startswith("*") and name not in triton_backend.ROW_NUMBERS:
            aligned[path] = [["tt.divisibility", 16]]
        return kind

    for i, name in enumerate(names):
        record = fields.get(name)
        if record is None:
            signature[name] = leaf(name, (i,))
        else:
            signature[name] = record(*(leaf((name, field), (i, j)) for j, field in enumerate(record._fields)))
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
    for module in (triton_backend, shard_triton):
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                yield value


def main() -> None:
    assert set(kernels()) == {variant.kernel for variant in VARIANTS}
    for kernel in kernels():
        # No shape among them: another batch or vocabulary must not compile again.
        constants = sorted(parameter.name for parameter in kernel.params if parameter.is_constexpr)
        print(json.dumps([kernel.__name__, constants]), flush=True)
    for variant in VARIANTS:
        for architecture in ARCHITECTURES:
            target = GPUTarget("cuda", architecture, 32)
            compiled = triton.compile(source(variant), target=target, options=variant.options)
            print(json.dumps([variant.kernel.__name__, variant.name, architecture, usage(compiled)]), flush=True)


if __name__ == "__main__":
    main()
