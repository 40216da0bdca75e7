"""Bringing the policy's weights to whatever generates with them."""

from omni_fast.sync.push import Transport, WeightSync

__all__ = ["Transport", "WeightSync"]
