"""Measure time, memory and accuracy, ours and peers': `pytest benchmarks/`."""
