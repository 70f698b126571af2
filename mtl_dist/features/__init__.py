"""Features of the pictures of whole videos, made once by what was trained on single pictures."""
