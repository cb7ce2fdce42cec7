"""Looks at the server and the machine while load runs."""
