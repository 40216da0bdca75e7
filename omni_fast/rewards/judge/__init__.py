"""Judges: who prefers which of two replies. `base` has the contract; `embedded`, `rubric` and the server backends
keep it."""
