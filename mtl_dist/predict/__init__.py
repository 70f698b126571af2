"""Predictions of images, lists, videos and shard sets, as a file."""
