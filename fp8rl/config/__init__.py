"""A run's configuration, a file for each part of it; ``run.py`` is the whole."""
