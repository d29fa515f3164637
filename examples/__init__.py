"""Data that travels with the product: real recordings, with their licences."""
