"""qlx: train, merge, pack, export and serve adapters on quantized bases without changing the model unnoticed.

Only the version lives here; every package is imported by its own name so that a command pays for
nothing it does not use.
"""

__version__ = "0.1.0"
