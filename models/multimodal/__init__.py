"""Networks that read texts, or images and texts."""
