"""`--to web`: the page, ONNX Runtime for browsers, and the check of the JavaScript preprocessing."""
