"""How good generated images are, measured so that a reader can believe it."""
