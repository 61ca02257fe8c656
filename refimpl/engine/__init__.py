"""Running a model: compiled programs over its state, and what turns requests into tokens."""
