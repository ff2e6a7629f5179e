"""The live view: a table at the end of a terminal; empty."""
