"""Data: the path of a batch, from shards, pictures and videos to the device."""
