"""TOML presets that ship in the wheel; `omni-fast train NAME` takes any of them."""
