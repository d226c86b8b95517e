"""Readers of raw data sets and what ``fusion.py`` does with them: mending, joining organs, splitting, writing."""
