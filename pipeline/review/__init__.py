"""Review of labels in a web page: queues of images that are worth a look, and the decisions on them."""
