"""Pack examples into rows of tokens in which every shared trunk stands once."""
