"""How large axes may be. A module of its own: help needs the limits, and not what reads sizes."""

MAX_SIZE = 2**40
"""Of any axis: far above any model's, far below where sizes of tensors overflow."""
MAX_LAYERS = 10_000
"""Of one stack; the deepest models have some hundred."""
