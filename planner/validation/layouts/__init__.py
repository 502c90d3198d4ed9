"""Which published layout a file of measurements has, and what its rows say: one module per layout."""
