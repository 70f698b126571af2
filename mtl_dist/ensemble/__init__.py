"""The final job."""
