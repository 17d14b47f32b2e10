"""Make a smaller classifier with the predictions of a larger one, and measure what each choice costs."""
