"""What many vendors share: written once here, launched by the backends."""
