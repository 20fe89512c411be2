"""Damage slides and files, and see that nothing is embedded wrongly: see `python -m tools.fuzz --help`."""
