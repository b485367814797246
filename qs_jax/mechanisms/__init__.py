"""The four mechanisms, as pure functions over arrays."""
