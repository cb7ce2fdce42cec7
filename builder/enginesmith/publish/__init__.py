"""Model repositories and the versions in them."""
