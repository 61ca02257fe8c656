"""Files in, named arrays out: every checkpoint format this project reads."""
