"""The command `serve`: between the command line, the model and `refimpl.server`."""
