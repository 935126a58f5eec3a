"""fastseq in other libraries, none of which it needs: each module imports its own when it is called."""

from . import torch_attention, transformers

__all__ = ["torch_attention", "transformers"]
