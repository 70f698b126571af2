"""Faces of videos and photographs, cut out for training: detect, follow, crop, align."""
