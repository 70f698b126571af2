"""Faces in whole pictures: find them, follow them through a video, cut them out."""
