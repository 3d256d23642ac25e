"""The kernel HAL."""
