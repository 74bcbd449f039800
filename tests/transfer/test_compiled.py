"""The kernels as PTX: Triton compiles for a device that is not there."""

from __future__ import annotations

import re

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvkeep.transfer.device.kernels import TILE_NBYTES, copy_pages
from kvkeep.transfer.rope.scatter import scatter_rotated

pytestmark = pytest.mark.process

TARGETS = [80, 90]
WIDE = {16: "v4.b32", 8: "v2.b32", 4: "b32", 2: "b16", 1: "b8"}


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that was compiled by an earlier run proves nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def ptx(kernel: object, pointers: dict[str, str], constants: dict[str, object], target: int) -> str:
    signature = pointers | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={"num_warps": 4, "enable_fp_fusion": True}
    )
    return compiled.asm["ptx"]


def accesses(text: str) -> set[str]:
    """The vectors and sizes of all reads (ld) and writes (st) of global memory."""
    return {
        f"{verb} {size}"
        for verb, size in re.findall(r"\b(ld|st)\.global(?:\.[\w:]+?)*?\.((?:v\d\.)?[bfsu]\d+)\b", text)
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", WIDE)
def test_copies_are_as_wide_as_asked_for(target: int, width: int):
    both = []
    for to_pool in (True, False):
        text = ptx(
            copy_pages,
            {"parts": "*i64", "batch": "*i64"},
            {"TO_POOL": to_pool, "WIDTH": width, "TILE": TILE_NBYTES},
            target,
        )
        # the tables are read as single 64-bit numbers, everything else is payload
        both.append(accesses(text) - {"ld b64"})
    assert both == [{f"ld {WIDE[width]}", f"st {WIDE[width]}"}] * 2


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [tl.float32, tl.bfloat16, tl.float16], ids=str)
def test_the_turn_compiles_and_rounds_to_the_caches_dtype(target: int, dtype: tl.dtype):
    pointers = {"planes": "*i64", "batch": "*i64", "rotations": "*fp32"}
    text = ptx(scatter_rotated, pointers, {"HEADS": 8, "DIMS": 64, "DTYPE": dtype}, target)
    found = accesses(text)
    bits = dtype.primitive_bitwidth
    assert any(one.startswith("st ") and one.endswith(f"b{bits}") for one in found), found
    assert "fma.rn" in text
    assert (f"cvt.rn.{ {'bf16': 'bf16', 'fp16': 'f16'}.get(dtype.name) }" in text) == (bits == 16)
