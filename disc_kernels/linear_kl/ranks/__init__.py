"""Divide a vocabulary over ranks: DTensor heads, whether all ranks make the same call, what they send each other."""
