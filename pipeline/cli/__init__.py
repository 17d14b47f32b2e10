"""The commands of `refract` that train and measure; each module has `main(argv) -> int`."""
