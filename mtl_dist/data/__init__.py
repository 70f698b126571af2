"""Data: annotation text, shards and their index, the order, reading, decoding, augmentation, synthetic faces."""
