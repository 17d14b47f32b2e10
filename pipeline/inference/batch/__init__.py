"""What batch scoring is made of: the listing of what is asked, part files, and the processes that fill them."""
