"""The pieces of batch scoring: the listing of the rows, the part files, and the workers that write them."""
