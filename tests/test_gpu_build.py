"""What a build tells of its CUDA kernels: registers and spills in its log, faults that ptxas only informs of,
and sums that lie in local memory."""

import subprocess
from pathlib import Path

import pytest

import fastseq
from benchmark_runs import BENCHMARKS

COMPILE = Path(__file__).parents[1] / "csrc" / "cuda" / "compile.sh"


@pytest.fixture
def registers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import registers

    return registers


@pytest.fixture
def sass(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sass

    return sass


PTXAS = """\
[3/9] Building CUDA object CMakeFiles/fastseq_cuda.dir/csrc/cuda/recurrent.cu.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4slowPf' for 'sm_90a'
ptxas info    : Function properties for _Z4slowPf
    16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 49152 bytes smem
ptxas info    : Compiling entry function '_Z4fastPf' for 'sm_80'
ptxas info    : Function properties for _Z4fastPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 360 bytes cmem[0]
"""


def test_registers_and_spills_are_read_off_the_build(registers):
    first, _header, *rows = registers.lines(PTXAS)
    assert first == "2 kernels, 1 with spills, at most 255 registers"
    assert rows[0].split()[:6] == ["255", "16", "24", "32", "49152", "90a"]
    assert rows[1].split()[:6] == ["40", "0", "0", "0", "0", "80"]
    assert "slow" in rows[0]
    assert "no kernel was compiled" in next(registers.lines("ninja: no work to do."))


# -------------------------------------------------------------------------------------- what ptxas informs of

SERIALIZED = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "non wgmma instructions defining accumulator registers of a wgmma between start and end of the pipeline "
    "stage in the function '_Z1kPf'"
)
NOT_HANDED_OVER = (
    "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register "
    "count at entry."
)


def compiled(printed, status=0):
    """What compile.sh makes of a compiler that prints and ends so."""
    compiler = ["sh", "-c", 'printf "%s\\n" "$1" >&2; exit "$2"', "nvcc", printed, str(status)]
    return subprocess.run(["sh", COMPILE, *compiler], capture_output=True, text=True)


@pytest.mark.parametrize("line", [SERIALIZED, NOT_HANDED_OVER])
def test_build_fails_where_ptxas_gives_up_what_a_kernel_was_written_for(line):
    run = compiled(PTXAS + line)
    assert run.returncode == 1
    assert line in run.stdout


@pytest.mark.parametrize("status", [0, 2])
def test_build_ends_as_the_compiler_does_otherwise(status):
    run = compiled(PTXAS, status)
    assert run.returncode == status
    assert run.stdout.strip() == PTXAS.strip()  # registers.py reads it


# ---------------------------------------------------------------------------------------------- machine code

HEAD = """
Fatbin elf code:
================
arch = sm_90a

\tcode for sm_90a
\t.target\tsm_90a

\t\tFunction : {}
\t.headerflags\t@"EF_CUDA_SM90"
"""
IN_REGISTERS = """\
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000fe20000000800 */
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ; /* 0x0000000c0804723c */
        /*0020*/               @P0 BRA 0x10 ;                            /* 0xfffffffc00080947 */
        /*0030*/                   EXIT ;                                /* 0x000000000000794d */
"""
# The product's sums are loaded before it, and stored after it.
IN_MEMORY = """\
        /*0000*/                   IADD3 R1, R1, -0x40, RZ ;             /* 0xffffffc001017810 */
        /*0010*/                   LDL.128 R4, [R1+0x10] ;               /* 0x0000100001047983 */
        /*0020*/              @!P1 {product} ;                           /* 0x0000000c0804723c */
        /*0030*/                   STL.128 [R1+0x10], R4 ;               /* 0x0000100401007387 */
        /*0040*/              @!PT BRA 0x10 ;                            /* 0xfffffffc00080947 */
        /*0050*/                   EXIT ;                                /* 0x000000000000794d */
"""
# Stored for the call alone: a branch passes by, and the branch around it begins another block.
FOR_A_CALL = """\
        /*0000*/                   HMMA.16816.F32 R4, R8, R12, R4 ;      /* 0x0000000c0804723c */
        /*0010*/              @!P0 BRA 0x60 ;                            /* 0xfffffffc00080947 */
        /*0020*/                   STL.128 [R1], R4 ;                    /* 0x0000000401007387 */
        /*0030*/                   CALL.REL.NOINC 0x90 ;                 /* 0x0000000000007944 */
        /*0040*/                   LDL.128 R4, [R1] ;                    /* 0x0000000001047983 */
        /*0050*/                   NOP ;                                 /* 0x0000000000007918 */
        /*0060*/                   HMMA.16816.F32 R4, R8, R12, R4 ;      /* 0x0000000c0804723c */
        /*0070*/                   EXIT ;                                /* 0x000000000000794d */
"""
PRODUCTS = (
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "HMMA.1688.F32.TF32 R4, R8, R12, R4",
    "DMMA.8x8x4 R4, R8, R12, R4",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0",
)


