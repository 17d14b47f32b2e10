"""Train models: configuration, data, training, tracking, evaluation, retraining. Never imports `serve`."""
