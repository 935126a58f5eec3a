"""Kernels whose sums lie in local memory, found in the machine code of the compiled module.

    python benchmarks/sass.py [fastseq/_C.*.so]     exit status 1 if there is one

An array of sums that the compiler cannot keep in registers (one whose address is stored, say) makes a stack
frame but no spill, so ptxas says nothing: the kernel is right, and several times slower. It shows as loads
and stores of local memory (LDL, STL) in a basic block that has matrix products. In other blocks of such a
kernel they are allowed: a call that few tiles make may have its arrays on the stack, and what it calls, which
lies behind the kernel, may multiply there. A kernel without matrix products may have none at all.

Only cubins of which a kernel has a stack frame are disassembled; it takes a second for each MB of them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from registers import demangled

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*)")
PRODUCT = re.compile(r"(H|HG|QG|I|IG|D|B|Q|O)MMA")
LOCAL = ("LDL", "STL")
# What may go on elsewhere than at the next instruction ends a block, and what it names begins one.
ENDS = ("BRA", "BRX", "JMP", "JMX", "CALL", "RET", "EXIT", "BSYNC", "BREAK", "WARPSYNC", "KILL")
NAMES = (*ENDS, "BSSY")


class Function(NamedTuple):
    name: str
    architecture: str
    products: int  # instructions in all
    local: int
    together: int  # basic blocks that have both

    @property
    def slow(self) -> bool:
        return bool(self.together or (self.local and not self.products))


def functions(lines: Iterable[str]) -> Iterator[Function]:
    """What `cuobjdump -sass` prints, function by function."""
    architecture = name = None
    first, products, local = {0}, [], []  # addresses
    called, ends, returns = set(), [0], []

    def done():
        begins = sorted(first)
        for function in (address for address in called if address > ends[-1]):
            last = next((address for address in returns if address >= function), function)
            for found in (products, local):
                found[:] = [address for address in found if not function <= address <= last]
        blocks = [{bisect_right(begins, address) for address in found} for found in (products, local)]
        return Function(name, architecture, len(products), len(local), len(blocks[0] & blocks[1]))

    for line in lines:
        if "/*" not in line:
            if "code for " in line or "Function : " in line:
                if name:
                    yield done()
                name, first, products, local = None, {0}, [], []
                called, ends, returns = set(), [0], []
                word = line.split()[-1]
                if "code for " in line:
                    architecture = word
                else:
                    name = word
        elif match := INSTRUCTION.search(line):
            address, operation = int(match[1], 16), match[2].partition(".")[0]
            if operation in LOCAL:
                local.append(address)
            elif PRODUCT.fullmatch(operation):
                products.append(address)
            elif operation in NAMES:
                targets = [int(target, 16) for target in re.findall(r"\b0x([0-9a-f]+)", match[3])]
                first.update(targets)
                if operation == "CALL":
                    called.update(targets)
                elif operation in ("EXIT", "RET"):
                    (ends if operation == "EXIT" else returns).append(address)
                if operation in ENDS:
                    first.add(address + 16)
    if name:
        yield done()


def tool() -> str | None:
    """cuobjdump, from nvcc's toolkit or from a package that Python has installed."""
    folders = [Path(nvcc).resolve().parent for nvcc in [shutil.which("nvcc")] if nvcc]
    for package, inside in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        if spec := find_spec(package):
            folders += [Path(root, inside) for root in spec.submodule_search_locations or []]
    places = [shutil.which("cuobjdump"), *(shutil.which("cuobjdump", path=str(folder)) for folder in folders)]
    return next(filter(None, places), None)


def _printed(cuobjdump: str, *arguments: str, **options) -> str:
    run = subprocess.run([cuobjdump, *arguments], capture_output=True, text=True, **options)
    if run.returncode:
        raise RuntimeError(f"cuobjdump {' '.join(arguments)} gave {run.returncode}\n{run.stderr[-1000:]}")
    return run.stdout


def _functions_of(cuobjdump: str, cubin: Path) -> list[Function]:
    if not re.search(r"STACK:[1-9]", _printed(cuobjdump, "-res-usage", str(cubin))):
        return []
    # Hundreds of MB of text in all, so it is read as it comes.
    with subprocess.Popen(
        [cuobjdump, "-sass", cubin], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        found = list(functions(run.stdout))
    if run.returncode or not found:
        raise RuntimeError(f"cuobjdump -sass {cubin.name} gave {run.returncode}, {len(found)} functions")
    return found


def with_stack(module: Path, cuobjdump: str) -> list[Function]:
    """The functions of the module's cubins that have a stack frame somewhere."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        _printed(cuobjdump, "-xelf", "all", str(module.resolve()), cwd=folder)
        cubins = sorted(Path(folder).glob("*.cubin"), key=lambda cubin: -cubin.stat().st_size)
        found = pool.map(lambda cubin: _functions_of(cuobjdump, cubin), cubins)
        return [function for some in found for function in some]


def lines(found: list[Function]) -> Iterator[str]:
    slow = sorted((f for f in found if f.slow), key=lambda f: -f.together)
    local = sum(f.local > 0 for f in found)
    yield f"{local} kernels use local memory, {len(slow)} of them where they compute"
    names = demangled(dict.fromkeys(f.name for f in slow))
    for f in slow:
        what = f"{f.together} blocks with products and local memory" if f.products else "no products"
        yield f"  {f.architecture}  {f.local} loads and stores, {what}: {names[f.name]}"


def main(arguments: list[str]) -> int:
    cuobjdump = tool()
    modules = [Path(argument) for argument in arguments] or sorted(Path("fastseq").glob("_C.*.so"))
    if cuobjdump is None or not modules:
        print(
            "no cuobjdump" if modules else "no compiled module",
            "found, so the machine code was not looked at",
        )
        return 0
    found = [function for module in modules for function in with_stack(module, cuobjdump)]
    print("\n".join(lines(found)))
    return int(any(f.slow for f in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
