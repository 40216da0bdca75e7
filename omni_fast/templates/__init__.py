"""What `omni_fast.launch` fills in. Jinja prints each value quoted: for the shell, or as a YAML scalar."""
