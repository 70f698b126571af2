"""Rendered faces with labels: a data set for those who have none."""
