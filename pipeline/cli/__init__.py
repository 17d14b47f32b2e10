"""The commands of `refract` other than `serve`; each module has `main(argv) -> int`."""
