"""The images: where they come from, how they are split and checked, how they reach the device."""