def found(sass, **kernels):
    text = "".join(HEAD.format(name) + code for name, code in kernels.items())
    return {function.name: function for function in sass.functions(text.splitlines(keepends=True))}


@pytest.mark.parametrize("product", PRODUCTS)
def test_sums_in_local_memory_are_found(sass, product):
    functions = found(sass, _Z4fastv=IN_REGISTERS, _Z4slowv=IN_MEMORY.format(product=product))
    assert functions["_Z4slowv"] == ("_Z4slowv", "sm_90a", 1, 2, 1)
    assert [name for name, function in functions.items() if function.slow] == ["_Z4slowv"]
    first, row = sass.lines(list(functions.values()))
    assert first == "1 kernels use local memory, 1 of them where they compute"
    assert "sm_90a" in row
    assert "slow" in row


def test_arrays_of_a_call_may_lie_in_local_memory(sass):
    function = found(sass, _Z4callv=FOR_A_CALL)["_Z4callv"]
    assert (function.products, function.local, function.together) == (2, 2, 0)
    assert not function.slow


def test_what_is_called_may_multiply_what_lies_there(sass):
    kernel = ["CALL.REL.NOINC 0x40", PRODUCT, "EXIT", "NOP"]
    called = [LOAD, PRODUCT, "RET.REL.NODEC R4 0x0"]
    function = found(sass, _Z1kv=code(*kernel, *called))["_Z1kv"]
    assert (function.products, function.local, function.together) == (1, 0, 0)
    # A call within the kernel is none of a function: it brings threads together.
    function = found(sass, _Z1kv=code("CALL.REL.NOINC 0x10", *called[:2], "EXIT", *called))["_Z1kv"]
    assert (function.local, function.together) == (2, 2)


def code(*instructions):
    return "".join(
        f"        /*{16 * i:04x}*/    {one} ;    /* 0x0 */\n" for i, one in enumerate(instructions)
    )


PRODUCT, LOAD = PRODUCTS[0], "LDL.128 R4, [R1]"
JUMPS = ("BRA 0x90", "CALL.REL.NOINC 0x90", "RET.REL.NODEC R4 0x0", "BSYNC B0", "EXIT")


@pytest.mark.parametrize("jump", JUMPS)
def test_blocks_end_where_the_code_may_go_on_elsewhere(sass, jump):
    assert found(sass, _Z1kv=code(PRODUCT, "NOP", LOAD))["_Z1kv"].slow
    assert not found(sass, _Z1kv=code(PRODUCT, f"@!P0 {jump}", LOAD))["_Z1kv"].slow


@pytest.mark.parametrize("jump", ["BRA 0x10", "BSSY B0, 0x10", "CALL.REL.NOINC 0x10"])
def test_blocks_begin_where_the_code_may_come_from_elsewhere(sass, jump):
    assert found(sass, _Z1kv=code(PRODUCT, LOAD, "NOP"))["_Z1kv"].slow
    assert not found(sass, _Z1kv=code(PRODUCT, LOAD, jump))["_Z1kv"].slow


def test_kernel_without_products_has_nothing_in_local_memory(sass):
    function = found(sass, _Z3fmav=IN_MEMORY.format(product="FFMA R4, R8, R12, R4"))["_Z3fmav"]
    assert function.together == 0
    assert function.slow


@pytest.mark.skipif(not fastseq._C.cuda_info()["built"], reason="fastseq is built without CUDA")
def test_no_kernel_of_this_build_has_its_sums_in_local_memory(sass):
    if not (cuobjdump := sass.tool()):
        pytest.skip("no cuobjdump in PATH, nvcc's toolkit or Python's packages")
    functions = sass.with_stack(Path(fastseq._C.__file__), cuobjdump)
    assert any("attention" in function.name for function in functions)
    assert list(sass.lines(functions))[1:] == []
