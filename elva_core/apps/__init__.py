"""Use: a free query, and the explorer widget."""
