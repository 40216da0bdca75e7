"""Judges: who prefers which of two replies. `base` has the contract; `embedded`, `rubric` and `server` keep it."""
