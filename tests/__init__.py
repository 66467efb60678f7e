"""Make `tests` a package, so that no other `tests` on the path comes first."""
