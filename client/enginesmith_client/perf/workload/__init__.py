"""What is sent: the requests of a profile, made for whatever model there is."""
