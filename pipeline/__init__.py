"""How a model comes to be: configuration, data, training, tracking, evaluation. Never imports `serve`."""
