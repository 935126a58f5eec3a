"""What importing fastseq, and using it, brings along."""

import subprocess
import sys

USED = """
import sys
import torch
import fastseq

lstm, attention = fastseq.LSTM(4, 5), fastseq.MultiheadAttention(8, 2)
lstm(torch.randn(3, 2, 4))[0].sum().backward()
x = torch.randn(3, 2, 8)
attention(x, x, x)[0].sum().backward()
with fastseq.patched():
    torch.nn.functional.scaled_dot_product_attention(*[torch.randn(1, 2, 3, 4)] * 3)
fastseq.explain(fastseq.convert(torch.nn.GRU(4, 5)) and lstm, torch.randn(3, 2, 4))
print(*sorted({name.partition(".")[0] for name in sys.modules}))
print("torch._dynamo" in sys.modules)
"""


def test_neither_a_compiler_nor_any_optional_package_is_imported():
    """torch's compiler takes two seconds, more than torch itself."""
    run = subprocess.run(
        [sys.executable, "-c", USED], capture_output=True, text=True, check=True, timeout=100
    )
    names, compiler = run.stdout.splitlines()
    assert compiler == "False"
    assert not {"transformers", "matplotlib", "sympy"} & set(names.split())
