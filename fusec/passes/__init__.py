"""The compiler's passes. `PIPELINE` is its table of contents: each entry is a pure function Graph -> Graph in a file of its
name."""

from .commute_scales import commute_scales
from .fuse import fuse
from .hoist_invariants import hoist_invariants
from .inline_heads import inline_heads
from .merge_projections import merge_projections
from .plan_memory import plan_memory
from .select_rows import select_rows
from .share_launches import share_launches
from .simplify import simplify

PIPELINE = (simplify, hoist_invariants, select_rows, merge_projections, commute_scales, simplify, fuse, share_launches,
            inline_heads, plan_memory)  # fmt: skip

# On a machine without a GPU torch runs the graph: fewer, larger contractions, and arithmetic as the program's text has it.
TORCH_PIPELINE = (simplify, hoist_invariants, select_rows, merge_projections, simplify)
