"""Stands in for FastGen in tests: its module names and signatures, with plain PyTorch from the published formulas."""
