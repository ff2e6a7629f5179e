"""Consumers that carry events elsewhere: files, tracers, metrics; empty."""
