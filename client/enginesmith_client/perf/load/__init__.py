"""Sends requests when they are due, or as answers come, and keeps a record of each."""
