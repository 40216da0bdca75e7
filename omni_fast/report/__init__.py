"""The result of a run as item scores give it (`result`), and as one self-contained page (`page`)."""
