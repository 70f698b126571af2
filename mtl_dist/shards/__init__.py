"""Shard sets: how they are made of pictures and labels, verified and inspected."""
