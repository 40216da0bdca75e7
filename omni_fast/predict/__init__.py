"""How long a step would take on machines one does not have: arithmetic and traffic (`step`), a simulated fleet (`simulate`)."""
