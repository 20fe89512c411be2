"""Networks that label pixels."""
