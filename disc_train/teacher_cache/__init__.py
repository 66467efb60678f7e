"""Keep on disk what a frozen teacher says of every token, so that it is run once for all epochs and runs."""
