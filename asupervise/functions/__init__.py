"""Workers that run a Python callable: see docs/design.md. Empty, for every worker imports it."""
