"""What learns, and the bundle it is handed on in: networks, classifier, losses, training module."""
