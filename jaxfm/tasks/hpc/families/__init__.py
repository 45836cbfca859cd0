"""Kinds of generated programs, one file each."""
