"""`python -m omni_fast` is `omni-fast`; torchrun starts it as `torchrun ... -m omni_fast train CONFIG`."""

from omni_fast.cli import main

main()
