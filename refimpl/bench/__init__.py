"""Measuring: how fast this machine runs a model here, and in llama.cpp.

`run.run` takes a `Plan` and fills `Results`; `report` prints them. Nothing but the command line
imports this package, and it may import everything.
"""
