"""The settings, and how they are read from the file, the environment and flags."""
