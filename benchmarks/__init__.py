"""Time, memory and accuracy, ours and peers: `pytest benchmarks/`."""
