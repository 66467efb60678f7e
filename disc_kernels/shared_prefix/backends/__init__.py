"""Attention functions that Hugging Face models call over a packed sequence, in place of transformers' own."""
