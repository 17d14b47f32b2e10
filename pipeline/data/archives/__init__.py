"""Files inside archives: `photos.zip/cat/1.jpg` is the member `cat/1.jpg` of `photos.zip`. Each read opens one member, at its offset."""
