"""The report: runs and ensembles as one page with tables, figures, intervals and pictures."""
