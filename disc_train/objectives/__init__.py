"""Compute what training minimises, and measure how much there is to learn."""
