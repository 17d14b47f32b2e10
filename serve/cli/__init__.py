"""`refract serve` and `refract predict --url`."""
