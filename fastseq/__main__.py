"""`python -m fastseq` prints what this installation can do."""

from . import show_config

print(show_config())
